"""Tests of the full-rank guide."""

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from densities import (
    correlated_model,
    data,
    gap,
    log_prob_by_jacobian,
    train,
)
from torch import Tensor, nn

from ppl_vae.distributions import FullRankNormal
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.full_rank import FullRankGuide
from ppl_vae.infer import log_weights
from ppl_vae.networks import MLP


def make(latent: int = 2) -> FullRankGuide:
    return FullRankGuide(MLP(4, hidden=5), latent).double()


def test_posterior_is_the_normal_of_the_head() -> None:
    guide, x = make(3), data()
    out = guide.head(guide.encoder(x))
    assert out.shape == (3, 3 + 3 + 3)
    factor = torch.eye(3, dtype=torch.float64).repeat(3, 1, 1)
    for column, (i, j) in enumerate([(1, 0), (2, 0), (2, 1)]):
        factor[:, i, j] = out[:, 6 + column] / math.sqrt(3)
    factor = out[:, 3:6, None].exp() * factor
    posterior = guide.posterior(x)
    assert (posterior.batch_shape, posterior.event_shape) == ((3,), (3,))
    torch.testing.assert_close(posterior.mean, out[:, :3])
    torch.testing.assert_close(posterior.scale_tril, factor)
    torch.testing.assert_close(posterior.covariance_matrix, factor @ factor.mT)


@pytest.mark.parametrize("latent", [1, 2, 5])
def test_any_number_of_dimensions(latent: int) -> None:
    guide, x = make(latent), data()
    assert guide(x).shape == (3, latent)
    assert guide.posterior(x).log_prob(guide(x)).shape == (3,)


def test_log_prob_is_the_change_of_variables() -> None:
    posterior, noise = make(3).posterior(data()), torch.randn(3, dtype=torch.float64)
    base = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    for i in range(3):
        with torch.no_grad():
            loc, factor = posterior.mean[i].clone(), posterior.scale_tril[i].clone()

        def draw(noise: Tensor, loc: Tensor = loc, factor: Tensor = factor) -> Tensor:
            return loc + factor @ noise

        expected = log_prob_by_jacobian(draw, base, noise)
        torch.testing.assert_close(posterior.log_prob(draw(noise).expand(3, 3))[i], expected)


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped(start: float, clamped: float) -> None:
    guide = make()
    nn.init.zeros_(guide.head.weight)
    nn.init.constant_(guide.head.bias, start)
    diagonal = guide.posterior(data()).scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.full((3, 2), math.exp(clamped), dtype=torch.float64))


def test_closes_the_gap_of_a_correlated_posterior_which_mean_field_cannot() -> None:
    model = correlated_model()
    x = model(None, size=64).detach()
    precision = torch.linalg.inv(model.posterior(x[:1]).covariance_matrix[0])
    full = FullRankGuide(nn.Linear(5, 6), 2).double()
    train(model, full, x)
    assert gap(model, full, x) < 0.01
    # the evidence, too: log p(x) less the ELBO, whose weights are constant at the exact posterior
    weights = log_weights(model, full, x, num_particles=400)
    assert abs((model.log_prob(x) - weights).mean()) < 0.01
    # the best factorised normal has the precisions of the diagonal
    known = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert known > 0.5
    field = MeanFieldGuide(nn.Linear(5, 6), 2).double()
    train(model, field, x)
    assert abs(gap(model, field, x) - known) < 0.02


def test_wrong_arguments() -> None:
    encoder: Any = MLP(4, hidden=5)
    with pytest.raises(ValueError, match=r"^latent_dim: expected a whole number above 0, got 0$"):
        FullRankGuide(encoder, 0)
    with pytest.raises(TypeError, match=r"^latent_dim: expected a whole number above 0, got 2\.5$"):
        FullRankGuide(encoder, 2.5)
    with pytest.raises(ValueError, match=r"^features: expected a whole number above 0, got 0$"):
        FullRankGuide(encoder, 2, features=0)
    with pytest.raises(TypeError, match=r"^features: expected the number of features that Sequential gives"):
        FullRankGuide(nn.Sequential(nn.Linear(3, 8)), 2)


def test_draws_are_scored_right_where_the_factors_inverse_is_huge() -> None:
    """In float32: solving for the noise is wrong by tens of nats here (seed 0)."""
    torch.manual_seed(0)
    d = 50
    factor = torch.eye(d) + torch.randn(d, d).tril(-1) * 10 / d**0.5
    normal = FullRankNormal(torch.zeros(d, requires_grad=True), scale_tril=factor)
    z = normal.rsample((100,))
    own = normal.log_prob(z)
    entropy = normal.entropy()
    assert (own.mean() + entropy).abs() < 5 * own.std() / 10
    assert (normal.log_prob(z.clone()).mean() + entropy).abs() > 10


def test_the_density_of_a_draw_without_gradients_has_them() -> None:
    loc = torch.zeros(2, requires_grad=True)
    normal = FullRankNormal(loc, scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    z = normal.sample()
    normal.log_prob(z).backward()
    torch.testing.assert_close(loc.grad, torch.linalg.solve(normal.covariance_matrix, z).detach())
