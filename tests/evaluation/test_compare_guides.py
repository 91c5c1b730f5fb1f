"""Tests of the comparison of guides: exact ones, ones wrong by known amounts, any programs, wrong inputs."""

import math
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, function_pair
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.data import DataLoader

from ppl_vae import evaluate
from ppl_vae.evaluation.distances import median_distance, sliced_wasserstein, squared_mmd
from ppl_vae.evaluation.guides import GuideComparison, compare_guides, posterior_density
from ppl_vae.evaluation.reference_posterior import ReferencePosterior
from ppl_vae.flows import Planar
from ppl_vae.guides import FlowGuide, FullRankGuide, MeanFieldGuide
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

N, K, DIRECTIONS = 12, 400, 20
QUIET: dict[str, Any] = {"progress": False}


@cache
def linear() -> tuple[LinearGaussian, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = LinearGaussian(2, 4, scale=0.6).double()
        return model, model(None, size=N).detach()


def exact_reference(n: int = N) -> ReferencePosterior:
    """Return independent draws of the exact posteriors, as a sampler would give at its best."""
    model, x = linear()
    with torch.no_grad():
        draws = model.posterior(x[:n]).sample((4, 500))
    ones = torch.ones(n, dtype=torch.float64)
    return ReferencePosterior({"z": draws}, ones, 2000 * ones, ones, 0 * ones, (x[:n],), "hmc", 0, 0)


def near(scale: float = 1.0, shift: float = 0.0) -> Any:
    """Return the exact posterior, scaled by a factor and shifted by standard deviations."""
    model, _ = linear()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            loc = exact.mean + shift * exact.stddev
            pyro.sample("z", dist.MultivariateNormal(loc, scale**2 * exact.covariance_matrix))

    return guide


@cache
def compared() -> tuple[GuideComparison, ReferencePosterior]:
    model, x = linear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        reference = exact_reference()
    guides = {"exact": near(), "narrow": near(0.5), "wide": near(2.0), "shifted": near(1.0, 0.7)}
    settings = {"num_particles": K, "num_projections": DIRECTIONS, **QUIET}
    return compare_guides(model, guides, x, reference=reference, **settings), reference


# -- exact guides and wrong ones ---------------------------------------------------------------------


def test_the_exact_guide_has_the_exact_evidence_no_gap_and_weights_without_a_tail() -> None:
    model, x = linear()
    result, _ = compared()
    values = result.values["exact"]
    with torch.no_grad():
        exact = model.log_prob(x)
    for column in ("elbo", "log_likelihood"):
        torch.testing.assert_close(values[column], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values["ess_share"], torch.ones(N, dtype=torch.float64))
    assert result.table.loc["exact", "k_hat_above"] == 0 and bool((values["k_hat"] < 0.7).all())
    # its log p(x) has no noise, and others' don't count for being higher by theirs
    assert result.proposal == "exact" and result.log_likelihood.monte_carlo_error < 1e-6
    assert float(values["inference_gap"].abs().max()) < 1e-9


def test_the_exact_guide_is_as_near_as_halves_of_the_reference_are_and_covers_as_it_says() -> None:
    result, _ = compared()
    values = result.values["exact"]
    # K draws of the guide and 2000 of the reference, N data, two dimensions
    of_mean = math.sqrt(1 / K + 1 / 2000)
    assert float(values["mean_error"].mean()) < 2 * of_mean and float(values["sd_error"].mean()) < 2 * of_mean
    for share, column in ((0.5, "coverage_50"), (0.9, "coverage_90")):
        error = math.sqrt(share * (1 - share) * 2 / K)  # a share of K draws, both ends of the interval
        assert abs(float(values[column].mean()) - share) < 4 * error / math.sqrt(N) + 0.005
        assert float((values[column] - share).abs().max()) < 4 * error
    assert float(values["sliced_wasserstein"].mean()) < 1.3 * float(result.noise["sliced_wasserstein"].mean())
    spread = result.noise["squared_mmd"].std() / math.sqrt(N)
    assert abs(float(values["squared_mmd"].mean())) < 5 * float(spread)
    assert all(value.shape == (N,) for value in result.noise.values())


def test_a_guide_that_is_too_narrow_or_wide_has_the_gap_the_errors_and_the_coverage_of_the_closed_forms() -> (
    None
):
    result, _ = compared()
    for name, s in (("narrow", 0.5), ("wide", 2.0)):
        values = result.values[name]
        gap = s**2 - 1 - 2 * math.log(s)  # KL of two dimensions
        sd_of_log_weight = abs(s**2 - 1)  # log w is half a chi-square of two degrees times this
        error = sd_of_log_weight / math.sqrt(K * N) + result.log_likelihood.monte_carlo_error
        assert abs(float(values["inference_gap"].mean()) - gap) < 4 * error < gap
        assert abs(float(values["sd_error"].mean()) - abs(s - 1)) < 4 * s / math.sqrt(2 * K)
        for share, column in ((0.5, "coverage_50"), (0.9, "coverage_90")):
            normal = torch.distributions.Normal(0.0, 1.0)
            end = normal.icdf(torch.tensor((1 + share) / 2))
            covered = float(2 * normal.cdf(s * end) - 1)
            assert abs(float(values[column].mean()) - covered) < 0.02
        # of two normals of the same mean: |s - 1| times the deviation along each direction
        assert abs(float(values["sliced_wasserstein"].mean()) - abs(s - 1)) < 0.2
        assert float(values["squared_mmd"].mean()) > 10 * abs(float(result.noise["squared_mmd"].mean()))
    table = result.table
    # weights of a narrow guide have a tail of index 1 - s^2 = 0.75, those of a wide one are bounded
    assert table.loc["narrow", "k_hat"] > 0.5 > table.loc["wide", "k_hat"]
    assert table.loc["narrow", "k_hat_above"] > 0.2 and table.loc["wide", "k_hat_above"] == 0
    assert table.loc["wide", "ess_share"] == pytest.approx((2 * 4 - 1) / 4**2, abs=0.05)  # (2 s^2 - 1) / s^4


def test_a_shift_is_a_mean_error_in_standard_deviations_and_leaves_the_deviations_right() -> None:
    result, _ = compared()
    values = result.values["shifted"]
    assert abs(float(values["mean_error"].mean()) - 0.7) < 4 * math.sqrt((1 / K + 1 / 2000) / N)
    assert float(values["sd_error"].mean()) < 2 * math.sqrt(1 / K + 1 / 2000)


# -- the numbers are what they say they are ------------------------------------------------------------


def test_elbo_and_log_likelihood_are_those_of_evaluate_within_their_errors() -> None:
    model, x = linear()
    guide = MeanFieldGuide(MLP(4), 2).double()
    result = compare_guides(model, {"g": guide}, x, num_particles=2000, **QUIET)
    other = evaluate(model, guide, x, num_particles=2000, seed=5, **QUIET)
    for column, estimate in (("elbo", other.elbo), ("log_likelihood", other.log_likelihood)):
        error = 2 * estimate.monte_carlo_error
        assert abs(result.table.loc["g", column] - estimate.mean) < 4 * error
        assert result.table.loc["g", f"{column}_se"] == pytest.approx(estimate.standard_error, rel=0.2)
    assert result.proposal == "g" and result.noise == {} and "sliced_wasserstein" not in result.table
    gap = result.values["g"]["log_likelihood"] - result.values["g"]["elbo"]
    torch.testing.assert_close(result.values["g"]["inference_gap"], gap)


def test_log_p_of_x_comes_from_the_reference_where_no_guide_is_any_good() -> None:
    model, x = linear()
    result = compare_guides(
        model, {"far": near(0.2, 5.0)}, x, reference=exact_reference(), num_particles=K, **QUIET
    )
    with torch.no_grad():
        exact = float(model.log_prob(x).mean())
    assert result.proposal == "the reference"
    assert abs(result.log_likelihood.mean - exact) < 4 * result.log_likelihood.monte_carlo_error < 0.1
    assert result.table.loc["far", "log_likelihood"] < exact - 1


def test_all_guides_see_the_same_noise_and_the_table_is_means_over_data() -> None:
    model, x = linear()
    reference = exact_reference()
    result = compare_guides(
        model, {"a": near(0.8), "b": near(0.8)}, x, reference=reference, num_particles=40, **QUIET
    )
    for column, values in result.values["a"].items():
        assert torch.equal(values, result.values["b"][column]) and values.shape == (N,)
        assert values.dtype == torch.float64
        if column != "k_hat":
            assert result.table.loc["a", column] == pytest.approx(float(values.mean()))
            error = np.std(values.numpy(), ddof=1) / math.sqrt(N)
            assert result.table.loc["a", f"{column}_se"] == pytest.approx(error)
    again = compare_guides(model, {"a": near(0.8)}, x, reference=reference, num_particles=40, **QUIET)
    assert torch.equal(again.values["a"]["elbo"], result.values["a"]["elbo"])
    other = compare_guides(model, {"a": near(0.8)}, x, num_particles=40, seed=1, **QUIET)
    assert not torch.equal(other.values["a"]["elbo"], result.values["a"]["elbo"])


def test_distances_are_of_draws_in_the_units_of_the_reference() -> None:
    result, reference = compared()
    r = reference.samples("z")
    r = (r - r.mean(0)) / r.std(0)
    halves = [half[torch.linspace(0, 999, K).long()].transpose(0, 1) for half in r.split(1000)]
    torch.testing.assert_close(
        result.noise["sliced_wasserstein"], sliced_wasserstein(*halves, num_projections=DIRECTIONS)
    )
    width = median_distance(halves[0])
    torch.testing.assert_close(result.noise["squared_mmd"], squared_mmd(*halves, bandwidth=width))


def test_passes_of_any_size_are_put_together_in_order() -> None:
    model, x = linear()
    far = x * torch.linspace(1, 6, N).double()[:, None]
    for memory in (1, 3e5, 1e9):
        result = compare_guides(model, {"g": near()}, far, num_particles=30, memory=memory, **QUIET)
        with torch.no_grad():
            torch.testing.assert_close(result.values["g"]["elbo"], model.log_prob(far))


# -- any programs --------------------------------------------------------------------------------------


def test_hand_written_functions_and_modules_of_several_sites_and_kinds_of_events_are_compared() -> None:
    model, guide, _ = function_pair()
    x = torch.bernoulli(torch.full((4, 4), 0.5)).double()
    result = compare_guides(model, {"mine": guide}, x, num_particles=50, **QUIET)
    assert bool(result.values["mine"]["elbo"].isfinite().all())

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("z2", dist.Normal(a[..., None].expand(*a.shape, 3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 3).double()

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z2", dist.Normal(self.net(x), 0.8).to_event(1))
                pyro.sample("z1", dist.Normal(x.mean(-1) / 2, 0.5))

    x = torch.randn(2, 3).double()
    draws = {"z1": torch.randn(2, 60, 2).double(), "z2": torch.randn(2, 60, 2, 3).double()}
    ones = torch.ones(2, dtype=torch.float64)
    reference = ReferencePosterior(draws, ones, 400 * ones, ones, 0 * ones, (x,), "hmc", 0, 0)
    result = compare_guides(two, {"own": Own()}, x, reference=reference, num_particles=50, **QUIET)
    assert bool(result.table.notna().to_numpy().all())


def test_loaders_and_datasets_give_the_same_numbers_and_nothing_of_the_caller_changes() -> None:
    model, x = linear()
    guide = MeanFieldGuide(nn.Sequential(MLP(4), nn.Dropout(0.5)), 2, features=MLP(4).out_features).double()
    guide.train()
    before = {name: p.clone() for name, p in guide.state_dict().items()}
    pyro.param("mine", torch.ones(2))
    state = torch.get_rng_state()
    found = [
        compare_guides(model, {"g": guide}, data, num_particles=20, **QUIET).values["g"]["elbo"]
        for data in (x, (x,), Rows(x), DataLoader(Rows(x), 5))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert all(torch.equal(p, before[name]) for name, p in guide.state_dict().items())
    assert all(module.training for module in guide.modules()) and list(pyro.get_param_store()) == ["mine"]
    assert all(p.grad is None for p in [*guide.parameters(), *model.parameters()])


def test_the_summary_is_plain_numbers_and_the_text_a_table() -> None:
    result, _ = compared()
    summary = result.summary()
    assert list(summary["guides"]) == ["exact", "narrow", "wide", "shifted"]
    assert summary["guides"]["narrow"]["elbo"] == result.table.loc["narrow", "elbo"]
    assert all(type(value) is float for row in summary["guides"].values() for value in row.values())
    text = str(result)
    for word in (
        "narrow",
        "ELBO",
        "k-hat",
        "SW2",
        "in 90 %",
        "log p(x) for the gap",
        "halves of the reference",
    ):
        assert word in text


# -- densities in a plane --------------------------------------------------------------------------------


def test_densities_of_guides_and_the_posterior_are_the_exact_ones_on_the_grid() -> None:
    model, x = linear()
    result = posterior_density(model, {"exact": near(), "narrow": near(0.5)}, x, exact_reference(), datum=2)
    with torch.no_grad():
        points = torch.stack(torch.meshgrid(result.x, result.y, indexing="xy"), -1)
        exact = model.posterior(x[2]).log_prob(points).exp()
    assert result.scored == {"exact": True, "narrow": True}
    torch.testing.assert_close(result.guides["exact"], exact)
    assert result.posterior is not None
    torch.testing.assert_close(result.posterior, exact, rtol=0.02, atol=1e-3)  # what the grid leaves out
    assert result.draws is not None and result.draws.shape == (2000, 2) and result.datum == 2
    turned = posterior_density(model, {"exact": near()}, x, datum=2, dims=(1, 0), grid=30)
    with torch.no_grad():
        points = torch.stack(torch.meshgrid(turned.x, turned.y, indexing="xy"), -1)
        exact = model.posterior(x[2]).log_prob(points.flip(-1)).exp()
    torch.testing.assert_close(turned.guides["exact"], exact)


def test_guides_that_cannot_be_scored_and_more_dimensions_are_shown_by_kernel_estimates() -> None:
    model, x = linear()
    flow = FlowGuide(MLP(4), Planar(2)).double()
    result = posterior_density(model, {"planar": flow, "exact": near()}, x, num_particles=500, grid=40)
    assert result.scored == {"planar": False, "exact": True}
    torch.manual_seed(0)
    big, data = LinearGaussian(3, 4), torch.randn(2, 4)
    result = posterior_density(big, {"full": FullRankGuide(MLP(4), 3)}, data, dims=(0, 2), grid=40)
    assert result.scored == {"full": False} and result.posterior is None and result.draws is None
    cell = (result.x[1] - result.x[0]) * (result.y[1] - result.y[0])
    assert float(result.guides["full"].sum() * cell) == pytest.approx(1, abs=0.05)


class Overflowing(torch.distributions.transforms.ExpTransform):
    """The identity, whose inverse overflows beyond 3."""

    domain = codomain = constraints.real

    def _call(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.where(y.abs() > 3, math.nan, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y)


class Scoring(dist.Normal):
    """A standard normal of another log density."""

    def __init__(self, log_density: float) -> None:
        super().__init__(torch.zeros(2, dtype=torch.float64), 1.0)
        self.log_density = log_density

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.log_density)

    def expand(self, batch_shape: Any, _instance: Any = None) -> dist.Normal:
        new = self._get_checked_instance(Scoring, _instance)
        new.log_density = self.log_density
        return super().expand(batch_shape, new)


def density_of(fn: dist.TorchDistribution) -> tuple[bool, Tensor, Any]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", fn.to_event(1))

    model, x = linear()
    result = posterior_density(model, {"guide": guide}, x, num_particles=500, grid=40)
    return result.scored["guide"], result.guides["guide"], result


def test_the_density_of_a_flow_whose_inverse_overflows_far_out_is_zero_there() -> None:
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5)
    scored, density, result = density_of(dist.TransformedDistribution(base, Overflowing(cache_size=1)))
    assert scored and density.isfinite().all()
    far = torch.maximum(result.x.abs().unsqueeze(0), result.y.abs().unsqueeze(1)) > 3
    exact = (base.log_prob(result.x[:, None])[:, 0] + base.log_prob(result.y[:, None])[:, :1]).exp()
    torch.testing.assert_close(density, torch.where(far, 0.0, exact), atol=1e-10, rtol=1e-8)
    assert far.any() and not far.all()


def test_a_density_is_zero_outside_the_guides_support() -> None:
    scored, density, result = density_of(dist.Exponential(torch.ones(2, dtype=torch.float64)))
    inside = (result.x.unsqueeze(0) >= 0) & (result.y.unsqueeze(1) >= 0)
    assert scored and (density[~inside] == 0).all() and (density[inside] > 0).all() and not inside.all()
    assert float(density.max()) <= 1


@pytest.mark.parametrize("log_density", [math.nan, math.inf])
def test_what_is_no_density_is_shown_by_a_kernel_estimate(log_density: float) -> None:
    scored, density, _ = density_of(Scoring(log_density))
    assert not scored and density.isfinite().all() and (density > 0).any()


def test_a_density_of_a_guide_with_noise_of_its_own_leaves_the_random_stream_alone() -> None:
    model, x = linear()

    def noisy(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.rand(2).double(), 1.0).to_event(1))

    state = torch.get_rng_state()
    runs = [posterior_density(model, {"g": noisy}, x, num_particles=20, grid=5) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].guides["g"], runs[1].guides["g"])


# -- wrong inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"guides": near}, TypeError, "guides: expected a mapping"),
        ({"guides": {}}, ValueError, "guides: expected at least one"),
        ({"guides": {1: near}}, TypeError, "guides: expected names that are strings"),
        ({"guides": {"a": 3}}, TypeError, "guides: 'a': expected a module or a function"),
        ({"num_particles": 1}, ValueError, "num_particles: expected at least 2"),
        ({"num_projections": 0}, ValueError, "num_projections"),
        ({"memory": 0}, ValueError, "memory"),
        ({"seed": -1}, ValueError, "seed"),
        ({"device": "cuda:99"}, ValueError, "device"),
        ({"reference": 3}, TypeError, "reference: expected a ReferencePosterior"),
        ({"data": torch.full((2, 4), math.nan)}, ValueError, "data: expected finite x"),
        ({"data": torch.zeros(2, 9)}, ValueError, "data"),
        ({"model": 3}, TypeError, "model: expected a module or a function"),
    ],
)
def test_wrong_arguments_are_named(settings: dict[str, Any], error: type, message: str) -> None:
    model, x = linear()
    settings = {"model": model, "guides": {"g": near()}, "data": x, **QUIET, **settings}
    with pytest.raises(error, match=message):
        compare_guides(settings.pop("model"), settings.pop("guides"), settings.pop("data"), **settings)


