"""Tests of the log-likelihood: against the exact one, `evaluate`, and what its diagnostics must say."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae import evaluate
from ppl_vae.evaluation.annealed_importance_sampling import annealed_importance_sampling
from ppl_vae.evaluation.log_likelihood import LogLikelihood, log_likelihood
from ppl_vae.evaluation.pareto import pareto_smooth
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import log_weights
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

QUIET: dict[str, Any] = {"progress": False}


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(2, 5).double().requires_grad_(False)


def drawn(model: Any, n: int = 30) -> Tensor:
    torch.manual_seed(1)
    x = model(None, size=n).detach()
    if isinstance(model, nn.Module):
        model.requires_grad_(False)  # Pyro's store has set it
    return x


def about_posterior(model: LinearGaussian, spread: float) -> Callable[[Tensor], None]:
    """Return the exact posterior with its standard deviations multiplied by ``spread``."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean, spread**2 * exact.covariance_matrix))

    return guide


# -- models whose log p(x) is known ------------------------------------------------------------------


def nonlinear() -> tuple[Any, Any, Tensor, Tensor]:
    """z ~ N(0, 1), x ~ N((sin 3z + z, cos 2z), 0.3), and the prior as the guide."""

    def mean(z: Tensor) -> Tensor:
        return torch.cat([torch.sin(3 * z) + z, torch.cos(2 * z)], -1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean(z), 0.3).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))

    x = mean(torch.randn(5, 1).double()) + 0.3 * torch.randn(5, 2).double()
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid[:, 0])
    log_joint = log_joint + dist.Normal(mean(grid), 0.3).to_event(1).log_prob(x[:, None])
    return model, guide, x, log_joint.logsumexp(1) + math.log(16 / 20_000)


def function_pair() -> tuple[Any, Any, Tensor, Tensor]:
    decoder, encoder = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.1 * encoder(x), 1.1).to_event(1))

    x = torch.randn(5, 3).double()
    with torch.no_grad():
        exact = dist.LowRankMultivariateNormal(decoder.bias, decoder.weight, torch.ones(3).double())
        return model, guide, x, exact.log_prob(x)


def hierarchical() -> tuple[Any, Any, Tensor, Tensor]:
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1); the guide draws z1 first."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(0.6 * x, 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(0.5 * z1, 0.9).to_event(1))

    x = 1.7 * torch.randn(5, 2).double()
    return model, guide, x, dist.Normal(0.0, math.sqrt(3)).log_prob(x).sum(-1)


def conditional() -> tuple[Any, Any, tuple[Tensor, Tensor], Tensor]:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(y.to(x).unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal((x + y.to(x).unsqueeze(-1)) / 2, 0.9).to_event(1))

    x, y = torch.randn(5, 1).double(), torch.arange(5)
    return model, guide, (x, y), dist.Normal(y.double(), math.sqrt(2)).log_prob(x[:, 0])


