"""Tests of imputation: against conditionals of the linear-Gaussian model, quadrature, and digits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import function_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.data import load_dataset
from ppl_vae.flows import Planar
from ppl_vae.guides import FlowGuide, MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.tasks.imputation import Imputation, impute

QUIET: dict[str, Any] = {"progress": False}
CHAINS: dict[str, Any] = {"num_chains": 300, "num_iterations": 80, "warmup": 30, **QUIET}
MISSING = torch.tensor(
    [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool
)


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    model = LinearGaussian(2, 5, scale=0.7).double()
    with torch.no_grad():
        model.bias.copy_(torch.linspace(-1, 1, 5))
    return model


def guide_of(model: LinearGaussian, spread: float = 1.0, shift: float = 0.0) -> Callable[[Tensor], None]:
    """Return the exact posterior, widened and shifted, as a plain function."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            wrong = dist.MultivariateNormal(exact.mean + shift, spread**2 * exact.covariance_matrix)
            pyro.sample("z", wrong)

    return guide


def data_of(model: LinearGaussian) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(None, size=5)


def conditional(model: LinearGaussian, x: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each element given the observed ones of its datum."""
    with torch.no_grad():
        covariance = model.weight @ model.weight.mT + (2 * model.log_scale).exp() * torch.eye(5)
        mean, variance = x.clone(), torch.zeros_like(x)
        for i, m in enumerate(missing):
            gain = covariance[m][:, ~m] @ covariance[~m][:, ~m].inverse()
            mean[i, m] = model.bias[m] + gain @ (x[i, ~m] - model.bias[~m])
            variance[i, m] = (covariance[m][:, m] - gain @ covariance[~m][:, m]).diagonal()
    return mean, variance


def errors_in_mean(result: Imputation, mean: Tensor) -> Tensor:
    """Return by how many standard errors each missing element's mean is off."""
    return ((result.x - mean).abs() / result.monte_carlo_error)[result.missing]


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_a_wrong_guide_gives_the_exact_conditional_mean_and_variance(method: Any) -> None:
    model = linear()
    x = data_of(model)
    guide = guide_of(model, 1.3, shift=0.3)
    result = impute(model, guide, x, MISSING, method=method, num_particles=20_000, **CHAINS)
    mean, variance = conditional(model, x, MISSING)
    assert float(result.monte_carlo_error.max()) < 0.08
    assert float(errors_in_mean(result, mean).max()) < 4  # of 8 elements
    # an effective 1,000 draws or more: the variance is known to sqrt(2 / 1000) = 4.5 % or better
    torch.testing.assert_close(result.variance[MISSING], variance[MISSING], rtol=0.18, atol=0)
    assert bool((result.variance[~MISSING] == 0).all())


def test_pseudo_gibbs_is_biased_by_the_guide_that_metropolis_corrects() -> None:
    model = linear()
    x = data_of(model)
    mean, _ = conditional(model, x, MISSING)
    wrong = impute(model, guide_of(model, 1.3, shift=0.3), x, MISSING, method="pseudo-gibbs", **CHAINS)
    assert float(errors_in_mean(wrong, mean).max()) > 10
    exact = impute(model, guide_of(model), x, MISSING, method="pseudo-gibbs", **CHAINS)
    assert float(errors_in_mean(exact, mean).max()) < 4
    # the exact posterior's proposals are all taken
    same = impute(model, guide_of(model), x, MISSING, num_iterations=20, **QUIET)
    assert same.acceptance_rate is not None and bool((same.acceptance_rate == 1).all())
    poor = impute(model, guide_of(model, 3.0), x, MISSING, num_iterations=50, **QUIET)
    assert poor.acceptance_rate is not None and 0.05 < float(poor.acceptance_rate.mean()) < 0.6
    assert wrong.acceptance_rate is None and wrong.effective_sample_size is None


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_draws_have_the_exact_conditional_mean_and_variance_beside_the_observed_elements(method: Any) -> None:
    model = linear()
    x = data_of(model)
    result = impute(
        model,
        guide_of(model, 1.2),
        x,
        MISSING,
        method=method,
        num_draws=600,
        num_particles=20_000,
        num_chains=600,
        num_iterations=1,
        warmup=60,
        memory=2**24,  # several chunks of draws
        **QUIET,
    )
    mean, variance = conditional(model, x, MISSING)
    assert result.draws.shape == (600, 5, 5)
    assert bool((result.draws == x)[:, ~MISSING].all())
    off = (result.draws.mean(0) - mean)[MISSING] / (variance[MISSING] / 600).sqrt()
    assert float(off.abs().max()) < 4
    # a variance of 600 normal draws has the relative error sqrt(2 / 600)
    ratio = (result.draws.var(0) / variance)[MISSING] - 1
    assert float(ratio.abs().max()) < 4 * math.sqrt(2 / 600)


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_the_log_loss_is_that_of_the_exact_conditional_density(method: Any) -> None:
    model = linear()
    x = data_of(model)
    result = impute(
        model, guide_of(model, 1.1), x, MISSING, truth=x, method=method, num_particles=20_000, **CHAINS
    )
    mean, variance = conditional(model, x, MISSING)
    loss = torch.where(MISSING, -dist.Normal(mean, variance.clamp(min=1e-9).sqrt()).log_prob(x), 0.0)
    expected = loss.sum(1) / MISSING.sum(1)
    assert result.log_loss is not None and bool(result.log_loss[-1].isnan())  # of a datum that misses nothing
    torch.testing.assert_close(result.log_loss[:-1], expected[:-1], rtol=0, atol=0.02)
    assert bool((result.truth == x).all())


def two_latents() -> tuple[Callable[[Tensor], None], Callable[[Tensor], None], Callable[[Tensor], Tensor]]:
    """Return plain functions over three bits, z1 and z2, and one from z1 to the bits' probabilities."""
    torch.manual_seed(3)
    decoder = nn.Linear(1, 3).double()
    with torch.no_grad():
        decoder.weight.mul_(3)

    def model(x: Tensor) -> None:
        pyro.module("net", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.6).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z1)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:  # bottom-up
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(0.5 * x[:, :1] - 0.2, 1.2).to_event(1))
            pyro.sample("z2", dist.Normal(0.5 * z1, 1.1).to_event(1))

    return model, guide, lambda z1: decoder(z1).sigmoid()


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_two_latent_sites_give_the_conditional_of_quadrature(method: Any) -> None:
    model, guide, probabilities = two_latents()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    missing = torch.tensor([[True, False, False]] * 4 + [[False, True, True]] * 4)
    result = impute(model, guide, x, missing, method=method, num_particles=20_000, **CHAINS)
    z = torch.linspace(-8, 8, 2001).double()[:, None]
    with torch.no_grad():
        p = probabilities(z)
    prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0]).exp()  # z1 has variance 0.8^2 + 0.6^2 = 1
    likelihood = torch.where(x[:, None] > 0, p, 1 - p)
    weights = prior * torch.where(missing[:, None], 1.0, likelihood).prod(-1)
    expected = weights @ p / weights.sum(1, keepdim=True)
    assert float(result.monte_carlo_error.max()) < 0.02
    assert float(errors_in_mean(result, expected).max()) < 4  # of 12 elements
    torch.testing.assert_close(
        result.variance[missing], (expected * (1 - expected))[missing], rtol=0, atol=0.02
    )
    assert set(result.draws.unique().tolist()) == {0.0, 1.0}


