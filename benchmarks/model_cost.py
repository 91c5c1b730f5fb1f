"""What a training step costs with each prior and model, in steps with the standard normal prior.

Batch 100, one draw, fused Adam, random bits; plain and compiled steps of all rows interleaved in one process,
medians. Priors: gated layers, 784-300-300-40 and the mirror (Tomczak & Welling), and 784-400-40 with one tanh
layer. Labels: 784-500-50 with softplus (Pyro's tutorial), half of the labels missing and summed out.

    python benchmarks/model_cost.py [--results benchmarks/results/model_cost.yaml]
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
from mnist_priors import Gated
from torch import Tensor, nn

from ppl_vae.flows import MaskedAutoregressive
from ppl_vae.guides import GaussianMixtureGuide, MeanFieldGuide, SemiSupervisedGuide
from ppl_vae.infer import KL_ELBO, SVI, CompiledSVI, EnumELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, GaussianMixtureVAE, SemiSupervisedVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import FlowPrior, GaussianMixture, StandardNormal, VampPrior

IMAGE, BATCH, CLASSES = (1, 28, 28), 100, 10
Row = tuple[nn.Module, nn.Module, Any, tuple[Tensor, ...]]  # model, guide, estimator, batch


def data() -> Tensor:
    """Return random bits."""
    return torch.rand(BATCH, *IMAGE, generator=torch.Generator().manual_seed(0)).round()


def gated(prior: Callable[[nn.Module], nn.Module]) -> Row:
    """Return a VAE of gated layers."""
    guide = MeanFieldGuide(Gated(784), 40)
    return VAE(prior(guide), Bernoulli(Gated(40, IMAGE))), guide, KL_ELBO(analytic_kl=False), (data(),)


def plain(prior: Callable[[nn.Module], nn.Module]) -> Row:
    """Return a VAE with one hidden layer."""
    guide = MeanFieldGuide(MLP(IMAGE, hidden=400), 40)
    return VAE(prior(guide), Bernoulli(MLP(40, IMAGE, 400))), guide, KL_ELBO(analytic_kl=False), (data(),)


def network(*args: Any, **options: Any) -> MLP:
    """Return a network of the rows with labels."""
    return MLP(*args, hidden=500, activation="softplus", **options)


def without_labels() -> Row:
    """Return the VAE that M2 is compared with."""
    model = VAE(StandardNormal(50), Bernoulli(network(50, IMAGE)))
    return model, MeanFieldGuide(network(IMAGE), 50), KL_ELBO(analytic_kl=False), (data(),)


def semi_supervised() -> Row:
    """Return M2 with a batch of which half is labelled."""
    classifier = network(IMAGE, CLASSES)
    likelihood = Bernoulli(network(50, IMAGE, context=CLASSES))
    model = SemiSupervisedVAE(StandardNormal(50), likelihood, CLASSES, classifier=classifier, alpha=46.0)
    y = torch.arange(BATCH) % CLASSES
    y[::2] = -1
    guide = SemiSupervisedGuide(network(IMAGE, context=CLASSES), classifier, 50)
    return model, guide, EnumELBO(), (data(), y)


def clusters() -> Row:
    """Return the Gaussian mixture VAE of ten clusters."""
    model = GaussianMixtureVAE(CLASSES, 50, Bernoulli(network(50, IMAGE)))
    return model, GaussianMixtureGuide(network(IMAGE), 50, CLASSES), EnumELBO(), (data(),)


PRIORS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "standard": lambda guide: StandardNormal(40),
    "VampPrior, 500 components": lambda guide: VampPrior(guide, IMAGE, 500),
    "GaussianMixture, 500 components": lambda guide: GaussianMixture(40, 500),
    "FlowPrior, masked autoregressive, depth 4": lambda guide: FlowPrior(MaskedAutoregressive(40)),
}
TABLES: dict[str, dict[str, Callable[[], Row]]] = {
    "gated 784-300-300-40": {name: functools.partial(gated, prior) for name, prior in PRIORS.items()},
    "784-400-40": {name: functools.partial(plain, prior) for name, prior in PRIORS.items()},
    "784-500-50": {
        "VAE": without_labels,
        "SemiSupervisedVAE, 10 classes": semi_supervised,
        "GaussianMixtureVAE, 10 clusters": clusters,
    },
}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", default="benchmarks/results/model_cost.yaml")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    found: dict[str, Any] = {}
    for table, rows in TABLES.items():
        engines: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, make in rows.items():
            for kind in (SVI, CompiledSVI):
                torch.manual_seed(0)
                model, guide, elbo, batch = make()
                svi = kind(model, guide, functools.partial(torch.optim.Adam, fused=True), elbo)
                engines[name, kind.__name__] = functools.partial(svi.step, *batch)
        times: dict[Any, list[float]] = {key: [] for key in engines}
        for repeat in range(settings.repeats + 3):
            for key, step in engines.items():
                start = time.perf_counter()
                step()
                if repeat >= 3:
                    times[key].append(time.perf_counter() - start)
        medians = {key: statistics.median(values) for key, values in times.items()}
        base = next(iter(rows))
        found[table] = {
            f"milliseconds, {base}": {
                kind: round(1000 * medians[base, kind], 2) for kind in ("SVI", "CompiledSVI")
            },
            f"cost over {base}": {
                name: {
                    kind: round(medians[name, kind] / medians[base, kind], 2)
                    for kind in ("SVI", "CompiledSVI")
                }
                for name in rows
            },
        }
    record = {
        "set-up": "batch 100, one draw, fused Adam, medians of interleaved steps",
        **found,
        "threads": settings.threads,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
