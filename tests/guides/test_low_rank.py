"""Tests of the low-rank guide."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from densities import (
    correlated_model,
    data,
    gap,
    train,
)
from torch import Tensor, nn

from ppl_vae.guides.low_rank import LowRankGuide
from ppl_vae.infer import log_weights
from ppl_vae.networks import MLP


def make(latent: int = 2, rank: int = 1) -> LowRankGuide:
    return LowRankGuide(MLP(4, hidden=5), latent, rank).double()


def test_posterior_is_the_normal_of_the_head() -> None:
    guide, x = make(3, 2), data()
    out = guide.head(guide.encoder(x))
    assert out.shape == (3, 3 + 3 + 3 * 2)
    scale = out[:, 3:6].exp()
    factor = scale.unsqueeze(-1) * out[:, 6:].reshape(3, 3, 2) / math.sqrt(2)
    posterior = guide.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((3,), (3,))
    torch.testing.assert_close(posterior.mean, out[:, :3])
    covariance = (scale**2).diag_embed() + factor @ factor.mT
    torch.testing.assert_close(posterior.covariance_matrix, covariance)
    normal = dist.MultivariateNormal(posterior.mean, covariance)
    z = torch.randn(7, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(posterior.log_prob(z), normal.log_prob(z))


@pytest.mark.parametrize(("latent", "rank"), [(1, 1), (2, 1), (5, 3), (5, 5)])
def test_any_number_of_dimensions_and_columns(latent: int, rank: int) -> None:
    guide, x = make(latent, rank), data()
    assert guide(x).shape == (3, latent)
    assert guide.posterior(x).log_prob(guide(x)).shape == (3,)


def parameters(posterior: Any) -> tuple[Tensor, Tensor, Tensor]:
    return posterior.loc, posterior.cov_factor, posterior.cov_diag


@pytest.mark.parametrize("start", [-7.0, 7.0])
def test_the_smallest_and_the_largest_scales_in_float32(start: float) -> None:
    guide = LowRankGuide(MLP(4, hidden=5), 30, 4)
    nn.init.constant_(guide.head.bias[30:60], start)
    posterior = guide.posterior(torch.randn(3, 4))
    z = posterior.rsample((100,))
    exact = dist.LowRankMultivariateNormal(*(t.double() for t in parameters(posterior)))
    torch.testing.assert_close(
        posterior.log_prob(z).double(), exact.log_prob(z.double()), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("log_scale", [-7.0, 7.0])
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1000.0])
def test_densities_keep_their_digits_in_float32(log_scale: float, ratio: float) -> None:
    # torch's LowRankMultivariateNormal loses all of them at a ratio of 1000
    torch.manual_seed(0)
    guide = LowRankGuide(MLP(4), 50, 5)
    outputs = torch.randn(20, 50 * 7)
    outputs[:, 50:100] = log_scale
    outputs[:, 100:] *= ratio  # of W to D's root
    posterior = guide.family(outputs)
    exact = dist.LowRankMultivariateNormal(*(t.double() for t in parameters(posterior)))
    for z in (posterior.rsample((50,)), torch.randn(50, 20, 50)):
        torch.testing.assert_close(
            posterior.log_prob(z).double(), exact.log_prob(z.double()), rtol=1e-4, atol=0
        )


def test_density_of_an_expanded_posterior_and_its_gradients_are_torchs() -> None:
    guide, x, found = make(4, 2), data(), []
    z = torch.randn(5, 3, 4).double()
    for own in (True, False):
        posterior = guide.posterior(x)
        q = posterior if own else dist.LowRankMultivariateNormal(*parameters(posterior))
        log_prob = q.expand((5, 3)).log_prob(z)
        found.append([log_prob, *torch.autograd.grad(log_prob.sum(), list(guide.parameters()))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped(start: float, clamped: float) -> None:
    guide = make()
    nn.init.zeros_(guide.head.weight)
    nn.init.constant_(guide.head.bias, start)
    expected = torch.full((3, 2), math.exp(2 * clamped), dtype=torch.float64)
    torch.testing.assert_close(guide.posterior(data()).cov_diag, expected)


def test_closes_the_gap_of_a_correlated_posterior() -> None:
    model = correlated_model()
    x = model(None, size=64).detach()
    low = LowRankGuide(nn.Linear(5, 6), 2, 1).double()
    train(model, low, x)
    assert gap(model, low, x) < 0.01
    # the evidence, too: log p(x) less the ELBO, whose weights are constant at the exact posterior
    weights = log_weights(model, low, x, num_particles=400)
    assert abs((model.log_prob(x) - weights).mean()) < 0.01


def test_wrong_arguments() -> None:
    encoder: Any = MLP(4, hidden=5)
    with pytest.raises(ValueError, match=r"^latent_dim: expected a whole number above 0, got 0$"):
        LowRankGuide(encoder, 0, 1)
    with pytest.raises(TypeError, match=r"^latent_dim: expected a whole number above 0, got 2\.5$"):
        LowRankGuide(encoder, 2.5, 1)
    with pytest.raises(ValueError, match=r"^rank: expected a whole number above 0, got 0$"):
        LowRankGuide(encoder, 2, 0)
    with pytest.raises(ValueError, match=r"^rank: expected at most latent_dim, 2, got 3$"):
        LowRankGuide(encoder, 2, 3)
    with pytest.raises(ValueError, match=r"^features: expected a whole number above 0, got 0$"):
        LowRankGuide(encoder, 2, 1, features=0)
    with pytest.raises(TypeError, match=r"^features: expected the number of features that Sequential gives"):
        LowRankGuide(nn.Sequential(nn.Linear(3, 8)), 2, 1)