def test_the_importance_error_is_the_spread_over_seeds_or_a_little_more() -> None:
    model = linear()
    x, guide = data_of(model), guide_of(model, 1.4)
    runs = [
        impute(model, guide, x, MISSING, method="importance", num_particles=300, seed=seed, **QUIET)
        for seed in range(40)
    ]
    found = torch.stack([run.x for run in runs]).std(0)[MISSING]
    claimed = torch.stack([run.monte_carlo_error for run in runs]).mean(0)[MISSING]
    # a standard deviation of 40 is known to 11 %; draws that are spread over proposals have less noise
    assert 0.8 < float((claimed / found).mean()) < 1.5
    ess = runs[0].effective_sample_size
    assert ess is not None and 1 <= float(ess.min()) and float(ess.max()) <= 300


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "pseudo-gibbs", "importance"])
def test_small_passes_and_values_of_missing_elements_change_nothing_but_noise(method: Any) -> None:
    model = linear()
    x, guide = data_of(model), guide_of(model)
    settings: dict[str, Any] = {"method": method, "num_particles": 4000}
    settings |= {"num_chains": 200, "num_iterations": 30, "warmup": 10, **QUIET}
    hidden = torch.where(MISSING, math.nan, x)
    first = impute(model, guide, x, MISSING, **settings)
    second = impute(model, guide, hidden, MISSING, **settings)
    assert torch.equal(first.x, second.x) and torch.equal(first.draws, second.draws)
    assert bool((second.x == x)[~MISSING].all())
    small = impute(
        model, guide, hidden, MISSING, memory=500_000 if method == "importance" else 10_000, **settings
    )
    mean, _ = conditional(model, x, MISSING)
    assert float(errors_in_mean(small, mean).max()) < 4


