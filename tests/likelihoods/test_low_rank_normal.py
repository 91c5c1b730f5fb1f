"""Tests of the normal likelihood with correlated noise."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae.likelihoods.low_rank_normal import LowRankNormal
from ppl_vae.networks import MLP


@pytest.mark.parametrize("event", [(1,), (5,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
def test_log_prob_is_that_of_the_full_covariance(event: tuple[int, ...], batch: tuple[int, ...]) -> None:
    likelihood = LowRankNormal(MLP(2, (4 * event[0], *event[1:]), hidden=4), rank=2).double()
    z, x = torch.randn(*batch, 2).double(), torch.randn(*batch, *event).double()
    out = likelihood.decoder(z).reshape(*batch, 4, -1)
    scale, columns = out[..., 1, :].exp(), out[..., 2:, :].mT
    factor = scale.unsqueeze(-1) * columns / math.sqrt(2)
    covariance = scale.square().diag_embed() + factor @ factor.mT
    normal = dist.MultivariateNormal(out[..., 0, :], covariance)
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == (batch, event)
    torch.testing.assert_close(distribution.log_prob(x), normal.log_prob(x.flatten(len(batch))))
    torch.testing.assert_close(distribution.mean.reshape(*batch, -1), normal.mean)
    torch.testing.assert_close(distribution.variance.reshape(*batch, -1), normal.variance)


def test_draws_have_the_covariance_in_the_shape_of_x() -> None:
    likelihood = LowRankNormal(MLP(2, (3, 2, 2), hidden=4), rank=1).double()
    distribution = likelihood(torch.randn(2).double())
    torch.manual_seed(0)
    n = 20_000
    x = distribution.sample((n,))
    assert x.shape == (n, 1, 2, 2)
    covariance = distribution.base_dist.covariance_matrix
    error = x.flatten(1).mT.cov() - covariance
    # The standard error of an entry is sqrt((C_ii C_jj + C_ij^2) / n).
    variance = covariance.diagonal()
    se = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert (error.abs() < 4 * se).all()
    assert ((x.mean(0) - distribution.mean).abs().flatten() < 4 * (variance / n).sqrt()).all()


@pytest.mark.parametrize("start", [-100.0, 100.0])
def test_the_smallest_and_the_largest_scales_in_float32(start: float) -> None:
    out = torch.randn(1, 6 * 30, requires_grad=True)
    offset = torch.zeros(6, 30)
    offset[1] = start
    likelihood = LowRankNormal(nn.Identity(), rank=4)
    distribution = likelihood(out + offset.flatten())
    base = distribution.base_dist
    torch.testing.assert_close(base.cov_diag.log(), torch.full((1, 30), math.copysign(14.0, start)))
    x = distribution.sample()
    exact = dist.LowRankMultivariateNormal(*(t.double() for t in (base.loc, base.cov_factor, base.cov_diag)))
    torch.testing.assert_close(
        distribution.log_prob(x).double(), exact.log_prob(x.double()), rtol=1e-4, atol=1e-2
    )
    distribution.log_prob(x.detach()).sum().backward()
    assert out.grad.isfinite().all()


def test_refuses_an_output_that_can_not_be_taken_apart() -> None:
    message = (
        r"^decoder: expected a multiple of 4 in the first event dimension \(mean, log-scale, columns\), "
        r"got output shape \(3, 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        LowRankNormal(MLP(2, (3, 4)), rank=2)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"^rank: expected a whole number above 0, got 0$"):
        LowRankNormal(MLP(2, 3), rank=0)


def test_training_reaches_the_maximum_of_a_normal_with_one_common_factor() -> None:
    # With three values a factor and a diagonal reach any covariance whose correlations have a positive
    # product, so that the maximum is the normal's with the covariance of the data.
    torch.manual_seed(0)
    factor, noise = torch.tensor([1.0, -0.8, 0.6]).double(), torch.tensor([0.5, 0.6, 0.7]).double()
    x = 2 + torch.randn(400, 1).double() * factor + torch.randn(400, 3).double() * noise
    likelihood = LowRankNormal(nn.Linear(1, 9), rank=1).double()
    z = torch.zeros(400, 1).double()
    optimizer = torch.optim.LBFGS(likelihood.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -likelihood(z).log_prob(x).mean()
        value.backward()
        return value.detach()

    optimizer.step(loss)
    covariance = x.mT.cov(correction=0)
    best = dist.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean()
    independent = dist.Normal(x.mean(0), covariance.diagonal().sqrt()).to_event(1).log_prob(x).mean()
    assert -float(loss()) == pytest.approx(float(best), abs=1e-5)
    assert best > independent + 0.2


def test_density_keeps_its_digits_in_float32_where_noise_is_shared() -> None:
    torch.manual_seed(0)
    likelihood, z = LowRankNormal(nn.Linear(2, 4 * 50), rank=2), torch.randn(5, 2)
    with torch.no_grad():
        likelihood.decoder.bias[100:] *= 1000.0  # columns
    likelihood.decoder = nn.Sequential(likelihood.decoder, nn.Unflatten(-1, (4 * 50,)))
    x = likelihood(z).sample()
    single = likelihood(z).log_prob(x)
    double = likelihood.double()(z.double()).log_prob(x.double())
    torch.testing.assert_close(single.double(), double, rtol=0, atol=0.01)  # torch's misses by nats
