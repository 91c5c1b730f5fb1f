"""Tests of annealed importance sampling and of bidirectional Monte Carlo: against the exact log p(x)."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae.data import Split
from ppl_vae.evaluation import _annealing
from ppl_vae.evaluation._annealing import inverse_temperatures
from ppl_vae.evaluation.annealed_importance_sampling import (
    AnnealedImportanceSampling,
    annealed_importance_sampling,
)
from ppl_vae.evaluation.bidirectional_monte_carlo import bidirectional_monte_carlo
from ppl_vae.guides import MeanFieldGuide, SemiAmortizedGuide
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

QUIET: dict[str, Any] = {"progress": False}
SHORT: dict[str, Any] = {"num_temperatures": 10, "num_chains": 4, "leapfrog": 2, "progress": False}
Exact = Callable[..., Tensor]


def linear(data_dim: int = 4, scale: float = 0.7) -> LinearGaussian:
    torch.manual_seed(0)
    model = LinearGaussian(2, data_dim, scale=scale).double()
    return model.requires_grad_(False)


def drawn(model: Any, n: int = 4) -> Tensor:
    torch.manual_seed(1)
    x = model(None, size=n).detach()
    if isinstance(model, nn.Module):
        model.requires_grad_(False)  # Pyro's store has set it
    return x


# -- models whose log p(x) is known ------------------------------------------------------------------


def nonlinear(x: Tensor | None = None, *, size: int = 0) -> Tensor:
    """z ~ N(0, 1), x ~ N((sin 3z + z, cos 2z), 0.3), in float64."""
    with pyro.plate("data", size if x is None else len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        mean = torch.cat([torch.sin(3 * z) + z, torch.cos(2 * z)], -1)
        return pyro.sample("x", dist.Normal(mean, 0.3).to_event(1), obs=x)


def by_quadrature(x: Tensor) -> Tensor:
    """Return log p(x) of ``nonlinear``, on a grid of z."""
    z = torch.linspace(-8, 8, 40_001, dtype=torch.float64)[:, None]
    mean = torch.cat([torch.sin(3 * z) + z, torch.cos(2 * z)], -1)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    log_joint = log_prior + dist.Normal(mean, 0.3).to_event(1).log_prob(x[:, None])
    return log_joint.logsumexp(1) + math.log(16 / 40_000)


def function_pair() -> tuple[Any, Tensor, Exact]:
    decoder = nn.Linear(2, 3).double()

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 0.5).to_event(1), obs=x)

    def exact(x: Tensor) -> Tensor:
        return dist.LowRankMultivariateNormal(
            decoder.bias, decoder.weight, torch.full((3,), 0.25).double()
        ).log_prob(x)

    return model, torch.randn(4, 3).double(), exact


def hierarchical() -> tuple[Any, Tensor, Exact]:
    """Two layers: z2 ~ N(0, 1), z1 ~ N(2 z2, 1), x ~ N(z1, 0.5)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(2 * z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 0.5).to_event(1), obs=x)

    return (
        model,
        2 * torch.randn(4, 2).double(),
        lambda x: dist.Normal(0.0, math.sqrt(5.25)).log_prob(x).sum(-1),
    )


def conditional() -> tuple[Any, tuple[Tensor, Tensor], Exact]:
    """z ~ N(y, 1), x ~ N(z, 0.5) given y."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(y.double().unsqueeze(-1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    return (
        model,
        (torch.randn(4, 1).double(), torch.tensor([0, 1, 2, 3])),
        lambda x, y: dist.Normal(y.double(), math.sqrt(1.25)).log_prob(x[:, 0]),
    )


def positive() -> tuple[Any, Tensor, Exact]:
    """A rate z ~ Gamma(3, 0.5) and a count x ~ Poisson(z): together a negative binomial count."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Gamma(x.new_tensor([3.0]), 0.5).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    counts = torch.tensor([[0.0], [3.0], [8.0], [20.0]]).double()
    return model, counts, lambda x: dist.NegativeBinomial(3.0, 1 / 1.5).log_prob(x[:, 0])