@settings(max_examples=12)
@given(
    n=st.integers(1, 5),
    event=st.sampled_from([(3,), (1, 2, 2), (2, 3)]),
    method=st.sampled_from(["metropolis-within-gibbs", "pseudo-gibbs", "importance"]),
    num_draws=st.integers(1, 7),
    one_mask=st.booleans(),
)
def test_shapes(n: int, event: tuple[int, ...], method: Any, num_draws: int, one_mask: bool) -> None:
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, event, hidden=4)))
    guide = MeanFieldGuide(MLP(event, hidden=4), 2)
    x = torch.bernoulli(torch.full((n, *event), 0.5))
    missing = torch.zeros(event if one_mask else (n, *event), dtype=torch.bool)
    missing.reshape(-1)[::2] = True
    result = impute(
        model,
        guide,
        x,
        missing,
        truth=x,
        method=method,
        num_draws=num_draws,
        num_chains=3,
        num_iterations=3,
        warmup=0,
        num_particles=5,
        **QUIET,
    )
    for tensor in (result.x, result.variance, result.monte_carlo_error, result.missing):
        assert tensor.shape == x.shape
    assert result.draws.shape == (num_draws, n, *event) and set(result.draws.unique().tolist()) <= {0.0, 1.0}
    assert bool((result.x == x)[~result.missing].all() and (result.draws == x)[:, ~result.missing].all())
    assert bool(((result.x >= 0) & (result.x <= 1)).all())
    assert result.log_loss is not None and result.log_loss.shape == (n,)


def test_labels_reach_plain_functions_in_every_chain() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(10.0 * y[:, None] + z * x.new_ones(2), 0.1).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :1] - 10.0 * y[:, None], 0.2).to_event(1))

    y = torch.tensor([0, 3, 1])
    x = (10.0 * y[:, None] + torch.tensor([0.5, 0.5])).double()
    missing = torch.tensor([False, True])
    for method in ("metropolis-within-gibbs", "importance"):
        result = impute(model, guide, x, missing, y=y, method=method, num_iterations=50, **QUIET)  # type: ignore[arg-type]
        torch.testing.assert_close(result.x[:, 1], x[:, 1], rtol=0, atol=0.2)  # noise 0.1 and a little
    with pytest.raises(TypeError, match="labels are missing"):
        impute(model, guide, x, missing, **QUIET)