def positive_and_discrete() -> tuple[Any, Any, Tensor, Tensor]:
    """A kind in {0, 1} of probability 1/2, a rate z ~ Gamma(3 + kind, 1), a count x ~ Poisson(z)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Gamma(3.0 + kind.to(x).unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Gamma(3.0 + x, 1.8).to_event(1))

    x = torch.tensor([[0.0], [1.0], [3.0], [5.0], [9.0]]).double()
    both = torch.stack([dist.NegativeBinomial(3.0 + k, 0.5).log_prob(x[:, 0]) for k in (0, 1)])
    return model, guide, x, both.double().logsumexp(0) - math.log(2)


@pytest.mark.parametrize(
    "make",
    [nonlinear, function_pair, hierarchical, conditional, positive_and_discrete],
    ids=lambda make: make.__name__,
)
def test_importance_sampling_finds_the_exact_log_likelihood(make: Any) -> None:
    torch.manual_seed(2)
    model, guide, data, exact = make()
    draws = 20_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat, which is not what is tested
        result = log_likelihood(model, guide, data, num_particles=draws, **QUIET)
    # the standard error of the mean weight over its mean, for each datum
    se = ((draws / result.ess - 1) / (draws - 1)).sqrt()
    assert float(se.max()) < 0.05
    assert bool(((result.log_likelihood.values - exact).exp() - 1).abs().lt(4 * se + 1e-9).all())
    expected_error = float(se.square().sum().sqrt()) / len(se)
    assert result.log_likelihood.monte_carlo_error == pytest.approx(expected_error)
    assert abs(result.log_likelihood.mean - float(exact.mean())) < 4 * expected_error


def test_values_are_those_of_evaluate_and_diagnostics_those_of_the_weights() -> None:
    model = linear()
    x = drawn(model)
    guide = about_posterior(model, 1.3)
    result = log_likelihood(model, guide, x, num_particles=100, **QUIET)
    expected = evaluate(model, guide, x, num_particles=100, **QUIET)
    torch.testing.assert_close(result.log_likelihood.values, expected.log_likelihood.values)
    assert result.log_likelihood.monte_carlo_error == pytest.approx(expected.log_likelihood.monte_carlo_error)
    assert result.k_hat.shape == result.ess.shape == (30,) and result.num_particles == 100
    # of other draws of the same distribution
    torch.manual_seed(5)
    weights = log_weights(model, guide, x, num_particles=100).detach().double()
    assert float(result.ess.mean()) == pytest.approx(
        float((weights.softmax(0).square().sum(0) ** -1).mean()), rel=0.05
    )
    k_hat = pareto_smooth(weights)[1]
    se = math.sqrt(2) * float(k_hat.std()) / math.sqrt(30)
    assert abs(float(result.k_hat.mean() - k_hat.mean())) < 4 * se


def test_the_exact_posterior_has_no_error_and_no_tail() -> None:
    model = linear()
    x = drawn(model)
    result = log_likelihood(model, about_posterior(model, 1.0), x, num_particles=50, **QUIET)
    torch.testing.assert_close(result.log_likelihood.values, model.log_prob(x).detach(), rtol=1e-9, atol=1e-9)
    assert result.log_likelihood.monte_carlo_error < 1e-6 and bool((result.k_hat < 0.7).all())
    torch.testing.assert_close(result.ess, torch.full((30,), 50.0).double())


def test_guides_that_are_too_narrow_are_told_by_k_hat_and_a_warning() -> None:
    # the weights of a normal proposal with its standard deviations s times those of the posterior have a tail
    # of shape 1 - s^2
    model = linear()
    x = drawn(model)
    message = r"unreliable, and likely too low, for (\d+) of 30 data.*k-hat above 0.7.*num_particles.*'ais'"
    with pytest.warns(UserWarning, match=message) as caught:
        narrow = log_likelihood(model, about_posterior(model, 0.3), x, num_particles=2000, **QUIET)
    assert narrow.num_unreliable > 20 and f"for {narrow.num_unreliable} of 30" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert narrow.log_likelihood.mean < float(model.log_prob(x).mean()) - 0.1
    wide = log_likelihood(model, about_posterior(model, 1.2), x, num_particles=2000, **QUIET)
    assert wide.num_unreliable == 0 and float(wide.k_hat.mean()) < 0.3


def test_too_few_draws_to_tell_are_said_so() -> None:
    model = linear()
    with pytest.warns(UserWarning, match="20 draws are too few to tell.*num_particles=21"):
        result = log_likelihood(model, about_posterior(model, 1.2), drawn(model), num_particles=20, **QUIET)
    assert bool((result.k_hat == math.inf).all()) and result.num_unreliable == 30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = log_likelihood(model, about_posterior(model, 1.2), drawn(model), num_particles=21, **QUIET)
    assert bool(result.k_hat.isfinite().all())
    assert not any("too few" in str(warning.message) for warning in caught)


def test_annealed_chains_are_the_other_method_and_need_no_guide() -> None:
    model = linear()
    x = drawn(model, 4)
    settings = {"num_temperatures": 30, "num_chains": 16, "leapfrog": 2, "target_acceptance": 0.9} | QUIET
    result = log_likelihood(model, None, x, method="ais", **settings)
    expected = annealed_importance_sampling(model, None, x, **settings)
    assert result.log_likelihood.values.equal(expected.log_likelihood.values)
    assert result.ess.equal(expected.ess)
    assert (result.method, result.num_particles) == ("ais", 16)
    assert "annealed importance sampling" in str(result) and "k-hat" not in str(result)
    assert not {"k_hat_median", "num_unreliable"} & result.summary().keys()  # too few chains to tell
    many = log_likelihood(model, None, x, method="ais", **settings | {"num_chains": 21})
    assert many.summary()["num_unreliable"] == many.num_unreliable and "k-hat" in str(many)


def test_log_weights_that_are_no_numbers_raise_with_the_number_of_data() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)
            pyro.factor("infinite", torch.where(x[:, 0] > 1, math.inf, 0.0))

    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])  # the first two are checked before
    with pytest.raises(ValueError, match=r"model: expected log weights.*plus infinity for 1 of 3 data"):
        log_likelihood(model, guide, x, num_particles=30, **QUIET)


@pytest.mark.parametrize("memory", [1, 5000, 10**8])
def test_passes_of_any_size_agree_within_their_errors(memory: int) -> None:
    model = linear()
    x = drawn(model, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = log_likelihood(
            model, about_posterior(model, 1.3), x, num_particles=60, memory=memory, **QUIET
        )
    se = ((60 / result.ess - 1) / 59).sqrt()
    ratio = (result.log_likelihood.values - model.log_prob(x).detach()).exp()
    assert float(se.max()) < 0.2 and bool(((ratio - 1).abs() < 4 * se).all())
    assert result.k_hat.shape == (3,) and bool(result.k_hat.isfinite().all())


@pytest.mark.parametrize("kind", [Rows, lambda x: DataLoader(Rows(x), batch_size=4), lambda x: Stream(x, 4)])
def test_datasets_and_loaders_are_data_too(kind: Any) -> None:
    model = linear()
    x = drawn(model, 10)
    result = log_likelihood(model, about_posterior(model, 1.0), kind(x), num_particles=30, **QUIET)
    torch.testing.assert_close(result.log_likelihood.values, model.log_prob(x).detach(), rtol=1e-9, atol=1e-9)


def test_a_run_leaves_programs_and_streams_as_they_were() -> None:
    torch.manual_seed(0)
    model = LinearGaussian(2, 5, scale=3.0)
    guide = MeanFieldGuide(MLP(5, hidden=(8,), dropout=0.5), 2).train()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    state = get_rng_state()
    x = torch.zeros(6, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        runs = [log_likelihood(model, guide, x, num_particles=40, seed=seed, **QUIET) for seed in (0, 0, 1)]
    assert runs[0].log_likelihood.values.equal(runs[1].log_likelihood.values)
    assert not runs[0].log_likelihood.values.equal(runs[2].log_likelihood.values)
    assert all(value.equal(before[name]) for name, value in guide.state_dict().items())
    assert guide.training and all(module.training for module in guide.modules())
    assert torch.equal(get_rng_state()["torch"], state["torch"])
    assert not list(pyro.get_param_store().keys())


def test_summary_and_text_say_what_was_measured() -> None:
    model = linear()
    result = log_likelihood(model, about_posterior(model, 1.2), drawn(model), num_particles=200, **QUIET)
    assert isinstance(result, LogLikelihood)
    summary = result.summary()
    assert summary["num_data"] == 30 and summary["num_particles"] == 200 and summary["method"] == "importance"
    assert summary["log_likelihood"]["mean"] == result.log_likelihood.mean
    assert summary["log_likelihood"]["monte_carlo_error"] == result.log_likelihood.monte_carlo_error
    assert summary["ess_mean"] == float(result.ess.mean()) and summary["num_unreliable"] == 0
    for word in ("nats per datum", "30 data", "importance sampling", "K=200", "k-hat", "effective sample"):
        assert word in str(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "AIS"}, r"method: unknown 'AIS' \(did you mean 'ais'\?\)"),
        ({"num_particles": 0}, "num_particles: expected a whole number above 0, got 0"),
        ({"memory": 0}, "memory: expected a finite number above 0"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"guide": None}, "guide: expected the proposal of method='importance', got None"),
        ({"data": torch.full((3, 5), math.nan).double()}, "data: "),
        ({"guide": lambda x: None}, r"guide: lacks the model's latent sites \['z'\]"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = linear()
    given = {"guide": about_posterior(model, 1.2), "data": drawn(model)} | arguments
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, **given, **QUIET)
