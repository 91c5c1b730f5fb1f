"""Tests of the Gaussian mixture prior."""

import re
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppl_vae.priors.gaussian_mixture import GaussianMixture


def same_family(prior: GaussianMixture) -> Any:
    """Return the mixture as torch has it, in float64."""
    normals = dist.Normal(prior.loc.double(), prior.log_scale.double().exp()).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=prior.logits.double()), normals)


def somewhere(latent: int, components: int) -> GaussianMixture:
    prior = GaussianMixture(latent, components)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += torch.randn_like(parameter)
    return prior


@given(
    batch=st.lists(st.integers(1, 3), max_size=3),
    latent=st.integers(1, 5),
    components=st.integers(1, 6),
)
def test_is_torchs_mixture(batch: list[int], latent: int, components: int) -> None:
    prior = somewhere(latent, components).double()
    z = 2 * torch.randn(*batch, latent).double()
    expected = same_family(prior)
    torch.testing.assert_close(prior().log_prob(z), expected.log_prob(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prior().mean, expected.mean)
    torch.testing.assert_close(prior().variance, expected.variance)


def test_gradients_are_those_of_torchs_mixture() -> None:
    prior = somewhere(4, 6).double()
    z = torch.randn(7, 4).double().requires_grad_()
    inputs = [z, *prior.parameters()]
    found = torch.autograd.grad(prior().log_prob(z).sum(), inputs)
    expected = torch.autograd.grad(same_family(prior).log_prob(z).sum(), inputs)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scale", [0.3, 0.05, 0.01, 0.001])
def test_float32_density_has_the_digits_of_float32_for_narrow_components(scale: float) -> None:
    prior = GaussianMixture(40, 200)
    with torch.no_grad():
        prior.loc *= 3
        prior.log_scale.fill_(scale).log_().add_(torch.rand(200, 40))
    z = prior().sample((100,))
    exact = same_family(prior).log_prob(z.double())
    found = prior().log_prob(z)
    assert found.dtype == torch.float32
    assert ((found - exact).abs() < 1e-6 * (100 + exact.abs())).all()


def test_starts_near_the_standard_normal_and_spread_out() -> None:
    prior = GaussianMixture(3, 2000)()
    torch.testing.assert_close(prior.mean, torch.zeros(3), atol=0.08, rtol=0)
    torch.testing.assert_close(prior.variance, torch.ones(3), atol=0.1, rtol=0)
    prior = GaussianMixture(3, 5)
    assert torch.pdist(prior.loc).min() > 0.1
    torch.manual_seed(4)
    first = GaussianMixture(3, 5).loc
    torch.manual_seed(4)
    assert torch.equal(first, GaussianMixture(3, 5).loc)


def test_scales_are_clamped() -> None:
    prior = GaussianMixture(2, 3)
    with torch.no_grad():
        prior.log_scale.copy_(torch.tensor([[-9.0, 9.0]]).expand(3, 2))
    torch.testing.assert_close(prior().scale, torch.tensor([-7.0, 7.0]).exp().expand(3, 2))


def two_clusters(n: int = 600) -> Tensor:
    side = torch.bernoulli(torch.full((n, 1), 0.25)) * 2 - 1
    return side * torch.tensor([3.0, -2.0]) + torch.tensor([0.5, 0.2]) * torch.randn(n, 2)


def test_from_samples_finds_the_clusters() -> None:
    state = torch.get_rng_state()
    z = two_clusters(4000).double()
    torch.set_rng_state(state)
    prior = GaussianMixture.from_samples(two_clusters(4000).double(), 2)
    assert torch.equal(prior.loc, GaussianMixture.from_samples(z, 2).loc)
    order = prior.loc[:, 0].argsort()
    loc = torch.tensor([[-3.0, 2.0], [3.0, -2.0]]).double()
    # 4000 draws, a quarter of them in one cluster: 5 standard errors of the least of them
    torch.testing.assert_close(prior.loc[order], loc, atol=5 * 0.5 / 1000**0.5, rtol=0)
    weights = prior.logits.softmax(-1)[order]
    torch.testing.assert_close(
        weights, torch.tensor([0.75, 0.25]).double(), atol=5 * (0.1875 / 4000) ** 0.5, rtol=0
    )
    scales = prior.log_scale.exp()[order]
    torch.testing.assert_close(
        scales, torch.tensor([[0.5, 0.2]] * 2).double(), atol=5 * 0.5 / 2000**0.5, rtol=0
    )


def test_from_samples_leaves_the_stream_alone_and_takes_the_dtype() -> None:
    z = two_clusters()
    state = torch.get_rng_state()
    assert GaussianMixture.from_samples(z, 3, seed=5).loc.dtype == torch.float32
    assert torch.equal(state, torch.get_rng_state())
    assert GaussianMixture.from_samples(z.double(), 3).loc.dtype == torch.float64


@pytest.mark.parametrize(
    ("z", "components", "error", "message"),
    [
        (torch.zeros(5), 2, ValueError, "z: expected draws [n, latent], got shape [5]"),
        (torch.zeros(5, 2, dtype=torch.long), 2, TypeError, "z: expected a tensor of draws [n, latent]"),
        (torch.full((5, 2), torch.nan), 2, ValueError, "z: expected finite draws"),
        (torch.zeros(5, 2), 6, ValueError, "components: expected at most the number of draws, 5, got 6"),
        (torch.zeros(5, 2), 0, ValueError, "components: expected a whole number above 0"),
    ],
)
def test_samples_that_it_can_not_be_fitted_to(
    z: Tensor, components: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        GaussianMixture.from_samples(z, components)


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (2, -1)])
def test_wrong_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected a whole number above 0"):
        GaussianMixture(*sizes)
