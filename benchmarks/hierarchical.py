"""One stochastic layer against two on MNIST, bottom-up and ladder guides, at equal epochs.

The networks are those of Burda et al.: one layer, 784-200-200-50 and its mirror; two layers, 784-200-200-100
and 100-100-100-50 and their mirrors, tanh. Dynamic binarisation, decoder bias at the logit of the data mean,
Adam with cosine decay, batch 100, compiled. The ladder guide's second network starts from the first one's
features. Rows with `norm` have batch normalisation in all hidden layers of the guide and of p(z1 | z2), and
KL warm-up. log p(x) is importance-sampled with K draws; active units of a layer are those whose posterior
mean varies by more than 0.01 over images. Differences are over the same test images, with the standard error
of the mean difference; training noise is that of one seed.

    python benchmarks/hierarchical.py [--epochs 30] [--num_particles 1] [--device cuda]

Published -log p(x) after 3280 epochs at batch 20 (Burda et al., 2016, arXiv:1509.00519, Table 1): VAE, one
draw, 86.76 with one layer, 85.33 with two; IWAE, 50 draws, 84.78 and 82.90.
"""

import argparse
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.guides.hierarchical import HierarchicalGuide
from ppl_vae.guides.ladder import LadderGuide
from ppl_vae.infer import IWAE, KL_ELBO, LinearWarmup
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.hierarchical import HierarchicalVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.conditional_normal import ConditionalNormal

IMAGE = (1, 28, 28)
Pair = tuple[HierarchicalVAE, nn.Module]


def one_layer() -> Pair:
    """Return the pair of one layer."""
    model = HierarchicalVAE(StandardNormal(50), (), Bernoulli(MLP(50, IMAGE, (200, 200))))
    return model, HierarchicalGuide([MLP(IMAGE, hidden=(200, 200))], [50])


def two_layers(norm: str | None = None) -> HierarchicalVAE:
    """Return the model of two layers."""
    between = ConditionalNormal(MLP(50, None, (100, 100), normalization=norm), 100)
    return HierarchicalVAE(StandardNormal(50), [between], Bernoulli(MLP(100, IMAGE, (200, 200))))


def bottom_up() -> Pair:
    """Return two layers with the bottom-up guide."""
    encoders = [MLP(IMAGE, hidden=(200, 200)), MLP(100, hidden=(100, 100))]
    return two_layers(), HierarchicalGuide(encoders, [100, 50])


def ladder(norm: str | None = None) -> Pair:
    """Return two layers with the ladder guide."""
    model = two_layers(norm)
    encoders = [
        MLP(IMAGE, hidden=(200, 200), normalization=norm),
        MLP(200, hidden=(100, 100), normalization=norm),
    ]
    return model, LadderGuide(encoders, [100, 50], model)


PAIRS: dict[str, Callable[[], Pair]] = {
    "L=1": one_layer,
    "L=2, bottom-up": bottom_up,
    "L=2, ladder": ladder,
    "L=2, ladder, norm and warm-up": lambda: ladder("batch"),
}
BASE = "L=1"


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--draws", type=int, default=1, help="draws a step: 1 the ELBO, more IWAE")
    parser.add_argument("--warmup", type=float, default=0.2, help="share of the epochs, in rows with warm-up")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), help="beginnings of their names")
    parser.add_argument("--training_images", type=int, default=None, help="all by default")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--num_particles", type=int, default=5000, help="K of log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/hierarchical.yaml")
    settings = parser.parse_args()
    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    size = settings.training_images
    train = data.train if size is None else Split(data.train.x[:size], dynamic=data.train.dynamic)
    steps = math.ceil(len(train.x) / 100) * settings.epochs
    log_p: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in PAIRS.items():
        if not any(name.startswith(wanted) for wanted in settings.pairs):
            continue
        torch.manual_seed(settings.seed)
        model, guide = make()
        model.likelihood.init_bias(train.x)
        weight = LinearWarmup(max(1, int(settings.warmup * steps))) if "warm-up" in name else 1.0
        if settings.draws > 1:
            elbo: Any = IWAE(settings.draws, kl_weight=weight)
        else:
            elbo = KL_ELBO(kl_weight=weight, analytic_kl="bottom-up" not in name)
        run = fit(
            model,
            guide,
            train,
            validation=data.validation,
            elbo=elbo,
            learning_rate=settings.learning_rate,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, settings.epochs
            ),
            epochs=settings.epochs,
            batch_size=100,
            device=settings.device,
            seed=settings.seed,
            compile=not settings.no_compile,
        )
        test = Split(data.test.x[: settings.images], dynamic=data.test.dynamic)
        result = evaluate(model, guide, test, num_particles=settings.num_particles, device=settings.device)
        log_p[name] = result.log_likelihood.values
        rows[name] = {
            "elbo": round(result.elbo.mean, 3),
            "log_likelihood": round(result.log_likelihood.mean, 3),
            "standard_error": round(result.log_likelihood.standard_error, 3),
            "kl": {site: round(kl.mean, 2) for site, kl in result.kl.items()},
            "minutes": round(sum(record["seconds"] for record in run.history) / 60, 1),
            "best_epoch": run.best_epoch,
        }
        if BASE in log_p and name != BASE:
            difference = log_p[name] - log_p[BASE]
            rows[name]["over_one_layer"] = round(float(difference.mean()), 3)
            rows[name]["error_over_one_layer"] = round(float(difference.std() / len(difference) ** 0.5), 3)
        print(name, rows[name], flush=True)
    record = {
        "set-up": "dynamic MNIST, tanh, decoder bias at the logit of the data mean, Adam with cosine decay "
        "to 0, batch 100",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results", "pairs")},
        "pairs": rows,
        "machine": torch.cuda.get_device_name() if settings.device.startswith("cuda") else "CPU",
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
