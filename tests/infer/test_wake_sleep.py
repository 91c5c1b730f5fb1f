"""Tests of reweighted wake-sleep: the mean gradient of each phase against an exact one."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.infer import IWAE, Objective, WakeSleep
from ppl_vae.models import LinearGaussian

BATCHES, SIZE = 40, 500


class LinearGuide(nn.Module):
    """A guide for one latent dimension that is neither the posterior nor far from it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[0.5], [-0.1]]))
        self.shift = nn.Parameter(torch.tensor([0.2]))
        self.log_scale = nn.Parameter(torch.tensor([-0.5]))

    def posterior(self, x: Tensor) -> Any:
        return dist.Normal(x @ self.gain + self.shift, self.log_scale.exp())

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x).to_event(1))


def pair() -> tuple[LinearGaussian, LinearGuide, Tensor]:
    """Return model, guide and one datum."""
    model = LinearGaussian(1, 2)
    model.weight.data = torch.tensor([[0.9], [-0.6]])
    model.bias.data = torch.tensor([0.1, 0.3])
    model.log_scale.data = torch.tensor(-0.2)
    return model.double(), LinearGuide().double(), torch.tensor([[1.2, 0.4]]).double()


def gradients_of(value: Tensor, module: nn.Module) -> Tensor:
    found = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in found])


def wake_gradients(k: int, m: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the IWAE for the model and of wake-phi for the guide, by quadrature."""
    model, guide, x = pair()
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(m))
    noise = torch.cartesian_prod(*[points] * k).mT
    at = torch.cartesian_prod(*[weights / weights.sum()] * k).prod(1)
    q = guide.posterior(x)
    z = (q.loc + q.scale * noise).detach()
    likelihood = dist.Normal(z.unsqueeze(-1) @ model.weight.mT + model.bias, model.log_scale.exp())
    joint = likelihood.log_prob(x).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)
    log_q = q.log_prob(z)
    shares = (joint - log_q).softmax(0).detach()
    of_model = gradients_of((at * (joint - log_q).logsumexp(0)).sum(), model)
    return of_model, gradients_of((at * (shares * log_q).sum(0)).sum(), guide)


def sleep_gradient() -> Tensor:
    """Return the gradient of E log q(z | x) over the model's draws, a closed form, for the guide."""
    model, guide, _ = pair()
    gain = guide.gain.squeeze(1)
    slope = 1 - gain @ model.weight.squeeze(1).detach()
    noise = (2 * model.log_scale.detach()).exp() * (gain**2).sum()
    offset = gain @ model.bias.detach() + guide.shift[0]
    square = slope**2 + noise + offset**2
    return gradients_of(-guide.log_scale[0] - square / (2 * (2 * guide.log_scale[0]).exp()), guide)


def gradients(estimator: Any, model: Any, guide: Any, x: Tensor) -> Tensor:
    """Return the objective's gradient per datum, one row per batch: the model's, then the guide's."""
    torch.manual_seed(0)
    objective = Objective(model, guide, estimator)
    parameters = [*model.parameters(), *guide.parameters()]
    batch, rows = x.expand(SIZE, -1), []
    for _ in range(BATCHES):
        found = torch.autograd.grad(-objective(batch) / SIZE, parameters, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in found]))
    return torch.stack(rows)