def test_a_guide_that_does_not_fit_is_named_before_any_is_measured() -> None:
    model, x = linear()
    guides = {"good": near(), "other size": MeanFieldGuide(MLP(4), 3).double()}
    with pytest.raises(
        ValueError, match="guides: 'other size': site 'z': model and guide disagree on shapes"
    ):
        compare_guides(model, guides, x, **QUIET)

    def lost(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("w", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    for named in ({"lost": lost}, {"lost": lost, "good": near()}):  # the first, too
        with pytest.raises(ValueError, match="guides: 'lost': has sites"):
            compare_guides(model, named, x, **QUIET)
        with pytest.raises(ValueError, match="guides: 'lost': has sites"):
            posterior_density(model, named, x)
    with pytest.raises(ValueError, match="guides: 'lost': has sites"):
        compare_guides(model, {"good": near(), "lost": lost}, x, **QUIET)


def test_a_reference_of_other_data_or_latents_is_refused() -> None:
    model, x = linear()
    guides = {"g": near()}
    with pytest.raises(ValueError, match="reference: expected draws for the 12 data, got those for 3"):
        compare_guides(model, guides, x, reference=exact_reference(3), **QUIET)
    with pytest.raises(ValueError, match="reference: expected draws for the same data in the same order"):
        compare_guides(model, guides, x.flip(0), reference=exact_reference(), **QUIET)
    other = exact_reference()
    other.draws["w"] = other.draws.pop("z")
    with pytest.raises(ValueError, match="reference: expected the model's latent sites"):
        compare_guides(model, guides, x, reference=other, **QUIET)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"datum": N}, ValueError, "datum: expected a number from 0 to 11"),
        ({"datum": 1.5}, ValueError, "datum"),
        ({"site": "w"}, ValueError, "site: expected one of"),
        ({"dims": (0, 2)}, ValueError, "dims: expected two of the dimensions 0 to 1"),
        ({"dims": (0, 0)}, ValueError, "dims"),
        ({"dims": 1}, ValueError, "dims"),
        ({"grid": 1}, ValueError, "grid"),
        ({"num_particles": 5}, ValueError, "num_particles: expected at least 10"),
        ({"seed": -1}, ValueError, "seed"),
        ({"guides": {}}, ValueError, "guides"),
        ({"reference": 3}, TypeError, "reference"),
    ],
)
def test_wrong_arguments_of_a_density_are_named(settings: dict[str, Any], error: type, message: str) -> None:
    model, x = linear()
    settings = {"guides": {"g": near()}, **settings}
    with pytest.raises(error, match=message):
        posterior_density(model, settings.pop("guides"), x, **settings)


def test_a_latent_of_one_dimension_has_no_plane() -> None:
    model, guide = LinearGaussian(1, 4), MeanFieldGuide(MLP(4), 1)
    with pytest.raises(
        ValueError, match="site: expected one whose latent is a vector of 2 dimensions or more"
    ):
        posterior_density(model, {"g": guide}, torch.zeros(2, 4))
