"""Flow guides on a posterior in the shape of a banana, whose evidence is known by quadrature."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import flows
from ppl_vae.guides.flow import FlowGuide


class Banana(nn.Module):
    """x ~ N(z2 - z1^2 + 1, 0.3) at x = 0 under a standard normal prior."""

    def log_joint(self, z: Tensor) -> Tensor:
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + dist.Normal(z[..., 1] - z[..., 0].square() + 1, 0.3).log_prob(torch.zeros_like(prior))

    def log_evidence(self) -> Tensor:
        axis = torch.linspace(-8, 8, 1601, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        return self.log_joint(grid).flatten().logsumexp(0) + 2 * (axis[1] - axis[0]).log()


def gap_of(q: Any, draws: int = 20_000) -> tuple[float, float]:
    """Return log p(x) - ELBO and its standard error."""
    with torch.no_grad():
        z = q.sample((draws,))
        terms = q.log_prob(z) - Banana().log_joint(z)
    return float(Banana().log_evidence() + terms.mean()), float(terms.std() / math.sqrt(draws))


def best_gaussian() -> float:
    """Return the least gap of a Gaussian, from several starts."""
    axis = torch.linspace(-6, 6, 61, dtype=torch.float64)
    noise = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    weights = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1).softmax(0)
    gaps = []
    for start in (0.1, 1.0, -1.0):
        p = torch.tensor([start, 0.0, -0.5, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([p], max_iter=100, line_search_fn="strong_wolfe")

        def loss(p: Tensor = p, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            first = p[0] + p[2].exp() * noise[:, 0]
            second = p[1] + p[3] * noise[:, 0] + p[4].exp() * noise[:, 1]
            entropy = 1 + math.log(2 * math.pi) + p[2] + p[4]
            value = -(weights * Banana().log_joint(torch.stack([first, second], -1))).sum() - entropy
            value.backward()
            return value

        optimizer.step(loss)
        gaps.append(float(Banana().log_evidence() + loss().detach()))
    return min(gaps)


def trained(name: str, steps: int = 200) -> FlowGuide:
    name, *kind = name.split("-")
    options: dict[str, Any] = {"kind": kind[0]} if kind else {}
    if name == "Continuous":
        options |= {"hidden": 16, "steps": 3}
    elif name.endswith(("Autoregressive", "Coupling")):
        options["hidden"] = 32
    flow = getattr(flows, name)(2, 4, **options)
    guide = FlowGuide(nn.Linear(1, 4), flow).double()
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    x = torch.zeros(1, 1, dtype=torch.float64)
    with pyro.validation_enabled(False):
        for _ in range(steps):
            q = guide.posterior(x)
            z = q.rsample((32,))
            optimizer.zero_grad()
            (q.log_prob(z) - Banana().log_joint(z)).mean().backward()
            nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
            optimizer.step()
            scheduler.step()
    return guide


def test_best_gaussian_of_the_banana() -> None:
    assert best_gaussian() == pytest.approx(0.75357, abs=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in (*flows.__all__, "Sylvester-householder") if name != "Householder"]
)
def test_flows_beat_every_gaussian_on_the_banana(name: str) -> None:
    # The best Gaussian's gap is 0.7536, as above.
    gap, error = gap_of(trained(name).posterior(torch.zeros(1, 1, dtype=torch.float64)))
    assert gap > -4 * error
    assert gap < 0.7536 - 4 * error


def test_an_inverse_autoregressive_flow_is_well_on_its_way_after_200_steps() -> None:
    # From this seed the gap is 0.17, with "elu" for "relu" 0.43.
    torch.manual_seed(1)
    gap, error = gap_of(trained("InverseAutoregressive").posterior(torch.zeros(1, 1, dtype=torch.float64)))
    assert gap < 0.3 - 4 * error


def test_a_householder_flow_is_a_gaussian() -> None:
    gap, error = gap_of(trained("Householder").posterior(torch.zeros(1, 1, dtype=torch.float64)))
    assert gap > 0.7536 - 4 * error
