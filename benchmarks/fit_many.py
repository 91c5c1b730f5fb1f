"""Measure what training 8 small models at once costs: `fit_many` against `fit` one after the other.

The network 64-32-4 with tanh on scikit-learn's digits, thresholded, `KL_ELBO`, Adam; an epoch is 50 steps on
batches of 100. Medians of an epoch's time in one process, without the first epochs, which compile; the models
that train one after the other count with the sum of theirs.

    python benchmarks/fit_many.py [--results benchmarks/results/fit_many.yaml]
"""

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ppl_vae import fit
from ppl_vae.data import load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import Run
from ppl_vae.training.fit_many import fit_many


def make() -> tuple[nn.Module, nn.Module]:
    """Return a fresh pair."""
    model = VAE(StandardNormal(4), Bernoulli(MLP(4, (1, 8, 8), (32,))))
    return model, MeanFieldGuide(MLP((1, 8, 8), hidden=(32,)), 4)


def milliseconds(run: Run) -> float:
    """Return the median time of an epoch."""
    return 1000 * statistics.median(record["seconds"] for record in run.history[2:])


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", default="benchmarks/results/fit_many.yaml")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    x = load_dataset("digits", binarization="threshold").train.x.repeat(5, 1, 1, 1)  # times are whole ms
    seeds = range(settings.members)
    options: dict[str, Any] = {"epochs": settings.epochs, "progress": False}
    times: dict[str, float] = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        runs = fit_many(make, x, seeds=seeds, compile=compiled, **options)
        times[f"fit_many, {name}"] = milliseconds(runs[0])
        alone = [fit(*make(), x, elbo=KL_ELBO(), seed=s, compile=compiled, **options) for s in seeds]
        times[f"fit, one after the other, {name}"] = sum(map(milliseconds, alone))
    record: dict[str, Any] = {
        "set-up": f"{settings.members} models 64-32-4 on digits, KL_ELBO, Adam, 50 steps at batch 100",
        "milliseconds_per_epoch_of_all": {name: round(value, 1) for name, value in times.items()},
        "speed-up": {
            name: round(times[f"fit, one after the other, {name}"] / times[f"fit_many, {name}"], 2)
            for name in ("plain", "compiled")
        },
        "cost_of_all_over_one": {
            name: round(
                settings.members * times[f"fit_many, {name}"] / times[f"fit, one after the other, {name}"], 2
            )
            for name in ("plain", "compiled")
        },
        "machine": _processor(),
        "threads": settings.threads,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
