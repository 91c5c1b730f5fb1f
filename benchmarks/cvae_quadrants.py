"""Predict the missing quadrants of MNIST digits from those that are given; measure log p(missing | given).

A conditional VAE: prior p(z | given), decoder p(missing | z, given) and encoder q(z | missing, given), each
with two hidden layers of 500 with ReLU, 200 latent dimensions, Adam, early stopping by the validation ELBO.
The baseline has the decoder's network without z. Given are the lower left quadrant (1), the left half (2) or
all but the upper right quadrant (3). log p is importance-sampled with K draws from the encoder.

    python benchmarks/cvae_quadrants.py [--quadrants 1] [--binarization static]
        [--results benchmarks/results/cvae_quadrants.yaml]

Published negative log p, nats per image, for 1, 2 and 3 given quadrants. Sohn et al. (2015): 63.91, 44.73,
20.95 by importance sampling; 68.39, 45.34, 20.96 by Monte Carlo; baseline 99.75, 62.18, 25.99. Pyro's
example: CVAE 71.8, 51.0, 24.2 (an ELBO of 10 draws; the test set stops the training), baseline 100.4, 61.9,
25.4. The latter's pixels are grey, which `--binarization grey` repeats: the cross-entropy of grey pixels is
no likelihood, and can't be compared with that of bits.
"""

import argparse
import platform
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
import yaml
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_vae import evaluate, fit
from ppl_vae.data import Split, load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models.cvae import CVAE
from ppl_vae.networks import MLP
from ppl_vae.priors.conditional_normal import ConditionalNormal

HALF, LATENT, HIDDEN = 14, 200, (500, 500)


class Grey(nn.Module):
    """The cross-entropy of grey pixels in place of a likelihood."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return what scores x for ``z``."""
        return CrossEntropy(logits=self.decoder(z, context)).to_event(1)


class CrossEntropy(dist.Bernoulli):
    """A Bernoulli distribution that scores any value in [0, 1]."""

    support = constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        """Return minus the cross-entropy."""
        return value * self.logits - F.softplus(self.logits)


def split_images(split: Split, quadrants: int, size: int | None) -> Split:
    """Return missing pixels as x ``[n, missing]`` and given ones as y ``[n, given]``."""
    given = torch.zeros(2 * HALF, 2 * HALF, dtype=torch.bool)
    given[HALF:, :HALF] = True
    if quadrants > 1:
        given[:HALF, :HALF] = True
    if quadrants > 2:
        given[HALF:, HALF:] = True
    pixels = split.x[:size].squeeze(1)
    return Split(pixels[:, ~given], pixels[:, given])


def baseline_loss(network: nn.Module, data: Split) -> Tensor:
    """Return -log p(missing | given) of the network without z, nats, ``[n]``."""
    logits = network(data.y)
    return F.binary_cross_entropy_with_logits(logits, data.x, reduction="none").sum(-1)


def train_baseline(network: nn.Module, train: Split, validation: Split, settings: Any) -> None:
    """Train the network without z, up to the epoch of the lowest validation loss."""
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    best, state, waited = float("inf"), network.state_dict(), 0
    for _ in range(settings.epochs):
        order = torch.randperm(len(train), device=train.x.device)
        for index in order.split(settings.batch_size):
            optimizer.zero_grad()
            baseline_loss(network, Split(*train.batch(index))).mean().backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(baseline_loss(network, validation).mean())
        waited += 1
        if loss < best:
            best, waited = loss, 0
            state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        if waited == settings.patience:
            break
    network.load_state_dict(state)


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quadrants", type=int, nargs="*", default=[1], choices=(1, 2, 3), help="given ones")
    parser.add_argument("--binarization", default="static", choices=("static", "threshold", "grey"))
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--patience", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_particles", type=int, default=100, help="K of log p")
    parser.add_argument("--size", type=int, default=None, help="training images, all by default")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/cvae_quadrants.yaml")
    settings = parser.parse_args()
    grey = settings.binarization == "grey"
    data = load_dataset("mnist", root=settings.root, binarization=None if grey else settings.binarization)
    rows: dict[str, dict[str, Any]] = {}
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    for quadrants in settings.quadrants:
        train = split_images(data.train, quadrants, settings.size)
        validation = split_images(data.validation, quadrants, settings.size)
        test = split_images(data.test, quadrants, settings.images)
        missing, given = train.x.shape[1], train.y.shape[1]
        torch.manual_seed(settings.seed)
        likelihood = Grey if grey else Bernoulli
        model = CVAE(
            ConditionalNormal(MLP(given, hidden=HIDDEN, activation="relu"), LATENT),
            likelihood(MLP(LATENT, missing, HIDDEN, activation="relu", context=given)),
        )
        guide = MeanFieldGuide(MLP(missing, None, HIDDEN, activation="relu", context=given), LATENT)
        run = fit(
            model,
            guide,
            train,
            validation=validation,
            elbo=KL_ELBO(),
            learning_rate=settings.learning_rate,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            patience=settings.patience,
            device=settings.device,
            seed=settings.seed,
            compile=True,
        )
        result = evaluate(
            model,
            guide,
            test,
            num_particles=settings.num_particles,
            device=settings.device,
            seed=settings.seed,
        )
        network = MLP(given, missing, HIDDEN, activation="relu").to(settings.device)
        train_baseline(network, train.to(settings.device), validation.to(settings.device), settings)
        with torch.no_grad():
            baseline = baseline_loss(network, test.to(settings.device)).cpu()
        rows[f"{quadrants} given"] = {
            "conditional_nll": round(-result.log_likelihood.mean, 3),
            "standard_error": round(result.log_likelihood.standard_error, 3),
            "monte_carlo_error": round(result.log_likelihood.monte_carlo_error, 4),
            "negative_elbo": round(-result.elbo.mean, 3),
            "baseline_nll": round(float(baseline.mean()), 3),
            "baseline_standard_error": round(float(baseline.std() / len(baseline) ** 0.5), 3),
            "best_epoch": run.best_epoch,
            "epochs_run": len(run.history),
            "training_minutes": round(sum(record["seconds"] for record in run.history) / 60, 2),
        }
        print(quadrants, rows[f"{quadrants} given"], flush=True)
        record = {
            "set-up": f"MNIST, {len(train)} training images, hidden 500-500 ReLU in prior, decoder and "
            "encoder, 200 latent dimensions, KL_ELBO with one draw, Adam, early stopping by the validation "
            "ELBO; importance sampling with K draws from the encoder",
            **{
                k: v
                for k, v in vars(settings).items()
                if k not in ("root", "results", "quadrants", "binarization")
            },
            "test": rows,
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        }
        recorded = (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
        recorded[settings.binarization] = record
        path.write_text(yaml.safe_dump(recorded, sort_keys=False, width=100))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