def known(name: str) -> tuple[Any, Any, Exact]:
    torch.manual_seed(1)
    if name == "linear":
        model = linear()
        return model, drawn(model), model.log_prob
    if name == "nonlinear":
        return nonlinear, drawn(nonlinear), by_quadrature
    return {
        "functions": function_pair,
        "hierarchical": hierarchical,
        "conditional": conditional,
        "positive": positive,
    }[name]()


def check_exact(result: AnnealedImportanceSampling, expected: Tensor) -> None:
    """Chains' weights over p(x) have the mean 1: within 4 standard errors of it for each datum."""
    expected = expected.detach()
    ratio = (result.log_weights - expected).exp()
    se = ratio.std(0) / math.sqrt(len(ratio))
    assert bool(((ratio.mean(0) - 1).abs() < 4 * se).all()), (ratio.mean(0), se)
    assert float(se.max()) < 0.25  # so that the test says something
    assert result.log_likelihood.mean == pytest.approx(
        float(expected.mean()), abs=4 * result.log_likelihood.monte_carlo_error
    )


@pytest.mark.parametrize(
    "name", ["linear", "nonlinear", "functions", "hierarchical", "conditional", "positive"]
)
def test_chains_find_the_exact_log_likelihood(name: str) -> None:
    model, data, exact = known(name)
    result = annealed_importance_sampling(
        model, None, data, num_temperatures=100, num_chains=48, leapfrog=3, **QUIET
    )
    assert result.bound == "lower" and result.log_weights.shape == (48, 4)
    check_exact(result, exact(*(data if isinstance(data, tuple) else (data,))))
    assert bool((result.ess > 5).all()) and bool((result.ess <= 48).all())


def test_a_thousand_temperatures_are_within_a_twentieth_of_a_nat() -> None:
    x = drawn(nonlinear, 2)
    result = annealed_importance_sampling(
        nonlinear, None, x, num_temperatures=1000, num_chains=500, leapfrog=2, **QUIET
    )
    # chains do not leave their mode of the posterior: their number must be right in each
    assert result.log_likelihood.monte_carlo_error < 0.0125
    assert bool(((result.log_likelihood.values - by_quadrature(x)).abs() < 0.05).all())
    # acceptance lags behind where the density changes, hardly so at this many temperatures
    assert bool(((result.acceptance - 0.65).abs() < 0.08).all()), result.acceptance


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_step_sizes_reach_the_target_acceptance(target: float) -> None:
    model = linear(6)
    result = annealed_importance_sampling(
        model, None, drawn(model, 20), target_acceptance=target, num_temperatures=200, leapfrog=2, **QUIET
    )
    assert float(result.acceptance.mean()) == pytest.approx(target, abs=0.08)


def test_the_bound_rises_with_the_temperatures() -> None:
    model = linear(8, scale=0.2)
    x = drawn(model, 30)
    means = [
        annealed_importance_sampling(
            model, None, x, num_temperatures=t, num_chains=4, leapfrog=2, **QUIET
        ).log_likelihood
        for t in (2, 10, 40)
    ]
    exact = float(model.log_prob(x).mean())
    assert means[0].mean + 1 < means[1].mean and means[1].mean + 0.1 < means[2].mean
    assert means[2].mean < exact + 4 * means[2].monte_carlo_error


def test_chains_from_a_good_guide_need_few_temperatures() -> None:
    model = linear(8, scale=0.2)
    x = drawn(model)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            exact = model.posterior(x)
            wider = dist.MultivariateNormal(exact.mean + 0.05, 1.3 * exact.covariance_matrix)
            pyro.sample("z", wider)

    settings = {"num_temperatures": 10, "num_chains": 32, "leapfrog": 2} | QUIET
    from_guide = annealed_importance_sampling(model, guide, x, start="guide", **settings)
    check_exact(from_guide, model.log_prob(x))
    from_prior = annealed_importance_sampling(model, guide, x, **settings)
    assert bool((from_guide.ess > 20).all()) and float(from_prior.ess.mean()) < 10


