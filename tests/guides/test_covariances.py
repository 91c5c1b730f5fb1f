"""What the guides with a normal posterior and a covariance have in common."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import (
    ELBOS,
    data,
    gap,
    gradients_reach_every_parameter,
    integral,
    moments_agree,
    steps_compiled_and_plain,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.guides import FullRankGuide, LowRankGuide
from ppl_vae.infer import KL_ELBO, SVI, tracing
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

Make = Callable[[], nn.Module]

MAKES = {
    "FullRankGuide": lambda: FullRankGuide(MLP(4, hidden=5), 2).double(),
    "LowRankGuide": lambda: LowRankGuide(MLP(4, hidden=5), 2, 1).double(),
}


@pytest.fixture(params=MAKES)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKES[request.param]


def test_density_integrates_to_one(make: Make) -> None:
    posterior = make().posterior(data())
    torch.testing.assert_close(integral(posterior), torch.ones(3).double(), atol=1e-3, rtol=0)


def test_draws_are_of_the_density(make: Make) -> None:
    assert moments_agree(make().posterior(data()))


def test_gradients_reach_every_parameter(make: Make) -> None:
    assert gradients_reach_every_parameter(make(), data()) == []


def test_particles_and_batch_are_their_loop_and_the_encoder_runs_once(make: Make) -> None:
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


def test_kl_elbo_takes_the_closed_form_which_agrees_with_draws(make: Make) -> None:
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
def test_trains_with_every_estimator(make: Make, name: str) -> None:
    model, guide, x = LinearGaussian(2, 4).double().requires_grad_(False), make(), data(8)
    before = gap(model, guide, x)
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.02), ELBOS[name]())
    for _ in range(80):
        svi.step(x)
    assert gap(model, guide, x) < 0.6 * before


@pytest.mark.parametrize("elbo", ["DReG", "KL_ELBO", "Trace_ELBO"])
def test_compiled_steps_are_plain_steps(make: Make, elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    for one, two in zip(*steps_compiled_and_plain(make, ELBOS[elbo]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_is_traced(make: Make) -> None:
    guide, x = make(), data()
    z = torch.randn(7, 3, 2, dtype=torch.float64)
    with pyro.validation_enabled(False):
        graph = make_fx(lambda x: guide.posterior(x).log_prob(z))(x)
        other = data()
        torch.testing.assert_close(graph(other), guide.posterior(other).log_prob(z))
