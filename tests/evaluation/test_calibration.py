"""Simulation-based calibration: exact guides pass, others are caught by the shape; ties; coverage."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.util import get_rng_state
from scipy.stats import chisquare
from torch import Tensor, nn

from ppl_vae.evaluation.calibration import Calibration, _holm, simulation_based_calibration
from ppl_vae.guides import HierarchicalGuide, MeanFieldGuide
from ppl_vae.likelihoods import Normal
from ppl_vae.models import CVAE, HierarchicalVAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import ConditionalNormal, StandardNormal

QUIET: dict[str, Any] = {"progress": False}
Guide = Callable[[Tensor], None]


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    return LinearGaussian(2, 3)


def posterior_guide(
    model: LinearGaussian, scale: float = 1.0, shift: float = 0.0
) -> Callable[[Tensor], None]:
    """The exact posterior, scaled and shifted."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            cov = scale**2 * exact.covariance_matrix
            pyro.sample("z", dist.MultivariateNormal(exact.mean + shift, cov))

    return guide


class ExactGuide(nn.Module):
    """The exact posterior as a module."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.guide = posterior_guide(model)

    def forward(self, x: Tensor) -> None:
        self.guide(x)


# -- what is caught ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [posterior_guide, ExactGuide])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_exact_posterior_has_uniform_ranks(kind: Any, seed: int) -> None:
    model = linear()
    result = simulation_based_calibration(model, kind(model), seed=seed, **QUIET)
    assert list(result.ranks) == ["z[0]", "z[1]", "log p(x, z)"]
    assert result.rejected == []
    table = result.table
    for name in result.ranks:
        row = table.loc[name]
        assert row["p_value"] > 1e-3  # one in a thousand of calibrated guides is below; seeds 0 and 1
        assert row["mean"] == pytest.approx(0.5, abs=4 * row["mean_se"])
        assert row["spread"] == pytest.approx(1.0, abs=4 * row["spread_se"])
    found = result.coverage()
    assert bool(
        (
            (found["coverage"] - found.index.get_level_values("level")).abs() < 4.5 * found["standard_error"]
        ).all()
    )


def test_a_narrow_guide_has_a_u_and_too_little_coverage() -> None:
    model = linear()
    result = simulation_based_calibration(model, posterior_guide(model, scale=0.7), **QUIET)
    assert set(result.rejected) >= {"z[0]", "z[1]"}
    for name in ("z[0]", "z[1]"):
        counts = result.histogram(name)
        assert min(counts[0], counts[-1]) > 1.5 * counts[8:12].double().mean()
        row = result.table.loc[name]
        assert row["spread"] > 1 + 6 * row["spread_se"]
        assert row["mean"] == pytest.approx(0.5, abs=4 * row["mean_se"])
    # the interval of level p of N(0, 0.7^2) under N(0, 1); a level of 99 draws is exact up to their noise
    for level in (0.5, 0.9):
        half = 0.7 * float(dist.Normal(0.0, 1.0).icdf(torch.tensor(0.5 + level / 2)))
        truth = 2 * float(dist.Normal(0.0, 1.0).cdf(torch.tensor(half))) - 1
        found = result.coverage([level])["coverage"].loc["z[0]"].iloc[0]
        assert found == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 1000) + 0.01)


def test_a_wide_guide_has_a_hump_and_too_much_coverage() -> None:
    model = linear()
    result = simulation_based_calibration(model, posterior_guide(model, scale=1.5), **QUIET)
    row, found = result.table.loc["z[0]"], result.coverage([0.5]).loc["z[0]"].iloc[0]
    assert "z[0]" in result.rejected and row["spread"] < 1 - 6 * row["spread_se"]
    assert found["coverage"] > 0.5 + 6 * found["standard_error"]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shifted_guide_has_a_slope(sign: int) -> None:
    model = linear()
    result = simulation_based_calibration(model, posterior_guide(model, shift=0.3 * sign), **QUIET)
    assert {"z[0]", "z[1]"} <= set(result.rejected)
    row, counts = result.table.loc["z[0]"], result.histogram("z[0]")
    assert sign * (row["mean"] - 0.5) < -6 * row["mean_se"]  # draws too high: the truth ranks low
    assert sign * int(counts[:5].sum() - counts[-5:].sum()) > 0


def test_the_prior_as_a_guide_is_found_by_the_joint_density_alone() -> None:
    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    assert simulation_based_calibration(linear(), prior, **QUIET).rejected == ["log p(x, z)"]


def test_a_function_of_ones_own_finds_a_missing_correlation_that_each_dimension_hides() -> None:
    model = linear()
    with torch.no_grad():  # the posterior's correlation is -0.94
        model.weight.copy_(torch.tensor([[3.0, 3.0], [3.0, 2.5], [0.0, 0.0]]))

    def independent(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            exact = model.posterior(x)
            pyro.sample("z", dist.Normal(exact.mean, exact.variance.sqrt()).to_event(1))

    functions = {"sum": lambda z, x: z["z"].sum(-1), "with x": lambda z, x: z["z"][..., 0] * x[:, 0]}
    arguments: dict[str, Any] = {"functions": functions, "log_joint": False, **QUIET}
    exact = simulation_based_calibration(model, posterior_guide(model), **arguments)
    assert list(exact.ranks) == ["z[0]", "z[1]", "sum", "with x"] and exact.rejected == []
    wrong = simulation_based_calibration(model, independent, **arguments)
    assert wrong.rejected == ["sum"] and wrong.table.loc["sum"]["spread"] < 0.5


# -- ties --------------------------------------------------------------------------------------------


def test_ties_of_discrete_sites_are_broken_at_random() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.5, -0.5], [0.2, 0.1]])

    def model(x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=torch.tensor([0.0, 0.5, -0.3])))
            return pyro.sample("x", dist.Bernoulli(logits=logits[y]).to_event(1), obs=x)

    def guide(x: Tensor, sharper: float = 1.0) -> None:
        joint = dist.Bernoulli(logits=logits).to_event(1).log_prob(x.unsqueeze(1))
        joint = joint + torch.tensor([0.0, 0.5, -0.3])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Categorical(logits=sharper * joint))

    result = simulation_based_calibration(model, guide, **QUIET)
    assert list(result.ranks) == ["y", "log p(x, z)"]
    assert result.rejected == []
    ranks = result.ranks["y"]
    assert 0 <= int(ranks.min()) and int(ranks.max()) <= 99
    assert len(ranks.unique()) > 90  # three labels, yet all ranks
    wrong = simulation_based_calibration(model, lambda x: guide(x, 0.0), **QUIET)
    assert wrong.rejected  # ignores prior and data


def test_a_constant_has_uniform_ranks_whatever_the_guide() -> None:
    model = linear()
    functions = {"one": lambda z, x: torch.ones(z["z"].shape[:-1])}
    result = simulation_based_calibration(
        model, posterior_guide(model, scale=0.1), functions=functions, log_joint=False, size=4000, **QUIET
    )
    row = result.table.loc["one"]
    assert row["p_value"] > 1e-3 and row["mean"] == pytest.approx(0.5, abs=4 * row["mean_se"])
    assert row["spread"] == pytest.approx(1, abs=4 * row["spread_se"])


# -- other programs ----------------------------------------------------------------------------------


def test_labels_condition_both_programs() -> None:
    torch.manual_seed(0)
    model = CVAE(StandardNormal(2), Normal(MLP(2, 4, hidden=(4,), context=3)))
    guide = MeanFieldGuide(MLP(4, hidden=(4,), context=3), 2)
    result = simulation_based_calibration(
        model, guide, y=torch.arange(200) % 3, size=200, num_draws=19, **QUIET
    )
    assert list(result.ranks) == ["z[0]", "z[1]", "log p(x, z)"] and result.num_data == 200


def test_hierarchies_rank_each_layer_and_dimensions_can_be_chosen() -> None:
    torch.manual_seed(0)
    model = HierarchicalVAE(
        StandardNormal(2), [ConditionalNormal(MLP(2, hidden=(4,)), 3)], Normal(MLP(3, 5, hidden=(4,)))
    )
    guide = HierarchicalGuide([MLP(5, hidden=(4,)), MLP(3, hidden=(4,))], (3, 2))
    arguments: dict[str, Any] = {"size": 100, "num_draws": 19, **QUIET}
    names = set(simulation_based_calibration(model, guide, **arguments).ranks)
    assert names == {"z1[0]", "z1[1]", "z1[2]", "z2[0]", "z2[1]", "log p(x, z)"}
    some = simulation_based_calibration(model, guide, sites=["z1"], dimensions=[2, 0], **arguments)
    assert list(some.ranks) == ["z1[2]", "z1[0]", "log p(x, z)"]


def test_nothing_of_the_caller_changes_and_a_seed_repeats() -> None:
    model = linear()
    guide = MeanFieldGuide(MLP(3, hidden=(4,), dropout=0.5), 2).train()
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    state = get_rng_state()
    found = [simulation_based_calibration(model, guide, size=100, **QUIET) for _ in range(2)]
    assert found[0].summary() == found[1].summary() and guide.training
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert list(pyro.get_param_store().keys()) == []


@settings(deadline=None, max_examples=5)
@given(size=st.integers(20, 60), num_draws=st.sampled_from([1, 3, 19]), memory=st.integers(5_000, 100_000))
def test_shapes_whatever_the_passes(size: int, num_draws: int, memory: int) -> None:
    model = linear()
    result = simulation_based_calibration(
        model, posterior_guide(model), size=size, num_draws=num_draws, bins=2, memory=memory, **QUIET
    )
    for ranks in result.ranks.values():
        assert ranks.shape == (size,) and not ranks.is_floating_point()
        assert 0 <= int(ranks.min()) and int(ranks.max()) <= num_draws
        assert int(result.histogram("z[0]").sum()) == size


# -- the tests themselves ----------------------------------------------------------------------------


def test_ranks_are_those_of_counting_draws_below() -> None:
    model = linear()
    kept: dict[str, list[Tensor]] = {"z": []}

    def keep(z: dict[str, Tensor], x: Tensor) -> Tensor:
        kept["z"].append(z["z"][..., 0])
        return z["z"][..., 0]

    result = simulation_based_calibration(
        model, posterior_guide(model), size=40, num_draws=3, bins=2, functions={"f": keep}, **QUIET
    )
    (truth,) = [z for z in kept["z"] if z.shape == (1, 40)]
    (draws,) = [z for z in kept["z"] if z.shape == (3, 40)]
    assert torch.equal(result.ranks["f"], (draws < truth).sum(0))
    assert torch.equal(result.ranks["z[0]"], result.ranks["f"])


def test_the_table_agrees_with_scipy_and_numpy() -> None:
    torch.manual_seed(0)
    ranks = (100 * torch.rand(500) ** 1.2).long()
    result = Calibration({"a": ranks, "b": torch.arange(500) % 100}, num_draws=99, bins=10)
    truth = chisquare(np.histogram(ranks.numpy(), bins=10, range=(0, 100))[0])
    row = result.table.loc["a"]
    assert (row["chi_square"], row["p_value"]) == pytest.approx((truth.statistic, truth.pvalue))
    assert row["mean"] == pytest.approx(float((ranks.double() + 0.5).mean()) / 100)
    uniform = result.table.loc["b"]
    assert (uniform["chi_square"], uniform["p_value"]) == (0.0, 1.0)
    assert (uniform["mean"], uniform["spread"]) == pytest.approx((0.5, 1.0))
    generator = np.random.default_rng(0)
    many = generator.integers(0, 100, (4000, 500))
    assert uniform["mean_se"] == pytest.approx(((many + 0.5) / 100).mean(1).std(), rel=0.06)
    spread = np.sqrt(((many - 49.5) ** 2).mean(1) / ((100**2 - 1) / 12))
    assert uniform["spread_se"] == pytest.approx(spread.std(), rel=0.06)


def test_holm_is_never_below_the_p_value_and_keeps_its_order() -> None:
    assert _holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert _holm([0.5, 0.9]) == [1.0, 1.0]
    assert _holm([0.02]) == [0.02]


@pytest.mark.parametrize("num_draws", [1, 2, 9, 20, 99])
def test_uniform_ranks_are_covered_as_often_as_the_level_says(num_draws: int) -> None:
    result = Calibration({"a": torch.arange(num_draws + 1).repeat(7)}, num_draws, bins=num_draws + 1)
    for levels in (None, (0.5, 0.8, 0.95), (0.01, 0.99)):
        found = result.coverage(levels)
        level = found.index.get_level_values("level")
        assert found["coverage"].tolist() == pytest.approx(level.tolist())
        assert not level.has_duplicates and float(level.max()) <= 1
    if num_draws == 99:
        assert result.coverage([0.5, 0.9]).index.get_level_values("level").tolist() == [0.5, 0.9]
        assert result.coverage([0.5])["standard_error"].iloc[0] == pytest.approx(math.sqrt(0.25 / 700))


def test_summary_and_text_name_what_is_rejected() -> None:
    model = linear()
    result = simulation_based_calibration(model, posterior_guide(model, scale=0.5), **QUIET)
    summary = result.summary()
    assert summary["rejected"] == result.rejected and "z[0]" in summary["rejected"]
    assert summary["z[0]"]["coverage"]["0.5"] == result.coverage([0.5])["coverage"].loc["z[0]"].iloc[0]
    assert "rejected: z[0], z[1]" in str(result) and "1000 data, 99 draws each" in str(result)


# -- wrong inputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size: expected"),
        ({"size": 99}, ValueError, "size: expected at least 5 data per bin, 100, got 99"),
        ({"num_draws": -1}, ValueError, "num_draws: expected"),
        ({"bins": 30}, ValueError, "bins: expected a divisor of num_draws [+] 1 = 100"),
        ({"bins": 1}, ValueError, "bins: expected a divisor"),
        ({"y": [1]}, TypeError, "y: expected a tensor"),
        ({"y": torch.zeros(3)}, ValueError, "y: expected as many rows as size, 1000"),
        ({"y": torch.zeros(1000)}, TypeError, "model: model[(]None, y, size=2[)] failed"),
        ({"sites": ["u"]}, ValueError, "^sites: unknown 'u'.*'z'"),
        ({"sites": ["Z"]}, ValueError, "^sites: unknown 'Z' .did you mean 'z'"),
        ({"sites": "z"}, TypeError, "^sites: expected a sequence"),
        ({"dimensions": [2]}, ValueError, "^dimensions: expected whole numbers from 0 to 1"),
        ({"dimensions": []}, ValueError, "^dimensions: expected"),
        ({"dimensions": 1}, TypeError, "^dimensions: expected a sequence of whole numbers, got 1"),
        ({"dimensions": "z"}, TypeError, "^dimensions: expected a sequence of whole numbers, got 'z'"),
        ({"functions": [abs]}, TypeError, "functions: expected"),
        ({"functions": {"log p(x, z)": abs}}, ValueError, "functions: expected another name"),
        (
            {"functions": {"f": lambda z, x: z["z"]}},
            ValueError,
            r"^functions\['f'\]: expected a value per draw",
        ),
        ({"functions": {"f": lambda z, x: z["z"][..., 0] * math.nan}}, ValueError, "f: expected values"),
        ({"memory": 0}, ValueError, "memory: expected"),
        ({"seed": -1}, ValueError, "seed: expected"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = linear()
    with pytest.raises(error, match=message):
        simulation_based_calibration(model, posterior_guide(model), **QUIET, **arguments)


def test_programs_that_do_not_fit_are_named() -> None:
    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("u", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    def cannot_draw(x: Tensor) -> None:
        other(x)

    with pytest.raises(ValueError, match="guide: lacks the model's latent sites"):
        simulation_based_calibration(linear(), other, **QUIET)
    with pytest.raises(TypeError, match="model: can't be called as model"):
        simulation_based_calibration(cannot_draw, other, **QUIET)
    with pytest.raises(ValueError, match="levels: expected numbers between 0 and 1"):
        Calibration({"a": torch.arange(10)}, 9, 2).coverage([1.5])