def test_scores_are_means_over_missing_elements() -> None:
    generator = np.random.default_rng(0)
    x, truth = generator.normal(size=(2, 4, 3))
    missing = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], bool)
    tensors = {name: torch.from_numpy(v) for name, v in (("x", x), ("missing", missing), ("truth", truth))}
    other = torch.zeros(4, 3)
    loss = torch.tensor([1.0, 2.0, 4.0, math.nan])
    result = Imputation(
        **tensors, draws=other, variance=other, monte_carlo_error=other, method="importance", log_loss=loss
    )
    squares = np.array([((x - truth)[i, missing[i]] ** 2).mean() for i in range(3)])
    np.testing.assert_allclose(result.mean_squared_error()[:3], squares)
    assert bool(result.mean_squared_error()[3].isnan())
    rmse, error = result.root_mean_squared_error()
    assert rmse == pytest.approx(np.sqrt(squares.mean()))
    assert error == pytest.approx(squares.std(ddof=1) / np.sqrt(3) / (2 * rmse))  # the delta method
    summary = result.summary()
    assert summary["root_mean_squared_error"] == {"mean": rmse, "standard_error": error}
    assert summary["log_loss"]["mean"] == pytest.approx(7 / 3)
    assert summary["share_missing"] == 0.5
    assert f"{rmse:.4f} +- {error:.4f}" in str(result) and "50.0% of the elements missing" in str(result)
    unknown = Imputation(tensors["x"], tensors["missing"], other, other, other, "importance")
    with pytest.raises(ValueError, match="truth: expected the true data"):
        unknown.mean_squared_error()


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "pseudo-gibbs", "importance"])
def test_plain_functions_run_and_nothing_of_the_caller_changes(method: Any) -> None:
    model, guide, modules = function_pair()
    before = [[p.clone() for p in module.parameters()] for module in modules]
    x = torch.bernoulli(torch.full((6, 4), 0.5, dtype=torch.float64))
    missing = torch.tensor([True, False, True, False])
    state = get_rng_state()
    runs = [
        impute(model, guide, x, missing, method=method, num_iterations=5, num_particles=9, **QUIET)
        for _ in range(2)
    ]
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert not list(pyro.get_param_store().keys())
    for module, values in zip(modules, before, strict=True):
        assert module.training and all(map(torch.equal, module.parameters(), values))
    assert torch.equal(runs[0].x, runs[1].x) and torch.equal(runs[0].draws, runs[1].draws)


def test_halves_of_digits_are_imputed_better_than_by_the_mean_of_the_data() -> None:
    data = load_dataset("digits", binarization="threshold")
    torch.manual_seed(0)
    model = VAE(StandardNormal(6), Bernoulli(MLP(6, (1, 8, 8), hidden=64)))
    guide = MeanFieldGuide(MLP((1, 8, 8), hidden=64), 6)
    fit(model, guide, data.train.x, epochs=8, batch_size=50, learning_rate=5e-3, **QUIET)
    x = data.test.x[:60]
    missing = torch.zeros(1, 8, 8, dtype=torch.bool)
    missing[:, :4] = True
    naive = (x - data.train.x.mean(0)).square()[:, :, :4].mean((1, 2, 3))
    for method in ("metropolis-within-gibbs", "importance"):
        result = impute(
            model,
            guide,
            x,
            missing,
            truth=x,
            method=method,  # type: ignore[arg-type]
            num_iterations=60,
            warmup=20,
            num_chains=2,
            num_particles=200,
            **QUIET,
        )
        gain = naive - result.mean_squared_error()
        assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(60)


