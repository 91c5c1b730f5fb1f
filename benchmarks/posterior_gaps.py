"""What each guide can bend to: ELBO gaps on two exact posteriors in two dimensions, evidence by quadrature.

The banana: z ~ N(0, I), x ~ N(z_2 - z_1^2 + 1, 0.3) at x = 0. Two modes: z ~ N(0, I), x_1 ~ N(z_1^2 +
0.2 z_1, 0.5), x_2 ~ N(z_2 + 0.3 z_1, 0.5) at x = (1.5, 0.2); the modes have weights 0.42 and 0.58. There is
nothing to learn but the guide, for one datum: a gap, log p(x) - ELBO in nats, is what the family and its
training leave, KL(q || p(z | x)). Steps, rates and the limit of the gradient's norm are the same for all
guides, nothing is tuned for one; the table has the median and the range over seeds.

    python benchmarks/posterior_gaps.py [--results benchmarks/results/posterior_gaps.yaml]
"""

import argparse
import functools
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
import yaml
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import flows
from ppl_vae.guides import (
    FlowGuide,
    FullRankGuide,
    LowRankGuide,
    MeanFieldGuide,
    MixtureGuide,
    SemiAmortizedGuide,
)
from ppl_vae.infer import KL_ELBO, SVI, log_weights
from ppl_vae.program import Program

HALF_WIDTH, POINTS = 6.0, 601


class Banana(Program):
    """A posterior in the shape of a banana."""

    x = (0.0,)

    def forward(self, x: Tensor) -> Tensor:
        """Run the program."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = (z[..., 1] - z[..., 0].square() + 1).unsqueeze(-1)
            return pyro.sample("x", dist.Normal(loc, 0.3).to_event(1), obs=x)


class TwoModes(Program):
    """A posterior with two modes."""

    x = (1.5, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        """Run the program."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = torch.stack([z[..., 0] * (z[..., 0] + 0.2), z[..., 1] + 0.3 * z[..., 0]], -1)
            return pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


Make = Callable[[nn.Module], nn.Module]


def flow_guide(name: str, **options: Any) -> Make:
    """Return what makes a guide with a flow of four layers."""
    if name.endswith(("Autoregressive", "Coupling")):
        options["hidden"] = 32
    if name == "Continuous":
        options |= {"hidden": 32, "steps": 4}
    return lambda model: FlowGuide(nn.Linear(len(model.x), 4), getattr(flows, name)(2, 4, **options))


def of_encoder(guide: Any, *args: Any, **options: Any) -> Make:
    """Return what makes a guide with a linear encoder."""
    return lambda model: guide(nn.Linear(len(model.x), 4), 2, *args, **options)


GUIDES: dict[str, Make] = {
    "MeanFieldGuide": of_encoder(MeanFieldGuide),
    "FullRankGuide": of_encoder(FullRankGuide),
    "LowRankGuide, rank 1": of_encoder(LowRankGuide, rank=1),
    "MixtureGuide, 2 components": of_encoder(MixtureGuide, 2),
    "MixtureGuide, 4 components": of_encoder(MixtureGuide, 4),
    **{f"FlowGuide, {name}": flow_guide(name) for name in flows.__all__},
    "FlowGuide, Sylvester, householder": flow_guide("Sylvester", kind="householder"),
    "SemiAmortizedGuide, mean-field": lambda model: SemiAmortizedGuide(
        of_encoder(MeanFieldGuide)(model), model
    ),
}
SHOWN = ("MeanFieldGuide", "FullRankGuide", "MixtureGuide, 2 components", "FlowGuide, InverseAutoregressive")


def exact_density(model: Program) -> tuple[Tensor, Tensor, float]:
    """Return the grid's axis, the posterior's density on it, and log p(x)."""
    axis = torch.linspace(-HALF_WIDTH, HALF_WIDTH, POINTS, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    x = torch.tensor([model.x], dtype=torch.float64).expand(len(z), -1)
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    log_joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    evidence = float(log_joint.logsumexp(0)) + 2 * math.log(float(axis[1] - axis[0]))
    return axis, (log_joint - evidence).exp().reshape(POINTS, POINTS), evidence


def train(make: Make, model: Program, seed: int, steps: int) -> nn.Module:
    """Return a trained guide."""
    torch.manual_seed(seed)
    guide = make(model).double()
    x = torch.tensor([model.x], dtype=torch.float64).expand(32, -1)
    svi = SVI(
        model, guide, functools.partial(torch.optim.Adam, lr=0.02), KL_ELBO(), clip_norm=1.0, per_datum=True
    )
    svi.setup(x)
    schedule = torch.optim.lr_scheduler.OneCycleLR(svi.optim, 0.02, total_steps=steps)  # type: ignore[arg-type]
    with pyro.validation_enabled(False):
        for _ in range(steps):
            svi.step(x)
            schedule.step()
    return guide


def draw(axes: Any, shown: dict[tuple[str, str], Tensor], exact: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Draw guides' draws over the contours of the exact posteriors."""
    for i, (posterior, (axis, density)) in enumerate(exact.items()):
        for j, name in enumerate(SHOWN):
            z, ax = shown[posterior, name], axes[i][j]
            ax.scatter(*z.T, s=2, alpha=0.3, color="tab:blue", rasterized=True)
            top = float(density.max())
            ax.contour(
                axis, axis, density.T, [0.02 * top, 0.2 * top, 0.6 * top], colors="black", linewidths=0.8
            )
            ax.set(xlim=(-3, 3), ylim=(-3, 4), xticks=[], yticks=[])
            if i == 0:
                ax.set_title(name.removeprefix("FlowGuide, "), fontsize=9)
            if j == 0:
                ax.set_ylabel(posterior, fontsize=9)


def main() -> None:
    """Train, measure, print, record and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", default="benchmarks/results/posterior_gaps.yaml")
    parser.add_argument("--figure", default="docs/posterior_gaps.png")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "set-up": f"gaps in nats, median (least, largest) of {settings.seeds} seeds; {settings.steps} steps "
        "of Adam, one-cycle rates up to 0.02, 32 draws a step, gradient norm at most 1; flows of four "
        "layers, networks of 32",
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }
    shown: dict[tuple[str, str], Tensor] = {}
    exact: dict[str, tuple[Tensor, Tensor]] = {}
    for posterior, model in (("banana", Banana()), ("two modes", TwoModes())):
        axis, density, evidence = exact_density(model)
        exact[posterior] = axis, density
        x = torch.tensor([model.x], dtype=torch.float64)
        rows: dict[str, str] = {}
        for name, make in GUIDES.items():
            gaps = []
            for seed in range(settings.seeds):
                guide = train(make, model, seed, settings.steps)
                with torch.no_grad():
                    weights = log_weights(model, guide, x, num_particles=20_000)
                    gaps.append(evidence - float(weights.mean()))
                    if seed == 0 and name in SHOWN:
                        shown[posterior, name] = guide(x.expand(2000, -1))
            rows[name] = f"{statistics.median(gaps):.3f} ({min(gaps):.3f}, {max(gaps):.3f})"
            print(f"{posterior}: {name}: {rows[name]}", flush=True)
        record[posterior] = {"log_evidence": round(evidence, 4), "gaps": rows}
    path = Path(settings.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(record, sort_keys=False, width=100))
    figure, axes = plt.subplots(2, len(SHOWN), figsize=(2.4 * len(SHOWN), 5), layout="constrained")
    draw(axes, shown, exact)
    figure.savefig(settings.figure, dpi=110)
    print(f"recorded in {path}, drawn in {settings.figure}")


if __name__ == "__main__":
    main()