def check_mean(rows: Tensor, expected: Tensor) -> None:
    """Check that the rows' mean is as expected, and that they are precise enough to tell."""
    error = rows.std(0) / math.sqrt(len(rows))
    assert (expected.abs() > 8 * error).float().mean() >= 0.5
    assert ((rows.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(
    ("sleep", "dreg"), [(0.0, False), (0.0, True), (0.4, False), (0.4, True), (1.0, False)]
)
def test_mean_gradients_are_those_of_iwae_wake_phi_and_sleep_phi(k: int, sleep: float, dreg: bool) -> None:
    of_model, wake = wake_gradients(k, 50 if k == 2 else 24)
    of_guide = (1 - sleep) * wake + sleep * sleep_gradient()
    rows = gradients(WakeSleep(k, sleep=sleep, dreg=dreg), *pair())
    check_mean(rows, torch.cat([of_model, of_guide]))


def test_the_model_never_learns_from_its_dreams() -> None:
    model, guide, x = pair()
    found = []
    for sleep in (0.0, 1.0):
        torch.manual_seed(0)
        loss = WakeSleep(3, sleep=sleep).differentiable_loss(model, guide, x)
        found.append(gradients_of(loss, model))
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_wake_phi_by_double_reparameterisation_vanishes_at_the_posterior() -> None:
    model, _, x = pair()

    class Posterior(nn.Module):
        """The exact posterior's mean and standard deviation as parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(model.posterior(x).mean.detach())
            self.log_scale = nn.Parameter(model.posterior(x).stddev.log().detach())

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                normal = dist.Normal(self.loc.expand(len(x), 1), self.log_scale.exp())
                pyro.sample("z", normal.to_event(1))

    guide = Posterior()
    for dreg, vanishes in ((True, True), (False, False)):
        loss = WakeSleep(4, dreg=dreg).differentiable_loss(model, guide, x.expand(20, -1))
        assert (gradients_of(loss, guide).abs().max() < 1e-11) == vanishes


@pytest.mark.parametrize("sleep", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 4])
def test_loss_is_the_iwaes_on_the_same_draws(sleep: float, n: int) -> None:
    model, guide, x = pair()
    losses = []
    for estimator in (WakeSleep(3, sleep=sleep), IWAE(3)):
        torch.manual_seed(0)
        losses.append(estimator.loss(model, guide, x.expand(n, -1)))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0.0)
    torch.manual_seed(0)
    loss = WakeSleep(3, sleep=sleep).differentiable_loss(model, guide, x.expand(n, -1))
    torch.testing.assert_close(loss.detach(), losses[0], rtol=1e-12, atol=0.0)


def test_one_draw_is_enough_for_sleep_phi() -> None:
    model, guide, x = pair()
    expected = sleep_gradient()
    rows = gradients(WakeSleep(1, sleep=1.0), model, guide, x)
    check_mean(rows[:, -len(expected) :], expected)
    loss = WakeSleep(1, sleep=1.0).differentiable_loss(model, guide, x)
    assert loss.shape == () and gradients_of(loss, guide).isfinite().all()


def test_subsampling_multiplies_both_phases() -> None:
    model, guide, x = pair()

    def plate(n: int) -> Any:
        return pyro.plate("data", 10 * n, dim=-1, subsample_size=n, subsample=torch.arange(n))

    def of_ten_times_the_data(x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        with plate(len(x) if size is None and x is not None else size or 0):
            z = pyro.sample("z", dist.Normal(model.bias.new_zeros(1), 1.0).to_event(1))
            mean = z @ model.weight.mT + model.bias
            return pyro.sample("x", dist.Normal(mean, model.log_scale.exp()).to_event(1), obs=x)

    def guide_of_ten_times_the_data(x: Tensor) -> None:
        with plate(len(x)):
            pyro.sample("z", guide.posterior(x).to_event(1))

    found = []
    for programs in ((model, guide), (of_ten_times_the_data, guide_of_ten_times_the_data)):
        torch.manual_seed(0)
        loss = WakeSleep(3, sleep=1.0).differentiable_loss(*programs, x.expand(4, -1))
        found.append((loss.detach(), gradients_of(loss, model), gradients_of(loss, guide)))
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(10 * whole, part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"sleep": 0.5}, {"sleep": 1.0}, {"dreg": True}])
def test_training_brings_the_guide_to_the_posterior(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, guide, _ = pair()
    model.float()
    x = model(None, size=2000).detach()
    fit(
        model,
        guide.float(),
        x,
        elbo=WakeSleep(5, **options),
        epochs=10,
        batch_size=100,
        learning_rate={"model": 1e-3, "guide": 2e-2},
        progress=False,
    )
    posterior, found = model.posterior(x), guide.posterior(x)
    assert (posterior.mean - found.mean).square().mean().sqrt() < 0.1
    assert (posterior.stddev / found.stddev).log().abs().max() < 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sleep": 1.5}, "sleep: expected a share in [0, 1], got 1.5"),
        ({"sleep": -0.5}, "sleep"),
        ({"num_particles": 1}, "num_particles: expected at least 2 for wake-phi, got 1"),
        ({"num_particles": 0}, "num_particles"),
        ({"sleep": 1.0, "dreg": True}, "dreg: expected False without wake-phi (sleep=1), got True"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WakeSleep(**options)


def without_size(x: Tensor) -> Tensor:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)


def without_return(x: Tensor | None = None, *, size: int = 0) -> None:
    with pyro.plate("data", size if x is None else len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        pyro.sample("data_of_no_name", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without_size, "draws from it, got (x: torch.Tensor)"),
        (
            without_return,
            "model: expected `model(None, size=n)` to draw a site 'x' or to return the data, got None",
        ),
    ],
    ids=["size", "return"],
)
def test_models_that_cannot_dream(model: Callable[..., Any], message: str) -> None:
    _, guide, x = pair()
    for program in (model, Objective(model, guide, WakeSleep(2, sleep=0.5))._programs()[0]):
        with pytest.raises(ValueError, match=re.escape(message)):
            WakeSleep(2, sleep=0.5).differentiable_loss(program, guide, x)


def test_draws_without_a_gradient_are_refused_for_double_reparameterisation() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.4)).to_event(1))

    x = torch.zeros(3, 2).double()
    with pytest.raises(ValueError, match="expected a reparameterised distribution"):
        WakeSleep(3, dreg=True).differentiable_loss(model, guide, x)
    assert WakeSleep(3).differentiable_loss(model, guide, x).isfinite()
