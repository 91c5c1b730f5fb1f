"""Tests of the low-rank guide."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import (
    gradients_reach_every_parameter,
    integral,
    moments_agree,
    steps_compiled_and_plain,
)
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.guides.low_rank import LowRankGuide
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


def make(latent: int = 2, rank: int = 1) -> LowRankGuide:
    return LowRankGuide(MLP(4, hidden=5), latent, rank).double()


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
    return torch.distributions.kl_divergence(q, p).mean()


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


def test_density_integrates_to_one() -> None:
    posterior = make().posterior(data())
    torch.testing.assert_close(integral(posterior), torch.ones(3).double(), atol=1e-3, rtol=0)


def test_draws_are_of_the_density() -> None:
    assert moments_agree(make().posterior(data()))


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
    expected = torch.full((3, 2), math.exp(2 * clamped), dtype=torch.float64)
    torch.testing.assert_close(guide.posterior(data()).cov_diag, expected)


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
