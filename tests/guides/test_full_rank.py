"""Tests of the full-rank guide."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import (
    gradients_reach_every_parameter,
    integral,
    log_prob_by_jacobian,
    moments_agree,
    steps_compiled_and_plain,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.distributions import FullRankNormal
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.guides.full_rank import FullRankGuide
from ppl_vae.infer import IWAE, KL_ELBO, STL_ELBO, SVI, DReG, log_weights, tracing
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

ELBOS = {
    "DReG": lambda: DReG(3),
    "IWAE": lambda: IWAE(3),
    "KL_ELBO": KL_ELBO,
    "STL_ELBO": STL_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "Trace_ELBO": Trace_ELBO,
}


def make(latent: int = 2) -> FullRankGuide:
    return FullRankGuide(MLP(4, hidden=5), latent).double()


def data(n: int = 3) -> Tensor:
    return torch.randn(n, 4, dtype=torch.float64)


def correlated_model() -> LinearGaussian:
    """Return a model whose posterior has correlation -0.86."""
    model = LinearGaussian(2, 5, scale=0.7).double()
    weight = torch.tensor([[1.2, 0.9], [0.8, 1.1], [1.0, 1.0], [-0.7, -0.4], [0.3, 0.5]])
    model.weight.data.copy_(weight)
    return model.requires_grad_(False)


def train(model: nn.Module, guide: nn.Module, x: Tensor, steps: int = 500) -> None:
    """Take steps at a rate that goes to zero; the sticking landing has no noise at the exact posterior."""
    optim = torch.optim.Adam(guide.parameters(), lr=0.03)
    svi = SVI(model, guide, optim, STL_ELBO())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in range(steps):
        svi.step(x)
        schedule.step()


def gap(model: LinearGaussian, guide: nn.Module, x: Tensor) -> Tensor:
    """Return the mean KL(q || exact posterior), in closed form."""
    q, p = guide.posterior(x), model.posterior(x)
    if not isinstance(q, dist.MultivariateNormal):
        q = dist.MultivariateNormal(q.mean, q.variance.diag_embed())
    return torch.distributions.kl_divergence(q, p).mean()


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


def test_density_integrates_to_one() -> None:
    posterior = make().posterior(data())
    torch.testing.assert_close(integral(posterior), torch.ones(3).double(), atol=1e-3, rtol=0)


def test_draws_are_of_the_density() -> None:
    assert moments_agree(make().posterior(data()))


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


def test_gradients_reach_every_parameter() -> None:
    assert gradients_reach_every_parameter(make(), data()) == []


def test_particles_and_batch_are_their_loop_and_the_encoder_runs_once() -> None:
    guide, x, rows = make(), data(), []
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        z = guide(x)
    assert z.shape == (7, 3, 2)
    assert rows == [3]
    log_prob = guide.posterior(x).log_prob(z)
    for k in range(7):
        for i in range(3):
            torch.testing.assert_close(log_prob[k, i], guide.posterior(x[i : i + 1]).log_prob(z[k, i])[0])


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped(start: float, clamped: float) -> None:
    guide = make()
    nn.init.zeros_(guide.head.weight)
    nn.init.constant_(guide.head.bias, start)
    diagonal = guide.posterior(data()).scale_tril.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal, torch.full((3, 2), math.exp(clamped), dtype=torch.float64))


def test_kl_elbo_takes_the_closed_form_which_agrees_with_draws() -> None:
    model, guide, x = LinearGaussian(2, 4).double(), make(), data()
    posterior = guide.posterior(x)
    prior = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    kl = torch.distributions.kl_divergence(posterior, prior)
    z = posterior.sample((20_000,))
    drawn = posterior.log_prob(z) - prior.log_prob(z)
    assert ((drawn.mean(0) - kl).abs() < 4 * drawn.std(0) / 20_000**0.5).all()
    objective = SVI(model, guide, torch.optim.Adam, KL_ELBO(5)).objective
    pyro.set_rng_seed(3)
    loss = objective.evaluate_loss(x)
    pyro.set_rng_seed(3)
    with pyro.plate("particles", 5, dim=-2):
        z = guide(x)
    likelihood = dist.Normal(z @ model.weight.mT + model.bias, model.log_scale.exp()).to_event(1)
    torch.testing.assert_close(loss, kl.sum() - likelihood.log_prob(x).mean(0).sum())


@pytest.mark.parametrize("name", ELBOS)
def test_trains_with_every_estimator(name: str) -> None:
    model, guide, x = LinearGaussian(2, 4).double().requires_grad_(False), make(), data(8)
    before = gap(model, guide, x)
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.02), ELBOS[name]())
    for _ in range(80):
        svi.step(x)
    assert gap(model, guide, x) < 0.6 * before


@pytest.mark.parametrize("elbo", ["DReG", "KL_ELBO", "Trace_ELBO"])
def test_compiled_steps_are_plain_steps(elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    for one, two in zip(*steps_compiled_and_plain(make, ELBOS[elbo]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_is_traced() -> None:
    guide, x = make(), data()
    z = torch.randn(7, 3, 2, dtype=torch.float64)
    with pyro.validation_enabled(False):
        graph = make_fx(lambda x: guide.posterior(x).log_prob(z))(x)
        other = data()
        torch.testing.assert_close(graph(other), guide.posterior(other).log_prob(z))


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