def test_the_exact_posterior_as_the_start_has_constant_weights() -> None:
    model = linear()
    x = drawn(model)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    result = annealed_importance_sampling(model, guide, x, start="guide", **SHORT)
    torch.testing.assert_close(result.log_weights, model.log_prob(x).expand(4, -1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.ess, torch.full((4,), 4.0).double())


def test_a_guide_with_noise_of_its_own_is_refused_as_a_start() -> None:
    # its density would be another at each step, and the weights no longer those of a path
    model = linear()
    x = drawn(model)

    def noisy(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.randn(2).double(), 2.0).to_event(1))

    semi_amortized = SemiAmortizedGuide(MeanFieldGuide(MLP(4), 2).double(), model)
    for guide in (noisy, semi_amortized):
        with pytest.raises(ValueError, match="guide: expected one with the same density at each run"):
            annealed_importance_sampling(model, guide, x, start="guide", **SHORT)
        with pytest.raises(ValueError, match="guide: expected one with the same density at each run"):
            bidirectional_monte_carlo(model, guide, 3, start="guide", **SHORT)


# -- reverse chains ------------------------------------------------------------------------------------


def test_reverse_chains_from_the_exact_posterior_have_inverse_weights_of_mean_one_over_p() -> None:
    model = linear()
    x = drawn(model)
    torch.manual_seed(2)
    draws = {"z": model.posterior(x).sample((48,))}
    settings = {"num_temperatures": 100, "num_chains": 48, "leapfrog": 3} | QUIET
    result = annealed_importance_sampling(model, None, x, direction="reverse", draws=draws, **settings)
    assert result.bound == "upper"
    ratio = (model.log_prob(x).detach() - result.log_weights).exp()
    se = ratio.std(0) / math.sqrt(48)
    assert bool(((ratio.mean(0) - 1).abs() < 4 * se).all()) and float(se.max()) < 0.25
    torch.testing.assert_close(
        result.log_likelihood.values, -((-result.log_weights).logsumexp(0) - math.log(48))
    )
    one_each = annealed_importance_sampling(
        model, None, x, direction="reverse", draws={"z": draws["z"][0]}, **SHORT
    )
    assert one_each.log_weights.shape == (4, 4)


@pytest.mark.parametrize("name", ["linear", "nonlinear"])
def test_both_bounds_bracket_the_exact_log_likelihood_and_close_in_on_it(name: str) -> None:
    model: Any = linear() if name == "linear" else nonlinear
    exact = model.log_prob if name == "linear" else by_quadrature
    gaps = []
    for temperatures in (5, 100):
        result = bidirectional_monte_carlo(
            model, None, 40, num_temperatures=temperatures, num_chains=6, leapfrog=3, **QUIET
        )
        truth = exact(result.batch[0])
        # in expectation over data and chains: the standard error is that over data, which are independent
        for difference in (truth - result.lower.values, result.upper.values - truth):
            se = float(difference.std()) / math.sqrt(40)
            assert float(difference.mean()) > -4 * se
        torch.testing.assert_close(result.gap.values, result.upper.values - result.lower.values)
        gaps.append(result.gap.mean)
    assert gaps[0] > gaps[1] + 0.5 and gaps[1] < 0.6
    # neither is further from the truth than the gap, but for noise
    for bound in (result.lower, result.upper):
        difference = bound.values - truth
        assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(40) + gaps[1]


def test_data_are_simulated_for_given_labels_and_from_the_seed_alone() -> None:
    def model(x: Tensor | None, y: Tensor, *, size: int | None = None) -> Tensor:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z + y.unsqueeze(-1), 0.5).to_event(1), obs=x)

    y = torch.tensor([0, 1, 2])
    runs = [bidirectional_monte_carlo(model, None, 3, y=y, seed=3, **SHORT) for _ in range(2)]
    assert runs[0].batch[1].equal(y) and runs[0].batch[0].shape == (3, 2)
    assert runs[0].batch[0].equal(runs[1].batch[0]) and runs[0].lower.values.equal(runs[1].lower.values)
    other = bidirectional_monte_carlo(model, None, 3, y=y, seed=4, **SHORT)
    assert not other.batch[0].equal(runs[0].batch[0])


# -- how it runs ---------------------------------------------------------------------------------------


