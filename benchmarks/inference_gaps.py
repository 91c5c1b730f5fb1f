"""Approximation and amortisation gap of a VAE on MNIST and Fashion-MNIST, beside those of Cremer et al.

Encoder 784-200-200, 50 latent dimensions, decoder 200-200-784, ELU, mean-field guide; images are thresholded
at 0.5, and the decoder's bias starts at the logit of their mean. Adam with cosine decay to 0, batch 100,
closed-form KL, compiled. Gaps are those of the first training images. The best mean-field posterior of an
image has one row for all draws ("shared"), or one for each draw of a step ("separate", as in code of the
paper's authors), whose mean ELBO is no higher than that of the shared optimum. log p(x) is
importance-sampled by the better of the guide and the optimum.

    python benchmarks/inference_gaps.py [--epochs 30] [--ais]

Published (Cremer, Li & Duvenaud, 2018, q_FFG; 3280 epochs at batch 100 with KL warm-up; log p(x) by annealed
importance sampling): approximation gap 1.43 on MNIST and 3.06 on Fashion-MNIST, amortisation gap 1.34 and
4.22. Their MNIST is binarised by draws, their Fashion-MNIST thresholded as here.
"""

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from ppl_vae import fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.evaluation import Estimate, annealed_importance_sampling, inference_gaps
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

LATENT = 50
PUBLISHED = {
    "mnist": {"log_likelihood": -89.80, "approximation_gap": 1.43, "amortization_gap": 1.34},
    "fashion-mnist": {"log_likelihood": -97.47, "approximation_gap": 3.06, "amortization_gap": 4.22},
}
COLUMNS = ("log_likelihood", "approximation_gap", "amortization_gap", "inference_gap")


def annealed(model: VAE, guide: MeanFieldGuide, x: torch.Tensor, settings: Any) -> Estimate:
    """Return log p(x) by annealed importance sampling."""
    return annealed_importance_sampling(
        model, guide, Split(x), device=settings.device, seed=settings.seed
    ).log_likelihood


def main() -> None:
    """Train, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=100, help="the first training images")
    parser.add_argument("--num_particles", type=int, default=5000, help="K of log p(x) and of the ELBOs")
    parser.add_argument("--steps", type=int, default=1500, help="the most for an image")
    parser.add_argument("--copies", type=int, default=50, help="separate copies of an image; 0 for none")
    parser.add_argument("--datasets", nargs="*", default=list(PUBLISHED))
    parser.add_argument("--ais", action="store_true", help="gaps to annealed importance sampling, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/inference_gaps.yaml")
    settings = parser.parse_args()
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "set-up": "binarised at 0.5, 50,000 training images, 784-200-200-50 ELU, Xavier, decoder bias at the "
        "logit of the data mean, KL_ELBO with one draw, Adam with cosine decay to 0, batch 100; gaps in nats "
        "on the first training images: mean +- standard error over images",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results", "datasets", "ais")},
    }
    for name in settings.datasets:
        rows, minutes = measure(name, settings)
        record[name] = {"training_minutes": minutes, **rows}
        versions = {"torch": str(torch.__version__), "python": platform.python_version()}
        end = {
            "published": "Cremer et al. 2018, arXiv:1801.03558, q_FFG, 3280 epochs at batch 100",
            "threads": torch.get_num_threads(),
            "versions": versions,
        }
        path.write_text(yaml.safe_dump(record | end, sort_keys=False, width=100))
    print(f"recorded in {path}")


def measure(name: str, settings: Any) -> tuple[dict[str, Any], float]:
    """Train on one data set; return its rows and the minutes of training."""
    data = load_dataset(name, root=settings.root, binarization="threshold")
    torch.manual_seed(settings.seed)
    model = VAE(StandardNormal(LATENT), Bernoulli(MLP(LATENT, (1, 28, 28), (200, 200), activation="elu")))
    guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200), activation="elu"), LATENT)
    model.likelihood.init_bias(data.train.x)
    run = fit(
        model,
        guide,
        data.train,
        elbo=KL_ELBO(),
        learning_rate=settings.learning_rate,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs),
        epochs=settings.epochs,
        batch_size=100,
        device=settings.device,
        seed=settings.seed,
        compile=True,
    )
    x = data.train.x[: settings.images]
    options: dict[str, Any] = {
        "num_particles": settings.num_particles,
        "steps": settings.steps,
        "device": settings.device,
        "seed": settings.seed,
    }
    rows: dict[str, Any] = {}

    def take(label: str, **others: Any) -> None:
        start = time.perf_counter()
        result = inference_gaps(model, guide, Split(x), **options, **others)
        print(f"{name}, {label}\n{result}", flush=True)
        rows[label] = {
            column: f"{getattr(result, column).mean:.3f} +- {getattr(result, column).standard_error:.3f}"
            for column in ("log_likelihood", "optimal_elbo", "amortized_elbo", *COLUMNS[1:])
        }
        rows[label] |= {
            "monte_carlo_error": round(result.approximation_gap.monte_carlo_error, 4),
            "steps": result.steps,
            "converged": result.converged,
            "seconds": round(time.perf_counter() - start, 1),
        }

    take("shared")
    if settings.copies:
        take("separate", copies="separate", step_particles=settings.copies, compile=True)
    if settings.ais:
        take("shared, AIS", log_likelihood=annealed(model, guide, x, settings))
    published = PUBLISHED[name]
    rows["published"] = published | {
        "inference_gap": round(published["approximation_gap"] + published["amortization_gap"], 2)
    }
    print(f"{name:<14}" + "".join(f"{column.replace('_', ' '):>24}" for column in COLUMNS))
    for label, row in rows.items():
        print(f"{label:<14}" + "".join(f"{row[column]!s:>24}" for column in COLUMNS), flush=True)
    return rows, round(sum(epoch["seconds"] for epoch in run.history) / 60, 2)


if __name__ == "__main__":
    main()
