"""The linear-Gaussian model against its exact evidence and posterior, which all other tests rest on."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from ppl_vae import evaluate
from ppl_vae.infer import log_weights
from ppl_vae.models import LinearGaussian

DIMS = st.integers(1, 6)
SCALES = st.floats(0.1, 3.0)
# Float64 rounds at 1e-16. The precision matrix W'W / scale^2 + I has a condition number below
# 6 * 6 * 4^2 / 0.1^2 < 1e5 here, so that solving with it leaves about 1e-11.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def model_of(latent: int, data: int, scale: float = 0.7) -> LinearGaussian:
    model = LinearGaussian(latent, data, scale=scale).double()
    with torch.no_grad():
        model.bias.normal_()
        model.log_scale.fill_(math.log(scale))  # the constructor's start is rounded to float32
    return model


def data_of(model: LinearGaussian, n: int) -> Tensor:
    with torch.no_grad():
        return model(None, size=n)


def exact_guide(model: LinearGaussian) -> Any:
    def guide(x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", model.posterior(x))

    return guide


def inexact_guide(model: LinearGaussian) -> Any:
    """Too wide, off centre and without correlations: a proposal whose weights have a finite variance."""

    def guide(x: Tensor) -> Tensor:
        posterior = model.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            normal = dist.Normal(posterior.mean + 0.1, 1.3 * posterior.variance.sqrt())
            return pyro.sample("z", normal.to_event(1))

    return guide


def log_joint(model: LinearGaussian, x: Tensor, z: Tensor) -> Tensor:
    """Return log p(x, z), ``[points, n]``, from a run of the program on ``z``, ``[points, n, latent]``."""
    with pyro.plate("points", len(z), dim=-2):
        trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]


# Evidence


@given(latent=DIMS, data=DIMS, batch=st.lists(st.integers(1, 3), max_size=3), scale=SCALES)
def test_log_prob_is_the_density_of_the_marginal(
    latent: int, data: int, batch: list[int], scale: float
) -> None:
    model = model_of(latent, data, scale)
    x = 2 * torch.randn(*batch, data, dtype=torch.float64)
    covariance = model.weight @ model.weight.T + scale**2 * torch.eye(data, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(model.bias, covariance).log_prob(x)
    assert model.log_prob(x).shape == tuple(batch)
    torch.testing.assert_close(model.log_prob(x), expected, **CLOSE)


@given(data=DIMS, scale=SCALES)
def test_log_prob_is_the_integral_of_the_program_over_z(data: int, scale: float) -> None:
    # The trapezoid rule on a Gaussian is exact to rounding once the step is below its standard deviation.
    model = model_of(1, data, scale)
    x = data_of(model, 3)
    grid = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    assert model.posterior(x).stddev.min() > 2 * (grid[1] - grid[0])
    joint = log_joint(model, x, grid[:, None, None].expand(-1, 3, 1))
    integral = joint.logsumexp(0) + math.log(grid[1] - grid[0])
    torch.testing.assert_close(model.log_prob(x), integral, **CLOSE)


def test_log_prob_has_gradients_to_every_parameter() -> None:
    model = model_of(2, 3)
    x = data_of(model, 4)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(names) == ["bias", "log_scale", "weight"]

    def evidence(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Evidence(model), dict(zip([f"model.{n}" for n in names], values, strict=True)), (x,)
        )

    assert torch.autograd.gradcheck(evidence, tuple(model.parameters()))


class _Evidence(torch.nn.Module):
    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.log_prob(x)


# Posterior


@given(latent=DIMS, data=DIMS, n=st.integers(1, 4), scale=SCALES)
def test_posterior_is_bayes_rule(latent: int, data: int, n: int, scale: float) -> None:
    model = model_of(latent, data, scale)
    x = data_of(model, n)
    posterior = model.posterior(x)
    assert posterior.batch_shape == (n,)
    assert posterior.event_shape == (latent,)
    z = posterior.sample((7,))
    torch.testing.assert_close(posterior.log_prob(z), log_joint(model, x, z) - model.log_prob(x), **CLOSE)


def test_posterior_by_brute_force_on_a_grid() -> None:
    model = model_of(2, 3)
    x = data_of(model, 2)
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    weight = log_joint(model, x, grid[:, None].expand(-1, 2, 2)).softmax(0)
    mean = torch.einsum("gn,gd->nd", weight, grid)
    centred = grid[:, None] - mean
    covariance = torch.einsum("gn,gnd,gne->nde", weight, centred, centred)
    posterior = model.posterior(x)
    torch.testing.assert_close(posterior.mean, mean, **CLOSE)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, **CLOSE)


def test_posterior_takes_any_batch_shape() -> None:
    model = model_of(2, 3)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    posterior = model.posterior(x)
    assert posterior.batch_shape == (4, 5)
    torch.testing.assert_close(posterior.mean[1, 2], model.posterior(x[1, 2]).mean, **CLOSE)


# The ELBO with the exact posterior as guide, and importance sampling


@given(latent=DIMS, data=DIMS, n=st.integers(1, 4), scale=SCALES)
def test_exact_guide_gives_the_evidence_with_every_draw(latent: int, data: int, n: int, scale: float) -> None:
    model = model_of(latent, data, scale)
    x = data_of(model, n)
    weights = log_weights(model, exact_guide(model), x, num_particles=20)
    torch.testing.assert_close(weights, model.log_prob(x).expand(20, n), **CLOSE)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_exact_guide_gives_the_evidence_under_pyro(elbo: type) -> None:
    model = model_of(3, 4)
    x = data_of(model, 5)
    loss = elbo().loss(model, exact_guide(model), x)
    assert loss == pytest.approx(-float(model.log_prob(x).sum().detach()), rel=1e-11)


def test_evaluate_is_exact_with_the_exact_guide() -> None:
    model = model_of(3, 4)
    x = data_of(model, 50)
    exact = model.log_prob(x).detach()
    result = evaluate(model, exact_guide(model), x, num_particles=30, progress=False)
    torch.testing.assert_close(result.elbo.values, exact, **CLOSE)
    torch.testing.assert_close(result.log_likelihood.values, exact, **CLOSE)
    # Every weight is the same, so a new seed changes nothing; cancellation leaves the root of rounding.
    assert result.elbo.monte_carlo_error < 1e-7
    assert result.log_likelihood.monte_carlo_error < 1e-7
    assert result.reconstruction.monte_carlo_error > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_importance_sampling_is_within_four_standard_errors(seed: int) -> None:
    torch.manual_seed(seed)
    model = model_of(3, 5)
    x = data_of(model, 40)
    result = evaluate(model, inexact_guide(model), x, num_particles=1000, seed=seed, progress=False)
    error = result.log_likelihood.monte_carlo_error
    exact = float(model.log_prob(x).mean().detach())
    # With a relative variance v of a weight the error is sqrt(v / K n) and the bias of the log v / 2 K,
    # which is below a tenth of the error while v n < 0.04 K = 40.
    assert 0 < error**2 * 1000 * 40 < 1
    assert abs(result.log_likelihood.mean - exact) < 4 * error
    assert result.elbo.mean < exact - 10 * result.elbo.monte_carlo_error  # the guide is inexact


def test_monte_carlo_error_is_the_spread_over_repetitions() -> None:
    model = model_of(3, 5)
    repeats = 2000
    x = data_of(model, 1).expand(repeats, -1).contiguous()
    result = evaluate(model, inexact_guide(model), x, num_particles=200, progress=False)
    for estimate in (result.elbo, result.reconstruction, result.kl["z"], result.log_likelihood):
        spread = float(estimate.values.std()) / math.sqrt(repeats)
        # A standard deviation of R draws has relative error sqrt(1 / 2R) = 0.016; 5 of them, and 1/K for
        # the delta method's next term.
        assert estimate.monte_carlo_error == pytest.approx(spread, rel=0.08 + 0.01)


def test_evaluate_does_not_depend_on_the_chunks() -> None:
    model = model_of(2, 3)
    x = data_of(model, 6)
    guide = inexact_guide(model)
    whole = evaluate(model, guide, x, num_particles=2000, progress=False)
    chunked = evaluate(model, guide, x, num_particles=2000, memory=20_000, progress=False)
    assert not torch.equal(whole.elbo.values, chunked.elbo.values)  # other draws
    for name in ("elbo", "reconstruction", "log_likelihood"):
        one, other = getattr(whole, name), getattr(chunked, name)
        assert other.monte_carlo_error == pytest.approx(one.monte_carlo_error, rel=0.2)
        assert abs(one.mean - other.mean) < 4 * math.hypot(one.monte_carlo_error, other.monte_carlo_error)
        assert other.values.shape == (6,)


def test_trap_15_evaluation_with_one_seed_is_one_number() -> None:
    model = model_of(2, 3)
    x = data_of(model, 6)
    before = torch.get_rng_state()
    first, again, other = (
        evaluate(model, inexact_guide(model), x, num_particles=10, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.log_likelihood.values, again.log_likelihood.values)
    assert not torch.equal(first.log_likelihood.values, other.log_likelihood.values)


# Drawing


def test_trap_15_prior_draws_have_the_moments_of_the_marginal() -> None:
    # A run without data draws x; it doesn't echo any.
    model = model_of(2, 3)
    n = 20_000
    x = data_of(model, n)
    covariance = model.weight @ model.weight.T + 0.7**2 * torch.eye(3, dtype=torch.float64)
    variance = covariance.diagonal()
    assert ((x.mean(0) - model.bias).abs() < 5 * (variance / n).sqrt()).all()
    spread = ((variance[:, None] * variance + covariance**2) / n).sqrt()  # of a sample covariance
    assert ((x.T.cov() - covariance).abs() < 5 * spread).all()


def test_draws_have_a_particle_dimension() -> None:
    model = model_of(2, 3)
    with pyro.plate("particles", 7, dim=-2):
        assert model(None, size=4).shape == (7, 4, 3)


def test_start() -> None:
    model = LinearGaussian(400, 300, scale=0.25)
    assert model.weight.shape == (300, 400)
    # 120,000 draws of variance 1 / 400: the relative error of their variance is sqrt(2 / 120000) = 0.004.
    assert float(model.weight.detach().var()) * 400 == pytest.approx(1, abs=0.02)
    assert torch.equal(model.bias, torch.zeros(300))
    assert float(model.log_scale.detach().exp()) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 3), ValueError, "latent_dim: expected a whole number above 0, got 0"),
        ((2, -1), ValueError, "data_dim: expected a whole number above 0, got -1"),
        ((2.0, 3), TypeError, "latent_dim: expected a whole number above 0, got 2.0"),
        ((2, 3, 0.0), ValueError, "scale: expected a finite number above 0, got 0.0"),
        ((2, 3, "learned"), TypeError, "scale: expected a number above 0, got 'learned'"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        LinearGaussian(*arguments[:2], **({"scale": arguments[2]} if len(arguments) > 2 else {}))
    assert str(caught.value) == message


def test_needs_data_or_a_size() -> None:
    with pytest.raises(
        ValueError, match=r"^size: expected the number of data to draw when x is None, got None$"
    ):
        LinearGaussian(2, 3)(None)