X = torch.zeros(4, 5).double()
MASK = torch.tensor([True, False, False, False, False])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x: expected a floating-point tensor"),
        ({"x": [0.0]}, TypeError, "x: expected a floating-point tensor"),
        ({"x": X[0]}, ValueError, r"x: expected data \[n, \*event\]"),
        ({"x": X / 0}, ValueError, "x: expected finite x"),
        ({"x": X[:, :4], "missing": MASK[:4]}, ValueError, "x: model and guide can't run"),
        ({"missing": MASK.long()}, TypeError, "missing: expected a bool tensor"),
        ({"missing": MASK[:4]}, ValueError, "missing: expected x's shape"),
        ({"missing": MASK & False}, ValueError, "missing: expected some elements missing and some not"),
        ({"missing": MASK | True}, ValueError, "missing: expected some elements missing and some not"),
        ({"truth": X[:3]}, ValueError, "truth: expected a tensor of x's shape"),
        ({"truth": X / 0}, ValueError, "truth: expected finite"),
        ({"y": torch.zeros(3, dtype=torch.long)}, ValueError, "x: expected one label y per datum"),
        ({"method": "gibbs"}, ValueError, "method: unknown 'gibbs'"),
        ({"num_chains": 0}, ValueError, "num_chains"),
        ({"num_iterations": 0}, ValueError, "num_iterations"),
        ({"warmup": -1}, ValueError, "warmup"),
        ({"warmup": False}, TypeError, "warmup"),
        ({"num_particles": 2.0}, TypeError, "num_particles"),
        ({"num_draws": 0}, ValueError, "num_draws"),
        ({"num_draws": 9, "num_chains": 2, "num_iterations": 4}, ValueError, "num_draws: expected at most"),
        ({"memory": -1}, ValueError, "memory"),
        ({"seed": None}, TypeError, "seed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = linear()
    with pytest.raises(error, match=message):
        impute(model, guide_of(model), **{"x": X, "missing": MASK, **arguments}, **QUIET)


def test_observed_elements_and_the_truth_are_to_be_in_the_likelihoods_support() -> None:
    model, guide, _ = function_pair()
    x = torch.zeros(3, 4).double()
    missing = torch.tensor([True, False, False, False])
    wrong = x.clone()
    wrong[1, 2] = 0.3
    with pytest.raises(ValueError, match="x: datum 1 is outside the support"):
        impute(model, guide, wrong, missing, **QUIET)
    wrong = x.clone()
    wrong[:, 0] = 0.3
    assert impute(model, guide, wrong, missing, num_iterations=2, **QUIET).x.shape == (3, 4)
    with pytest.raises(ValueError, match="truth: datum 0 has missing elements outside the support"):
        impute(model, guide, x, missing, truth=wrong, **QUIET)


def test_elements_that_depend_on_each_other_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z, torch.eye(2)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"elements of x are independent.*got MultivariateNormal"):
        impute(model, guide, torch.zeros(3, 2), torch.tensor([True, False]), **QUIET)


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_a_guide_that_can_score_its_own_draws_alone_is_refused_where_it_is_a_proposal(method: Any) -> None:
    torch.manual_seed(0)
    model, guide = LinearGaussian(2, 4), FlowGuide(MLP(4), Planar(2))
    x, missing = torch.zeros(3, 4), torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=r"^guide: .*at sites \['z'\]; use method='pseudo-gibbs'"):
        impute(model, guide, x, missing, method=method, **QUIET)
    assert (
        impute(model, guide, x, missing, method="pseudo-gibbs", num_iterations=3, **QUIET).x.shape == x.shape
    )


@pytest.mark.parametrize("method", ["metropolis-within-gibbs", "importance"])
def test_auxiliary_sites_of_a_guide_are_refused_where_it_is_a_proposal(method: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            shift = pyro.sample(
                "shift", dist.Normal(x.new_zeros(2), 0.1).to_event(1), infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.7).to_event(1))

    x, missing = torch.zeros(3, 2), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"auxiliary sites \['shift'\]"):
        impute(model, guide, x, missing, method=method, **QUIET)
    assert impute(model, guide, x, missing, method="pseudo-gibbs", num_iterations=3, **QUIET).x.shape == (
        3,
        2,
    )