def test_passes_and_kinds_of_data_change_nothing_but_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model = linear()
    x = drawn(model, 6)
    settings = {"num_temperatures": 60, "num_chains": 24, "leapfrog": 2} | QUIET
    whole = annealed_importance_sampling(model, None, x, **settings)
    loaded = annealed_importance_sampling(model, None, DataLoader(Rows(x), batch_size=6), **settings)
    monkeypatch.setattr(_annealing, "CPU_ROWS", 24 * 4)
    parts = annealed_importance_sampling(model, None, x, **settings)
    assert not parts.log_weights.equal(whole.log_weights)
    for result in (whole, loaded, parts):
        check_exact(result, model.log_prob(x))


def test_a_run_leaves_programs_and_streams_as_they_were() -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                mean = self.decoder(z.flatten(end_dim=-2)).reshape(*z.shape[:-1], 3)
                pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)

    model = Model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = get_rng_state()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    runs = [annealed_importance_sampling(model, None, x, seed=seed, **SHORT) for seed in (0, 0, 1)]
    assert runs[0].log_weights.equal(runs[1].log_weights)
    assert not runs[0].log_weights.equal(runs[2].log_weights)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(get_rng_state()["torch"], state["torch"])
    assert not list(pyro.get_param_store().keys())


def test_data_that_no_latent_explains_have_log_likelihood_minus_infinity() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            # x in a unit interval about z, as a mask of probability
            inside = ((x - z).abs() < 0.5).squeeze(-1)
            pyro.sample("x", dist.Delta(x, log_density=x.new_zeros(len(x)), event_dim=1), obs=x)
            pyro.factor("inside", torch.where(inside, 0.0, -math.inf))

    x = torch.tensor([[0.0], [100.0]]).double()
    result = annealed_importance_sampling(model, None, x, **SHORT | {"num_chains": 200})
    assert result.log_likelihood.values[1] == -math.inf and result.ess[1] == 0
    # p(|z| < 1/2); a weight is 0 or 1 since the first increment decides
    p = math.erf(0.5 / math.sqrt(2))
    assert float(result.log_likelihood.values[0].exp()) == pytest.approx(
        p, abs=4 * math.sqrt(p * (1 - p) / 200)
    )


def test_densities_that_are_no_numbers_raise() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            pyro.factor("nan", torch.where(x[:, 0] > 1, math.nan, 0.0))

    # the first two data are checked before
    with pytest.raises(ValueError, match="got NaN or plus infinity for 1 of 3 data"):
        annealed_importance_sampling(model, None, torch.tensor([[0.0], [0.0], [2.0]]), **SHORT)


def test_summary_and_text_say_what_was_measured() -> None:
    model = linear()
    result = annealed_importance_sampling(model, None, drawn(model), **SHORT)
    summary = result.summary()
    assert summary["num_temperatures"] == 10 and summary["num_chains"] == 4 and summary["bound"] == "lower"
    assert summary["log_likelihood"]["mean"] == result.log_likelihood.mean
    assert summary["ess"] == float(result.ess.mean())
    for word in (
        "nats per datum",
        "4 data",
        "10 temperatures",
        "4 chains",
        "lower bound",
        "acceptance",
        "ESS",
    ):
        assert word in str(result)
    both = bidirectional_monte_carlo(model, None, 3, **SHORT)
    assert both.summary()["gap"]["mean"] == pytest.approx(both.upper.mean - both.lower.mean)
    for word in ("3 simulated data", "lower bound", "upper bound", "gap"):
        assert word in str(both)


def test_temperatures_rise_from_zero_to_one_slowly_at_the_ends() -> None:
    linear_, sigmoidal = inverse_temperatures(10, "linear"), inverse_temperatures(10, "sigmoidal")
    torch.testing.assert_close(linear_, torch.linspace(0, 1, 11).double())
    assert (float(sigmoidal[0]), float(sigmoidal[-1])) == (0.0, 1.0)
    torch.testing.assert_close(sigmoidal + sigmoidal.flip(0), torch.ones(11).double())
    steps = sigmoidal.diff()
    assert bool((steps > 0).all()) and int(steps.argmax()) in (4, 5) and float(steps[0]) < 0.04


