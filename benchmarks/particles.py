"""Measure what K draws per datum cost: time of a step at batch 20, memory at batch 100.

The IWAE paper's network, 784-200-200-50 with tanh, random binary data. The encoder runs once per datum, and
all draws are one pass, so that 50 draws cost far less than 50 steps of one. Times are medians of interleaved
steps in one process. For comparison: Pyro's `RenyiELBO(alpha=0)`, the same bound, its draws in one pass too.

    python benchmarks/particles.py [--results benchmarks/results/particles.yaml]
"""

import argparse
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pyro.infer import ELBO, RenyiELBO

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import IWAE, SVI, DReG
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def engine(elbo: ELBO) -> SVI:
    """Return an engine for a fresh pair."""
    torch.manual_seed(0)
    model = VAE(StandardNormal(50), Bernoulli(MLP(50, (1, 28, 28), (200, 200))))
    return SVI(model, MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200)), 50), torch.optim.Adam, elbo)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", default="benchmarks/results/particles.yaml")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    x = torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    svi = engine(IWAE(50))  # first, while the process is small
    svi.setup(x)
    before = _memory()
    svi.step(x)
    memory = _memory(peak=True) - before
    svis = {
        "IWAE, K=1": engine(IWAE(1)),
        "IWAE, K=50": engine(IWAE(50)),
        "DReG, K=50": engine(DReG(50)),
        "RenyiELBO of Pyro, K=50": engine(
            RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in svis}
    for repeat in range(settings.repeats + 3):
        for name, svi in svis.items():
            start = time.perf_counter()
            svi.step(x[:20])
            if repeat >= 3:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    record: dict[str, Any] = {
        "set-up": "784-200-200-50 tanh, Bernoulli, Adam; batch 20 for times, batch 100 for memory",
        "milliseconds_per_step": {name: round(1000 * value, 2) for name, value in medians.items()},
        "cost_of_50_draws_over_one": round(medians["IWAE, K=50"] / medians["IWAE, K=1"], 2),
        "pyro_over_ours_at_50": round(medians["RenyiELBO of Pyro, K=50"] / medians["IWAE, K=50"], 2),
        "memory_of_a_step_K50_batch100_GiB": round(memory, 3),
        "threads": settings.threads,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


def _memory(peak: bool = False) -> float:
    """Return the memory in use, GiB, and start anew to watch its peak; or that peak. Linux."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = re.search(f"{'VmHWM' if peak else 'VmRSS'}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) / 2**20 if line else float("nan")


if __name__ == "__main__":
    main()
