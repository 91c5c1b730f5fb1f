"""Measure how the gradients' signal-to-noise ratio grows or falls with the number of draws K.

The toy problem of Rainforth et al. (2018, arXiv:1802.04537): z ~ N(mu, I), x | z ~ N(z, I) in 20 dimensions,
q(z | x) = N(A x + b, 2/3 I), 1024 data drawn from the model with mu ~ N(0, I), parameters at the optimum
A = I / 2, b = mu / 2 plus normal noise of standard deviation 0.01. The ratio is that of the gradient for one
datum, the first, in the parameters mu and b: the norm of the mean over the root of the summed variance.
Expected slopes of log ratio against log K: 1/2 for the model, -1/2 for the guide under the IWAE, not below 0
under DReG.

    python benchmarks/signal_to_noise.py [--repeats 100000] [--plot docs/signal_to_noise.png]
"""

import argparse
import math
import platform
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import yaml
from torch import Tensor, nn

from ppl_vae.infer import IWAE, DReG, Objective
from ppl_vae.infer.estimator import Estimator

DIM = 20
DRAWS = 2_000_000  # per pass, for memory


class Toy(nn.Module):
    """The programs, with a copy of the parameters for every repeat: gradients come apart."""

    def __init__(self, mu: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.mu, self.bias = nn.Parameter(mu), nn.Parameter(bias)
        self.weight = weight

    def model(self, x: Tensor) -> None:
        """Run p(z) p(x | z)."""
        pyro.module("toy", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Run q(z | x)."""
        pyro.module("toy", self)
        with pyro.plate("data", len(x), dim=-1):
            loc = x @ self.weight.mT + self.bias
            pyro.sample("z", dist.Normal(loc, math.sqrt(2 / 3)).to_event(1))


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first datum, mu, A and b."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true_mu = normal(DIM)
    data = true_mu + math.sqrt(2) * normal(1024, DIM)
    mu = data.mean(0)  # the optimum for these data
    noise = 0.01 * normal(DIM), 0.01 * normal(DIM, DIM), 0.01 * normal(DIM)
    return data[:1], mu + noise[0], torch.eye(DIM, dtype=torch.float64) / 2 + noise[1], mu / 2 + noise[2]


def ratios(estimator: Estimator, repeats: int, seed: int) -> dict[str, float]:
    """Return the signal-to-noise ratio of the gradient in mu (model) and b (guide).

    The share of the noise in the squared mean is subtracted.
    """
    x, mu, weight, bias = problem(seed)
    pyro.set_rng_seed(seed + estimator.num_particles)
    chunk = min(repeats, DRAWS // estimator.num_particles // 20)
    sums = {name: torch.zeros(2, DIM, dtype=torch.float64) for name in ("model", "guide")}
    done = 0
    while done < repeats:
        size = min(chunk, repeats - done)
        toy = Toy(mu.expand(size, -1).clone(), weight, bias.expand(size, -1).clone())
        Objective(toy.model, toy.guide, estimator).loss_and_grads(x.expand(size, -1))
        for name, gradient in (("model", toy.mu.grad), ("guide", toy.bias.grad)):
            if gradient is not None:
                sums[name] += torch.stack([gradient.sum(0), gradient.square().sum(0)])
        done += size
    found = {}
    for name, (total, squares) in sums.items():
        mean = total / repeats
        variance = (squares / repeats - mean.square()) * repeats / (repeats - 1)
        signal = mean.square().sum() - variance.sum() / repeats
        found[name] = float((signal.clamp(min=0.0) / variance.sum()).sqrt())
    return found


def slope(ks: list[int], values: list[float]) -> float:
    """Return the slope of the line through the points on logarithmic axes, by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (ks, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    """Measure, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", default="benchmarks/results/signal_to_noise.yaml")
    parser.add_argument("--plot", default="docs/signal_to_noise.png")
    settings = parser.parse_args()
    ks, start = [1, 3, 10, 30, 100, 300, 1000], time.perf_counter()
    found: dict[str, dict[str, list[float]]] = {}
    for name, make in (("IWAE", IWAE), ("DReG", DReG)):
        rows = [ratios(make(k), settings.repeats, settings.seed) for k in ks]
        found[name] = {role: [row[role] for row in rows] for role in ("model", "guide")}
    slopes = {
        f"{name}, {role}": round(slope(ks, values), 3)
        for name, roles in found.items()
        for role, values in roles.items()
    }
    record = {
        "set-up": "Rainforth et al. (2018) toy problem, 20 dimensions, gradient for one datum in mu and b",
        "repeats": settings.repeats,
        "seed": settings.seed,
        "K": ks,
        "signal_to_noise": {
            name: {role: [round(v, 5) for v in values] for role, values in roles.items()}
            for name, roles in found.items()
        },
        "slopes": slopes,
        "expected": "IWAE: model 1/2, guide -1/2 (within 0.1); DReG: guide not below 0",
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    print(yaml.safe_dump(record, sort_keys=False))
    for path in (settings.results, settings.plot):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(settings.results).write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    draw(ks, found, slopes, settings.plot)


def draw(
    ks: list[int], found: dict[str, dict[str, list[float]]], slopes: dict[str, float], path: str
) -> None:
    """Draw the ratios over K on logarithmic axes."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.4, 4.2), layout="constrained").subplots()
    looks = {"IWAE": ("o", "tab:blue"), "DReG": ("s", "tab:orange")}
    for name, roles in found.items():
        marker, color = looks[name]
        for role, values in roles.items():
            line = "-" if role == "guide" else "--"
            label = f"{name}, {role} (slope {slopes[f'{name}, {role}']:+.2f})"
            axes.plot(ks, values, line, marker=marker, color=color, label=label, alpha=0.9)
    axes.set(xscale="log", yscale="log", xlabel="draws K", ylabel="signal-to-noise ratio of the gradient")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