# -- wrong inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures: expected a whole number above 0"),
        ({"num_chains": 0}, "num_chains: expected a whole number above 0"),
        ({"leapfrog": 0}, "leapfrog: expected a whole number above 0"),
        ({"schedule": "sigmoid"}, r"schedule: unknown 'sigmoid' \(did you mean 'sigmoidal'\?\)"),
        ({"start": "posterior"}, "start: unknown 'posterior'"),
        ({"start": "guide"}, "guide: expected a guide for start='guide', got None"),
        ({"direction": "backward"}, "direction: unknown 'backward'"),
        ({"direction": "reverse"}, "draws: expected exact posterior draws"),
        ({"draws": {"z": torch.zeros(4, 2)}}, "draws: expected none for direction='forward'"),
        ({"target_acceptance": 1.0}, "target_acceptance: expected a number between 0 and 1"),
        ({"memory": 0}, "memory: expected a finite number above 0"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        (
            {"direction": "reverse", "draws": {"w": torch.zeros(4, 2)}},
            "draws: expected the model's latent sites",
        ),
        (
            {"direction": "reverse", "draws": {"z": torch.zeros(3, 2)}},
            r"draws: site 'z': expected shape \[4, 2\]",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    model = linear()
    with pytest.raises(ValueError, match=message):
        annealed_importance_sampling(model, None, drawn(model), **SHORT | arguments)


def test_wrong_posterior_draws_are_named() -> None:
    model = linear()
    x, z = drawn(model), torch.zeros(4, 2)
    reverse: dict[str, Any] = SHORT | {"direction": "reverse"}
    given: Any
    for given, message in (
        (z, "draws: expected a mapping"),
        ({"z": 3}, "draws: site 'z': expected a tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            annealed_importance_sampling(model, None, x, draws=given, **reverse)
    for data, got in ((DataLoader(Rows(x)), "a loader"), (Split(x.sigmoid(), dynamic=True), "bits")):
        with pytest.raises(TypeError, match=f"data: expected tensors for direction='reverse', got {got}"):
            annealed_importance_sampling(model, None, data, draws={"z": z}, **reverse)
    with pytest.raises(ValueError, match="draws: expected values inside the supports"):
        annealed_importance_sampling(model, None, x, draws={"z": z * math.nan}, **reverse)
    rates = torch.tensor([[1.0], [2.0], [-1.0], [1.0]])
    model, counts, _ = positive()
    with pytest.raises(ValueError, match="draws: expected values inside the supports"):
        annealed_importance_sampling(model, None, counts, draws={"z": rates}, **reverse)
    # draws of another dtype are those of the model
    result = annealed_importance_sampling(model, None, counts, draws={"z": rates.abs()}, **reverse)
    assert bool(result.log_weights.isfinite().all())


def test_simulated_data_are_at_the_site_x_whatever_the_model_returns() -> None:
    def model(x: Tensor | None, *, size: int = 0) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 0.5).to_event(1), obs=x)
            return z

    assert bidirectional_monte_carlo(model, None, 3, **SHORT).batch[0].shape == (3, 1)


def test_wrong_data_and_models_are_named() -> None:
    model = linear()
    with pytest.raises(ValueError, match="data: "):
        annealed_importance_sampling(model, None, torch.full((3, 4), math.nan).double(), **SHORT)

    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(kind.unsqueeze(-1), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="site 'kind': expected a continuous latent site"):
        annealed_importance_sampling(discrete, None, torch.zeros(3, 1), **SHORT)

    def draws_discrete(x: Tensor | None, size: int = 0) -> Tensor:
        x = torch.zeros(size, 1) if x is None else x
        discrete(x)
        return x

    with pytest.raises(ValueError, match="site 'kind': expected a continuous latent site"):
        bidirectional_monte_carlo(draws_discrete, None, 3, **SHORT)
    with pytest.raises(TypeError, match=r"model: can't be called as model\(None, size=3\)"):
        bidirectional_monte_carlo(lambda x: None, None, 3, **SHORT)
    with pytest.raises(ValueError, match=r"model: expected model.* to draw or return x"):
        bidirectional_monte_carlo(lambda x, size=0: None, None, 3, **SHORT)
    with pytest.raises(ValueError, match=r"y: expected a tensor \[size, ...\] of size=3"):
        bidirectional_monte_carlo(model, None, 3, y=torch.zeros(2), **SHORT)
