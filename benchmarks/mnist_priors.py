"""Compare priors on MNIST or Fashion-MNIST at equal epochs; and a flow in the prior with one in the guide.

The networks of Tomczak and Welling: gated layers, 784-300-300-40 and the mirror, He initialisation, dynamic
binarisation, 50,000 training images, KL warm-up, batch 100. Only the prior differs, but in the last row:
there the guide has the flow that the prior has in the row before, with 64 numbers of context from the encoder
and narrower, until both pairs have equally many parameters. The VampPrior's pseudo-inputs start at training
images. Adam with cosine decay, compiled, the same seed for all. log p(x) is importance-sampled with K draws.
Differences are between means over the same test images, with the standard error of the mean difference;
training noise is that of one seed.

    python benchmarks/mnist_priors.py [--data mnist | fashion-mnist] [--epochs 30]
        [--results benchmarks/results/mnist_priors.yaml]

Published -log p(x), 5000 draws, up to 2000 epochs with early stopping (Norouzi et al., 2020,
arXiv:2004.04795, Table 1): standard prior 84.45 on MNIST and 228.70 on Fashion-MNIST, VampPrior 82.43 and
227.35. Flow prior over flow posterior, other networks (Xu et al., 2019): 0.98 to 1.13 on static MNIST.
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
from ppl_vae.flows import InverseAutoregressive, MaskedAutoregressive
from ppl_vae.guides import FlowGuide, MeanFieldGuide
from ppl_vae.infer import KL_ELBO, LinearWarmup
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE
from ppl_vae.priors import FlowPrior, StandardNormal, VampPrior

IMAGE, HIDDEN, LATENT, DEPTH, CONTEXT = (1, 28, 28), 300, 40, 4, 64
IMAGE_SIZE = math.prod(IMAGE)
Pair = tuple[VAE, nn.Module]


class Gated(nn.Sequential):
    """Two gated layers, h = (W x + b) * sigmoid(V x + c), and a linear one if there is an output shape."""

    def __init__(self, size: int, out_shape: tuple[int, ...] | None = None) -> None:
        layers: list[nn.Module] = [nn.Flatten(-3)] if out_shape is None else []
        for width in (size, HIDDEN):
            layers += [nn.Linear(width, 2 * HIDDEN), nn.GLU(-1)]
        if out_shape is not None:
            layers += [nn.Linear(HIDDEN, math.prod(out_shape)), nn.Unflatten(-1, out_shape)]
        super().__init__(*layers)
        self.out_features = HIDDEN
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    @property
    def output_bias(self) -> Tensor:
        """The bias of the output, ``[pixels]``."""
        return self[-2].bias


def standard(_: Tensor) -> Pair:
    """Return the standard normal prior with the mean-field guide."""
    return vae(StandardNormal(LATENT)), MeanFieldGuide(encoder(), LATENT)


def vamp(x: Tensor, components: int = 500) -> Pair:
    """Return the VampPrior, its pseudo-inputs at some of the data."""
    guide = MeanFieldGuide(encoder(), LATENT)
    prior = VampPrior(guide, IMAGE, components)
    prior.init_pseudo_inputs(x)
    return vae(prior), guide


def flow_prior(_: Tensor) -> Pair:
    """Return a masked autoregressive flow as prior, with the mean-field guide."""
    prior = FlowPrior(MaskedAutoregressive(LATENT, depth=DEPTH, hidden=(HIDDEN,), activation="relu"))
    return vae(prior), MeanFieldGuide(encoder(), LATENT)


def flow_posterior(x: Tensor) -> Pair:
    """Return the standard prior and an inverse autoregressive flow in the guide, of as many parameters."""

    def make(width: int) -> Pair:
        flow = InverseAutoregressive(LATENT, CONTEXT, DEPTH, hidden=(width,))
        return vae(StandardNormal(LATENT)), FlowGuide(encoder(), flow)

    per_unit = parameters(make(HIDDEN)) - parameters(make(HIDDEN - 1))
    surplus = parameters(make(HIDDEN)) - parameters(flow_prior(x))
    return make(HIDDEN - round(surplus / per_unit))


def encoder() -> Gated:
    """Return the encoder."""
    return Gated(IMAGE_SIZE)


def vae(prior: nn.Module) -> VAE:
    """Return the model with a prior."""
    return VAE(prior, Bernoulli(Gated(LATENT, IMAGE)))


def parameters(pair: Pair) -> int:
    """Return the number of parameters of a pair."""
    return sum(p.numel() for program in pair for p in program.parameters())


PAIRS: dict[str, Callable[[Tensor], Pair]] = {
    "standard": standard,
    "VampPrior": vamp,
    "flow prior": flow_prior,
    "flow posterior": flow_posterior,
}
DIFFERENCES = [("VampPrior", "standard"), ("flow prior", "standard"), ("flow prior", "flow posterior")]


def main() -> None:
    """Train, evaluate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument(
        "--warmup", type=float, default=0.2, help="share of the epochs with a lower KL weight"
    )
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--num_particles", type=int, default=5000, help="K of log p(x)")
    parser.add_argument("--size", type=int, default=None, help="training images, all by default")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", default=None)
    parser.add_argument("--results", default="benchmarks/results/mnist_priors.yaml")
    settings = parser.parse_args()
    data = load_dataset(settings.data, root=settings.root, binarization="dynamic")
    train = Split(data.train.x[: settings.size], dynamic=True)
    test = Split(data.test.x[: settings.images])
    steps = math.ceil(len(train) / 100) * settings.epochs
    log_p: dict[str, Tensor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in settings.pairs:
        torch.manual_seed(settings.seed)
        pair = model, guide = PAIRS[name](train.x)
        model.likelihood.init_bias(train.x)
        run = fit(
            model,
            guide,
            train,
            validation=data.validation,
            elbo=KL_ELBO(kl_weight=LinearWarmup(max(1, int(settings.warmup * steps))), analytic_kl=False),
            learning_rate=settings.learning_rate,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, settings.epochs
            ),
            epochs=settings.epochs,
            batch_size=100,
            device=settings.device,
            seed=settings.seed,
            compile=True,
        )
        result = evaluate(model, guide, test, num_particles=settings.num_particles, device=settings.device)
        log_p[name] = result.log_likelihood.values
        rows[name] = {
            "elbo": round(result.elbo.mean, 3),
            "reconstruction": round(result.reconstruction.mean, 3),
            "log_likelihood": round(result.log_likelihood.mean, 3),
            "standard_error": round(result.log_likelihood.standard_error, 3),
            "parameters": parameters(pair),
            "best_epoch": run.best_epoch,
            "training_minutes": round(sum(record["seconds"] for record in run.history) / 60, 2),
        }
        for first, second in DIFFERENCES:
            if first in log_p and second in log_p and name in (first, second):
                difference = (log_p[first] - log_p[second]).double()
                error = float(difference.std()) / math.sqrt(len(difference))
                rows[first][f"over {second}"] = f"{float(difference.mean()):+.2f} +- {error:.2f}"
        print(name, rows[name], flush=True)
    print(
        *(f"{n} over {s}: {r[f'over {s}']}" for n, r in rows.items() for s in PAIRS if f"over {s}" in r),
        sep="\n",
    )
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = yaml.safe_load(path.read_text()) if path.exists() else {}
    recorded[settings.data] = {
        "set-up": f"dynamic binarisation, {len(train)} training images, gated 784-300-300-40 and its mirror, "
        "He, decoder bias at the logit of the data mean, ELBO with one draw, linear KL warm-up, Adam with "
        "cosine decay to 0, batch 100",
        **{k: v for k, v in vars(settings).items() if k not in ("root", "results", "pairs", "data")},
        "test": rows,
        "threads": torch.get_num_threads(),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    path.write_text(yaml.safe_dump(recorded, sort_keys=False, width=100))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
