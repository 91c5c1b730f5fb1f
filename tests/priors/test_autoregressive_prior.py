"""Tests of the autoregressive prior."""

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae.priors.autoregressive_prior import AutoregressivePrior


def away(latent: int, components: int = 1) -> AutoregressivePrior:
    """Return a prior away from its start."""
    prior = AutoregressivePrior(latent, hidden=(12, 12), components=components).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return prior


@pytest.mark.parametrize("components", [1, 3])
def test_each_conditional_density_depends_on_all_dimensions_before_and_on_no_other(components: int) -> None:
    prior = away(5, components)

    def parameters(z: Tensor) -> Tensor:
        return torch.cat([t for t in prior.conditionals(z) if t is not None], -1).sum(-1)

    jacobian = torch.autograd.functional.jacobian(parameters, torch.randn(5).double())
    before = torch.ones(5, 5).tril(-1).bool()
    assert not jacobian[~before].any()
    assert (jacobian[before] != 0).all()


def test_density_is_the_change_of_variables_of_a_draw() -> None:
    prior = away(4)
    noise = torch.randn(4).double()

    def draw(noise: Tensor) -> Tensor:
        z: list[Tensor] = []
        for i in range(4):
            loc, scale, _ = prior.conditionals(torch.stack([*z, *[noise.new_zeros(())] * (4 - i)]))
            z.append(loc[i, 0] + scale[i, 0] * noise[i])
        return torch.stack(z)

    jacobian = torch.autograd.functional.jacobian(draw, noise)
    assert not jacobian.triu(1).any()
    base = dist.Normal(torch.zeros(4).double(), 1.0).to_event(1)
    expected = base.log_prob(noise) - torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(prior().log_prob(draw(noise)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("components", [1, 3])
def test_density_is_the_product_of_the_conditional_densities(components: int) -> None:
    prior, z = away(3, components), torch.randn(6, 3).double()
    loc, scale, log_weights = prior.conditionals(z)
    expected = torch.zeros(6).double()
    for i in range(3):
        normals = dist.Normal(loc[:, i], scale[:, i]).log_prob(z[:, i : i + 1]).exp()
        weights = torch.ones(1).double() if log_weights is None else log_weights[:, i].exp()
        expected += (weights * normals).sum(-1).log()
    torch.testing.assert_close(prior().log_prob(z), expected, rtol=1e-10, atol=1e-10)


def test_scoring_takes_one_pass_and_sampling_one_for_each_dimension() -> None:
    prior, calls = away(4), []
    prior.network.register_forward_hook(lambda *args: calls.append(1))
    prior().log_prob(torch.randn(5, 4).double())
    assert len(calls) == 1
    prior().sample((7,))
    assert len(calls) == 5


def test_starts_near_the_standard_normal() -> None:
    z = torch.randn(200, 6)
    expected = dist.Normal(torch.zeros(6), 1.0).to_event(1).log_prob(z)
    found = AutoregressivePrior(6)().log_prob(z)
    assert (found - expected).abs().mean() < 1.0


def test_one_dimension_is_a_density_of_free_parameters() -> None:
    prior = AutoregressivePrior(1, components=3).double()
    axis = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    total = prior().log_prob(axis.unsqueeze(-1)).exp().sum() * 0.01
    torch.testing.assert_close(total, torch.ones(()).double(), atol=1e-6, rtol=0)
    prior().log_prob(prior().sample((5,))).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in prior.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim: expected a whole number above 0"),
        ({"components": 0}, "components: expected a whole number above 0"),
        ({"hidden": (3, 0)}, r"hidden\[1\]: expected a whole number above 0"),
        ({"activation": "rellu"}, r"activation: unknown 'rellu' \(did you mean 'relu'\?\)"),
    ],
)
def test_wrong_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoregressivePrior(**({"latent_dim": 2} | options))
