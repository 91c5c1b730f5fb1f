"""What a training step costs with each guide, in steps with the mean-field guide.

Network 784-400-40, batch 128, `KL_ELBO` with one draw, fused Adam, random bits; plain and compiled steps of
all guides interleaved in one process, medians. Flows have four layers, networks of 128 and a context of 64.

    python benchmarks/guide_cost.py [--results benchmarks/results/guide_cost.yaml]
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ppl_vae import flows
from ppl_vae.guides import (
    FlowGuide,
    FullRankGuide,
    HamiltonianGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import KL_ELBO, SVI, CompiledSVI
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

LATENT, CONTEXT = 40, 64


def encoder() -> MLP:
    """Return a fresh encoder."""
    return MLP((1, 28, 28), hidden=400)


GUIDES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "MeanFieldGuide": lambda model: MeanFieldGuide(encoder(), LATENT),
    "FullRankGuide": lambda model: FullRankGuide(encoder(), LATENT),
    "LowRankGuide, rank 5": lambda model: LowRankGuide(encoder(), LATENT, rank=5),
    "MixtureGuide, 5 components": lambda model: MixtureGuide(encoder(), LATENT, 5),
    **{
        f"FlowGuide, {name}": lambda model, name=name: FlowGuide(
            encoder(), getattr(flows, name)(LATENT, CONTEXT)
        )
        for name in flows.__all__
        if name != "MaskedAutoregressive"  # draws in a pass per dimension
    },
    "SemiAmortizedGuide, 5 steps": lambda model: SemiAmortizedGuide(
        MeanFieldGuide(encoder(), LATENT), model, steps=5
    ),
    "HamiltonianGuide, 5 steps": lambda model: HamiltonianGuide(
        MeanFieldGuide(encoder(), LATENT), model, steps=5
    ),
}


def engine(kind: type[SVI], make: Callable[[nn.Module], nn.Module]) -> SVI:
    """Return an engine for a fresh pair."""
    torch.manual_seed(0)
    model = VAE(StandardNormal(LATENT), Bernoulli(MLP(LATENT, (1, 28, 28), 400)))
    return kind(model, make(model), functools.partial(torch.optim.Adam, fused=True), KL_ELBO())


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", default="benchmarks/results/guide_cost.yaml")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    x = torch.rand(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    engines = {
        (name, kind.__name__): engine(kind, make)
        for name, make in GUIDES.items()
        for kind in (SVI, CompiledSVI)
    }
    times: dict[Any, list[float]] = {key: [] for key in engines}
    for repeat in range(settings.repeats + 3):
        for key, svi in engines.items():
            start = time.perf_counter()
            svi.step(x)
            if repeat >= 3:
                times[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in times.items()}
    record = {
        "set-up": "784-400-40, batch 128, KL_ELBO, fused Adam; flows of depth 4, networks of 128, context 64",
        "mean_field_milliseconds": {
            kind: round(1000 * medians["MeanFieldGuide", kind], 2) for kind in ("SVI", "CompiledSVI")
        },
        "cost_in_mean_field_steps": {
            name: {
                kind: round(medians[name, kind] / medians["MeanFieldGuide", kind], 2)
                for kind in ("SVI", "CompiledSVI")
            }
            for name in GUIDES
        },
        "threads": settings.threads,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
