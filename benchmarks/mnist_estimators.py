"""Train one network under several estimators for equally many steps, and compare test log p(x) on MNIST.

Network 784-200-200-50 with tanh, dynamic binarisation, decoder bias at the logit of the data mean, Adam with
cosine decay, batch 100, the same start, seed, rates and steps for all: `Trace_ELBO` against `STL_ELBO` with
one draw, `IWAE` against `DReG` with K draws. Differences are between means over the same test images, with
the standard error of the mean difference; training noise is that of one seed.

    python benchmarks/mnist_estimators.py [--epochs 20] [--results benchmarks/results/mnist_estimators.yaml]
"""

import argparse
import math
import platform
from pathlib import Path

import torch
import yaml
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import IWAE, STL_ELBO, DReG
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num_particles", type=int, default=8, help="K of IWAE and DReG")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--evaluation_particles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/mnist_estimators.yaml")
    settings = parser.parse_args()
    data = load_dataset("mnist", root=settings.root, binarization="dynamic")
    k = settings.num_particles
    estimators: dict[str, ELBO] = {
        "Trace_ELBO": Trace_ELBO(),
        "STL_ELBO": STL_ELBO(),
        f"IWAE (K={k})": IWAE(k),
        f"DReG (K={k})": DReG(k),
    }
    log_p: dict[str, Tensor] = {}
    rows: dict[str, dict[str, float]] = {}
    for name, elbo in estimators.items():
        torch.manual_seed(settings.seed)
        model = VAE(StandardNormal(50), Bernoulli(MLP(50, (1, 28, 28), (200, 200))))
        guide = MeanFieldGuide(MLP((1, 28, 28), hidden=(200, 200)), 50)
        model.likelihood.init_bias(data.train.x)
        threads = torch.get_num_threads()
        if settings.device == "cpu" and elbo.num_particles == 1:
            torch.set_num_threads(1)  # at batch 100 a second thread gains nothing
        run = fit(
            model,
            guide,
            data.train,
            elbo=elbo,
            learning_rate=settings.learning_rate,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, settings.epochs
            ),
            epochs=settings.epochs,
            batch_size=100,
            device=settings.device,
            seed=settings.seed,
        )
        torch.set_num_threads(threads)
        result = evaluate(
            model,
            guide,
            Split(data.test.x[: settings.images]),
            num_particles=settings.evaluation_particles,
            device=settings.device,
        )
        log_p[name] = result.log_likelihood.values
        rows[name] = {
            "log_likelihood": round(result.log_likelihood.mean, 3),
            "standard_error": round(result.log_likelihood.standard_error, 3),
            "elbo": round(result.elbo.mean, 3),
            "training_minutes": round(sum(record["seconds"] for record in run.history) / 60, 2),
        }
        print(name, rows[name], flush=True)
    differences = {}
    for better, plain in (("STL_ELBO", "Trace_ELBO"), (f"DReG (K={k})", f"IWAE (K={k})")):
        difference = (log_p[better] - log_p[plain]).double()
        error = float(difference.std()) / math.sqrt(len(difference))
        differences[f"{better} - {plain}"] = {
            "mean": round(float(difference.mean()), 3),
            "standard_error": round(error, 3),
            "better": bool(difference.mean() > 2 * error),
        }
    record = {
        "set-up": "dynamic MNIST, 50,000 training images, 784-200-200-50 tanh, Xavier, decoder bias at the "
        "logit of the data mean, Adam with cosine decay to 0, batch 100, equal steps",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results")},
        "test": rows,
        "differences": differences,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
