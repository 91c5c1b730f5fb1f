"""Tests of the comparison of estimators, on pairs whose bounds and noise are known."""

import copy
import dataclasses
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.util import get_rng_state
from torch import Tensor, nn

from ppl_vae.evaluation import EstimatorComparison, compare_estimators, evaluate
from ppl_vae.evaluation._gradients import relative_bias
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import (
    CUBO,
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    STL_ELBO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    LinearWarmup,
    RelaxedELBO,
    ScoreFunctionELBO,
)
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

SCALE = 0.8  # of the noise in the data


class AffineGuide(nn.Module):
    """q(z | x) = N(slope x + shift, exp(log_scale)), one latent: the exact posterior is among them."""

    def __init__(self, slope: Tensor, shift: float, log_scale: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(slope)
        self.shift = nn.Parameter(torch.tensor([shift], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor([log_scale], dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x @ self.slope.mT + self.shift
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))


def linear_model() -> LinearGaussian:
    model = LinearGaussian(1, 3).double()
    with torch.no_grad():
        model.log_scale.fill_(math.log(SCALE))
        model.weight.copy_(torch.tensor([[1.0], [-0.5], [0.7]]))
    return model


def affine_pair(shift: float = 0.0, log_scale: float = 0.0) -> tuple[LinearGaussian, AffineGuide]:
    """Return the model and its exact posterior, moved by ``shift`` and widened by ``exp(log_scale)``."""
    model = linear_model()
    weight = model.weight.detach()
    variance = 1 / (1 + weight.square().sum() / SCALE**2)
    return model, AffineGuide(variance * weight.mT / SCALE**2, shift, float(variance.log() / 2) + log_scale)


def linear_data(n: int = 10) -> Tensor:
    torch.manual_seed(7)
    return linear_model()(None, size=n).detach()


def exact_mean(model: LinearGaussian) -> float:
    with torch.no_grad():
        return float(model.log_prob(linear_data()).mean())


def compare(
    pair: Any, estimators: Any, repeats: int = 50, n: int = 10, **options: Any
) -> EstimatorComparison:
    options = {"progress": False, "reference_repeats": 0, "reference_particles": 100} | options
    return compare_estimators(*pair, linear_data(n), estimators, repeats, **options)


class DiscreteGuide(nn.Module):
    def __init__(self, **infer: str) -> None:
        super().__init__()
        self.infer = infer
        self.logits = nn.Parameter(torch.tensor([0.3, -0.4, 0.2]).double())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            fn = dist.OneHotCategorical(logits=self.logits.expand(len(x), 3))
            pyro.sample("z", fn, infer=dict(self.infer))


class DiscreteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([[-1.0], [0.5], [2.0]]).double())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3).to(x)))
            pyro.sample("x", dist.Normal(z @ self.means, 1.0).to_event(1), obs=x[:, :1])


def discrete_pair(**infer: str) -> tuple[DiscreteModel, DiscreteGuide]:
    return DiscreteModel(), DiscreteGuide(**infer)


# -- bounds ----------------------------------------------------------------------------------------


def test_bounds_against_the_exact_evidence() -> None:
    # Seed 0. The ELBO is log p(x) - KL, here with shift a, standard deviations r s and s:
    # KL = (r^2 + (a / s)^2 - 1) / 2 - log r.
    pair = affine_pair(shift=0.3, log_scale=0.2)
    result = compare(pair, {"trace": Trace_ELBO(), "stl": STL_ELBO(num_particles=4)}, 200)
    exact = exact_mean(pair[0])
    assert 0 < result.log_likelihood_se < 0.05
    assert abs(result.log_likelihood - exact) < 4 * result.log_likelihood_se
    own = math.exp(2 * (pair[1].log_scale.item() - 0.2))
    kl = (math.exp(0.4) + 0.3**2 / own - 1) / 2 - 0.2
    for _, row in result.table.iterrows():
        assert row.bound_bias == row.bound - result.log_likelihood
        assert row.bound_se == pytest.approx(row.bound_sd / math.sqrt(200))
        assert row.bound_bias_se == pytest.approx(math.hypot(row.bound_se, result.log_likelihood_se))
        assert abs(row.bound_bias + kl) < 4 * row.bound_bias_se < kl / 2


def test_bound_at_the_exact_posterior_is_the_evidence() -> None:
    result = compare(affine_pair(), [STL_ELBO(), IWAE(num_particles=3)], 5)
    exact = exact_mean(linear_model())
    assert result.log_likelihood == pytest.approx(exact, abs=1e-10)
    assert result.table.bound.tolist() == pytest.approx([exact, exact], abs=1e-10)


def test_upper_bound_has_its_own_sign() -> None:
    # Seed 0; the chi bound of a guide half as wide again, so that the variance of w^2 is finite
    result = compare(affine_pair(log_scale=0.4), [CUBO(num_particles=2000)], 20)
    row = result.table.loc["CUBO"]
    assert row.bound_bias > 4 * row.bound_bias_se > 0


def test_evidence_is_in_evaluation_mode_whatever_the_company() -> None:
    torch.manual_seed(0)
    model = LinearGaussian(2, 4)
    guide = MeanFieldGuide(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 2, features=6)
    x = 5 + 3 * torch.randn(8, 4)  # far from the running statistics at the start

    def compared(estimators: list[ELBO]) -> EstimatorComparison:
        options: dict[str, Any] = {"progress": False, "reference_repeats": 0}
        return compare_estimators(model, guide, x, estimators, 2, reference_particles=50, **options)

    expected = evaluate(model, guide, x, num_particles=50, progress=False).log_likelihood.mean
    assert guide.training
    for count in (1, 3):
        assert compared([Trace_ELBO() for _ in range(count)]).log_likelihood == expected
    guide.eval()
    in_eval = compared([Trace_ELBO()])
    assert in_eval.log_likelihood == expected
    guide.train()
    assert (compared([Trace_ELBO()]).table.bound != in_eval.table.bound).all()  # in the modes they are in


def test_objectives_that_are_no_bounds_have_no_distance_to_the_evidence() -> None:
    pair, moving = affine_pair(0.3), KL_ELBO(kl_weight=LinearWarmup(2))
    moving.step += 1  # half the weight
    others = {
        "weighted": KL_ELBO(kl_weight=0.3),
        "moving": moving,
        "capacity": KL_ELBO(capacity=1.0),
        "free bits": KL_ELBO(free_bits=0.1),
        "dip": DIP_ELBO(),
        "betatc": BetaTC_ELBO(size=10),
        "weighted iwae": IWAE(3, kl_weight=2.0),
    }
    bounds = {"kl": KL_ELBO(), "cubo": CUBO(3), "trace": Trace_ELBO()}
    result = compare(pair, {**others, **bounds}, 3)
    assert result.table.bound.notna().all()
    for name in ("bound_bias", "bound_bias_se"):
        assert set(result.table.index[result.table[name].isna()]) == set(others)
    lines = str(result).splitlines()
    for name in others:
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert line.removeprefix(name).split()[3] == "-"  # after K, the bound and its error


def test_subsampling_plate_changes_nothing_per_datum() -> None:
    model, guide = affine_pair(0.3)

    class Subsampled(nn.Module):
        def __init__(self, program: nn.Module) -> None:
            super().__init__()
            self.program = program

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 40, subsample=torch.arange(len(x)), dim=-1):
                if isinstance(self.program, AffineGuide):
                    loc = x @ self.program.slope.mT + self.program.shift
                    pyro.sample("z", dist.Normal(loc, self.program.log_scale.exp()).to_event(1))
                else:
                    z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1))
                    mean = z @ self.program.weight.mT + self.program.bias
                    pyro.sample("x", dist.Normal(mean, SCALE).to_event(1), obs=x)

    model.log_scale.requires_grad_(False)
    plain = compare((model, guide), [Trace_ELBO(), IWAE(3)], 5).table
    scaled = compare((Subsampled(model), Subsampled(guide)), [Trace_ELBO(), IWAE(3)], 5).table
    for name in ("bound", "bound_sd", "model_gradient_norm", "guide_gradient_variance"):
        assert scaled[name].tolist() == pytest.approx(plain[name].tolist(), rel=1e-10)


# -- noise -----------------------------------------------------------------------------------------


def test_noise_against_a_hand_computation() -> None:
    # Seed 0. Only the shift trains: the gradient is -(shift + s e_i) / v, mean over n data, with the
    # posterior's variance v and standard normal e_i, so its norm is shift / v, its variance s^2 / (v^2 n).
    repeats, n, shift = 1000, 10, 0.2
    model, guide = affine_pair(shift, 0.1)
    model.requires_grad_(False)
    guide.slope.requires_grad_(False)
    guide.log_scale.requires_grad_(False)
    row = compare((model, guide), [Trace_ELBO()], repeats).table.loc["Trace_ELBO"]
    s = math.exp(guide.log_scale.item())
    v = (s * math.exp(-0.1)) ** 2
    variance, snr = s**2 / v**2 / n, shift * math.sqrt(n) / s
    assert abs(row.guide_gradient_norm - shift / v) < 4 * math.sqrt(variance / repeats)
    assert abs(row.guide_gradient_variance / variance - 1) < 4 * math.sqrt(2 / (repeats - 1))
    assert abs(row.guide_snr - snr) < 4 * math.sqrt((1 + snr**2 / 2) / repeats)
    expected = max(0, row.guide_gradient_norm**2 - row.guide_gradient_variance / repeats)
    assert row.guide_snr == pytest.approx(math.sqrt(expected / row.guide_gradient_variance))
    assert row[[c for c in row.index if c.startswith("model_")]].isna().all()  # all of it is frozen


def test_sticking_the_landing_has_no_noise_at_the_exact_posterior() -> None:
    table = compare(affine_pair(), [STL_ELBO(), Trace_ELBO()], 20).table
    assert table.guide_gradient_variance["STL_ELBO"] < 1e-25  # rounding
    assert table.guide_gradient_norm["STL_ELBO"] < 1e-12
    assert table.guide_gradient_variance["Trace_ELBO"] > 0.1


def test_doubly_reparameterised_gradient_has_more_signal() -> None:
    # Seed 0. A ratio below 1 has a standard error near 1 / sqrt(repeats); the same draws are in both.
    repeats = 200
    table = compare(affine_pair(0.3, 0.4), [IWAE(64), DReG(64)], repeats).table
    assert table.bound["IWAE"] == pytest.approx(table.bound["DReG"], abs=1e-12)
    assert table.guide_snr["DReG"] - table.guide_snr["IWAE"] > 4 * math.sqrt(2 / repeats)
    assert table.model_snr["DReG"] == pytest.approx(table.model_snr["IWAE"])


def test_gradient_without_noise_has_an_infinite_ratio() -> None:
    pair = discrete_pair(enumerate="parallel")
    table = compare(pair, [TraceEnum_ELBO(max_plate_nesting=1)], 4, reference_repeats=50).table
    for role in ("model", "guide"):
        assert table[f"{role}_gradient_variance"].tolist() == [0.0]
        assert table[f"{role}_snr"].tolist() == [math.inf]
        bias, error = table[f"{role}_gradient_bias"].item(), table[f"{role}_gradient_bias_se"].item()
        assert bias < 4 * error < 1
    assert table.bound_sd.tolist() == [0.0]


# -- bias ------------------------------------------------------------------------------------------


def test_gradient_bias_is_seen_where_there_is_one() -> None:
    # Seed 0; a column's standard error tests whether there is any bias.
    estimators = {
        "stl": IWAE(32, stick_the_landing=True),
        "dreg": DReG(32),
        "vimco": VIMCO(32),
        "iwae": IWAE(32),
    }
    table = compare(affine_pair(1.5, 0.3), estimators, 100, reference_repeats=300).table
    bias, error = table.guide_gradient_bias, table.guide_gradient_bias_se
    assert bias["stl"] > 4 * error["stl"] > 0
    for name in ("dreg", "vimco"):
        assert bias[name] < 4 * error[name] < 0.5
    assert math.isnan(bias["iwae"]) and math.isnan(error["iwae"])
    unbiased = ["stl", "dreg", "vimco"]  # for the model
    assert (table.model_gradient_bias[unbiased] < 4 * table.model_gradient_bias_se[unbiased]).all()
    assert (table.model_gradient_bias_se[unbiased] < 0.5).all()


def test_gradient_bias_has_the_size_that_is_known() -> None:
    # Seed 0. Only the guide's mean trains. Sticking the landing, IWAE weighs the gradients through the draws
    # by their shares of the weight, DReG by the squares of those: both means are found with many draws.
    model, guide = affine_pair(1.5, 0.3)
    model.requires_grad_(False)
    guide.slope.requires_grad_(False)
    guide.log_scale.requires_grad_(False)
    estimators = {"stl": IWAE(8, stick_the_landing=True), "dreg": DReG(8)}
    row = compare((model, guide), estimators, 200, reference_repeats=400).table.loc["stl"]
    s = math.exp(guide.log_scale.item())
    v = (s * math.exp(-0.3)) ** 2
    noise = torch.randn(8, 200_000, dtype=torch.float64)
    slope = -(1.5 + s * noise) / v  # of the log weight by the draw, up to that of log q
    path = slope + noise / s
    shares = ((-((1.5 + s * noise) ** 2) / v + noise.square()) / 2).softmax(0)
    sticking, doubly = (shares * path).sum(0), (shares.square() * path).sum(0)
    expected = abs(sticking.mean() - doubly.mean()) / doubly.mean().abs()
    error = math.hypot(row.guide_gradient_bias_se, 0.01 * expected)  # 200 000 draws are good to a percent
    assert abs(row.guide_gradient_bias - expected) < 4 * error < expected / 2


def test_gradients_of_the_elbo_agree() -> None:
    # Seed 0. One reference serves all of them, another the weighted one.
    estimators = {
        "trace": Trace_ELBO(),
        "mean field": TraceMeanField_ELBO(num_particles=2, vectorize_particles=True),
        "graph": TraceGraph_ELBO(),
        "stl": STL_ELBO(),
        "kl": KL_ELBO(),
        "weighted": KL_ELBO(kl_weight=0.3),
        "capacity": KL_ELBO(capacity=1.0),
        "free bits": KL_ELBO(free_bits=0.1),
        "relaxed": RelaxedELBO(),
    }
    table = compare(affine_pair(0.5, 0.5), estimators, 100, reference_repeats=100).table
    none = {"capacity", "free bits"}
    for role in ("model", "guide"):
        bias, error = table[f"{role}_gradient_bias"], table[f"{role}_gradient_bias_se"]
        assert set(bias.index[bias.isna()]) == none
        known = bias.index[bias.notna()]
        assert (bias[known] < 4 * error[known]).all()
        assert (error[known] < 0.5).all()


def test_weight_on_one_side_only_is_a_bias() -> None:
    # Seed 0. A scale around the model's latent site alone weighs log p(z) but not log q(z) in Pyro.
    model, guide = affine_pair(0.5, 0.5)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                with pyro.poutine.scale(scale=0.1):
                    z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1))
                mean = z @ self.model.weight.mT + self.model.bias
                pyro.sample("x", dist.Normal(mean, self.model.log_scale.exp()).to_event(1), obs=x)

    table = compare((Scaled(), guide), [Trace_ELBO(), STL_ELBO()], 100, reference_repeats=100).table
    bias, error = table.guide_gradient_bias, table.guide_gradient_bias_se
    assert bias["Trace_ELBO"] > 4 * error["Trace_ELBO"]
    assert bias["STL_ELBO"] < 4 * error["STL_ELBO"]


def test_gradient_bias_of_discrete_latents() -> None:
    # Seed 0. The relaxation is biased at a high temperature, the score function isn't.
    estimators = {
        "graph": TraceGraph_ELBO(),
        "relaxed": RelaxedELBO(num_particles=20, temperature=5.0),
        "score": ScoreFunctionELBO(5),
        "vimco": VIMCO(5),
    }
    table = compare(discrete_pair(), estimators, 100, reference_repeats=400).table
    bias, error = table.guide_gradient_bias, table.guide_gradient_bias_se
    assert bias["relaxed"] > 4 * error["relaxed"]
    assert bias["graph"] < 4 * error["graph"] < 1
    assert bias[["score", "vimco"]].isna().all()


def test_gradient_bias_needs_a_reference_that_is_told_from_zero() -> None:
    # Seed 0. Squared norm 4 against noise of variance 1 / 4 per coordinate and block, or none at all.
    torch.manual_seed(0)
    noise = torch.randn(2, 20, 5, dtype=torch.float64) / 2
    mean = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    bias, error = relative_bias(1.5 * mean + noise[0], mean + noise[1])
    assert abs(bias - 0.5) < 4 * error < 1
    assert all(map(math.isnan, relative_bias(mean + noise[0], noise[1])))
    assert all(map(math.isnan, relative_bias(mean + noise[0], torch.zeros_like(noise[1]))))
    exact = mean.expand(20, 5)
    assert relative_bias(1.5 * exact, exact) == (pytest.approx(0.5), 0.0)
    for factor in (1.0, 5.0):
        bias, error = relative_bias((factor * mean + noise[0])[:2], mean + noise[1])
        assert bias >= 0 and math.isnan(error)
    assert all(map(math.isnan, relative_bias(mean + noise[0], (mean + noise[1])[:2])))


@pytest.mark.parametrize("seed", range(5))
def test_no_gradient_bias_at_an_optimum(seed: int) -> None:
    # The exact posterior: the guide's mean gradient is zero, so that nothing is relative to it.
    table = compare(affine_pair(), [Trace_ELBO()], 20, reference_repeats=20, seed=seed).table
    assert table[["guide_gradient_bias", "guide_gradient_bias_se"]].isna().all(axis=None)


# -- cost ------------------------------------------------------------------------------------------


def test_memory_grows_with_the_draws_and_time_is_positive() -> None:
    # Tensors of [K, n, ...] are most of it: eight times the draws take between four and eight times as much.
    table = compare(affine_pair(), {"8": IWAE(64), "64": IWAE(512)}, 3, n=50).table
    assert 4 < table.peak_memory_mib["64"] / table.peak_memory_mib["8"] <= 8
    assert 512 * 50 * 8 / 2**20 < table.peak_memory_mib["64"] < 60 * 512 * 50 * 8 / 2**20
    assert (table.seconds_per_step > 0).all()


# -- what comes out --------------------------------------------------------------------------------


COLUMNS = ["particles", "bound", "bound_sd", "bound_se", "bound_bias", "bound_bias_se"]
for _role in ("model", "guide"):
    COLUMNS += [f"{_role}_{c}" for c in ("gradient_norm", "gradient_variance", "snr")]
    COLUMNS += [f"{_role}_gradient_bias", f"{_role}_gradient_bias_se"]
COLUMNS += ["seconds_per_step", "peak_memory_mib"]


@settings(deadline=None, max_examples=8)
@given(n=st.integers(1, 5), latent=st.integers(1, 3), k=st.integers(1, 4), repeats=st.integers(2, 6))
def test_a_row_for_each_estimator(n: int, latent: int, k: int, repeats: int) -> None:
    model, guide = LinearGaussian(latent, 4), MeanFieldGuide(MLP(4, hidden=3), latent)
    x = torch.randn(n, 4)
    result = compare_estimators(
        model, guide, x, [Trace_ELBO(num_particles=k), DReG(k)], repeats, progress=False, reference_repeats=2
    )
    assert list(result.table.columns) == COLUMNS
    assert list(result.table.index) == ["Trace_ELBO", "DReG"]
    assert result.table.index.name == "estimator"
    assert result.table.particles.tolist() == [k, k]
    finite = [c for c in COLUMNS if "gradient_bias" not in c]
    assert result.table[finite].map(math.isfinite).all().all()
    assert (result.num_data, result.repeats, result.seed) == (n, repeats, 0)


def test_printed_table_fits() -> None:
    estimators: dict[str, ELBO] = {
        f"estimator number {i}, a name of some length": STL_ELBO() for i in range(12)
    }
    result = compare(affine_pair(0.3), estimators | {"rws": ReweightedWakeSleep(num_particles=2)}, 3)
    lines = str(result).splitlines()
    assert len(lines) == 2 + 13
    assert max(map(len, lines)) <= 120
    assert f"{result.log_likelihood:.2f}" in lines[0]
    assert lines[2].startswith("estimator number 0, ")
    assert f"{result.table.bound.iloc[0]:.2f}" in lines[2]
    assert math.isnan(result.table.bound["rws"])


def test_printed_table_shows_no_nan_and_says_what_the_bias_is() -> None:
    result = compare(affine_pair(0.5, 0.5), {"stl": STL_ELBO(), "rws": ReweightedWakeSleep(2)}, 2)
    assert math.isnan(result.table.bound["rws"])
    assert "nan" not in str(result)
    assert "bias: of the gradient" not in str(result)
    frozen = affine_pair(0.5, 0.5)
    frozen[0].requires_grad_(False)
    result = compare(frozen, {"stl": STL_ELBO()}, 2, reference_repeats=100, reference_particles=1)
    row = result.table.loc["stl"]
    assert math.isnan(row.guide_gradient_bias_se) and math.isnan(row.model_snr)
    assert math.isnan(result.log_likelihood_se)
    assert "nan" not in str(result)
    assert f"{row.guide_gradient_bias:.2g}" in str(result).splitlines()[-1]
    assert "bias: of the gradient, over its norm; bias / se (after ±) tests against zero" in str(result)


def test_printed_zero_has_no_sign() -> None:
    result = compare(affine_pair(0.3), {"stl": STL_ELBO()}, 2)
    result.table["bound"] = result.table["bound_bias"] = -0.001
    unknown = dataclasses.replace(result, log_likelihood=-0.001)
    assert "-0.00" not in str(unknown)
    assert "log p(x) = 0.00" in str(unknown)
    assert "= " not in str(dataclasses.replace(result, log_likelihood=math.nan)).splitlines()[0]


def test_sequences_are_named_by_class() -> None:
    estimators = [IWAE(5), Trace_ELBO(), IWAE(50), IWAE(5, stick_the_landing=True)]
    names = ["IWAE (K=5)", "Trace_ELBO", "IWAE (K=50)", "IWAE (K=5) #2"]
    assert list(compare(affine_pair(), estimators, 2).table.index) == names


def test_same_seed_same_numbers_whatever_the_company() -> None:
    pair = affine_pair(0.3)
    options = {"reference_repeats": 10, "repeats": 5}
    costs = ["seconds_per_step"]
    first = compare(pair, {"a": DReG(3), "b": STL_ELBO()}, **options).table.drop(columns=costs)
    torch.rand(3)
    again = compare(pair, {"b": STL_ELBO(), "c": Trace_ELBO(), "a": DReG(3)}, **options).table.drop(
        columns=costs
    )
    assert first.equals(again.loc[["a", "b"]])
    other = compare(pair, {"a": DReG(3), "b": STL_ELBO()}, seed=1, **options).table
    assert (other.bound != first.bound).all()


def test_labels_are_passed_on() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z + self.weight[y, None], 1.0).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(x + self.shift[y, None], 1.0).to_event(1))

    batch = (torch.randn(4, 1), torch.tensor([0, 1, 1, 0]))
    result = compare_estimators(Conditional(), Guide(), batch, [Trace_ELBO()], 3, progress=False)
    assert (result.table[["model_gradient_norm", "guide_gradient_norm"]] > 0).all().all()
    with pytest.raises(TypeError, match=r"^batch: expected tensors for the model's arguments"):
        compare_estimators(Conditional(), Guide(), batch[0], [Trace_ELBO()], 3, progress=False)


# -- what it leaves alone --------------------------------------------------------------------------


class Failing(Trace_ELBO):
    """Fails at its second gradient."""

    calls = 0

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("on purpose")
        return super().differentiable_loss(model, guide, *args, **kwargs)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    model = LinearGaussian(2, 4)
    guide = MeanFieldGuide(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 2, features=6)
    model.eval()
    gradient = torch.randn(4, 2)
    model.weight.grad = gradient
    kept = gradient.clone()
    schedule = LinearWarmup(10)
    estimators: dict[str, ELBO] = {"kl": KL_ELBO(kl_weight=schedule), "trace": Trace_ELBO()}
    if fails:
        estimators["failing"] = Failing()
    estimators["kl"].step += 5
    before = [copy.deepcopy(module.state_dict()) for module in (model, guide)]
    states = {name: set(vars(estimator)) for name, estimator in estimators.items()}
    pyro.param("kept", torch.ones(2))
    random = get_rng_state()
    x = torch.randn(8, 4)
    random = get_rng_state()
    arguments: Any = (model, guide, x, estimators, 4)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            compare_estimators(*arguments, progress=False)
    else:
        compare_estimators(*arguments, progress=False)
    after = get_rng_state()
    assert torch.equal(random["torch"], after["torch"])
    assert random["random"] == after["random"]
    assert (random["numpy"][1] == after["numpy"][1]).all()
    for module, state in zip((model, guide), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert model.weight.grad is gradient
    assert torch.equal(gradient, kept)
    assert all(p.grad is None for p in [model.bias, model.log_scale, *guide.parameters()])
    assert [model.training, guide.training] == [False, True]
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert int(estimators["kl"].step) == 5
    assert estimators["kl"].terms is None
    assert {name: set(vars(estimator)) for name, estimator in estimators.items()} == states
    assert torch.is_grad_enabled()


def test_buffers_that_are_not_saved_are_as_before() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)
            self.register_buffer("calls", torch.zeros(()), persistent=False)
            self.register_buffer("changed", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
                self.changed = self.changed + 1
            return self.linear(x)

    encoder = Counting()
    guide = MeanFieldGuide(encoder, 1, features=4).double()
    calls, changed = encoder.calls, encoder.changed
    compare((linear_model(), guide), [Trace_ELBO()], 2)
    assert encoder.calls is calls and encoder.changed is changed
    assert (float(calls), float(changed)) == (0.0, 0.0)
    assert not encoder.state_dict().keys() & {"calls", "changed"}


def test_schedules_stand_still() -> None:
    # One gradient step in, half the weight: the same as half the weight for good.
    moving, fixed = KL_ELBO(kl_weight=LinearWarmup(2)), KL_ELBO(kl_weight=0.5)
    moving.step += 1
    result = compare(affine_pair(0.5), {"moving": moving, "fixed": fixed}, 5, reference_repeats=5)
    rows = result.table.drop(columns=["seconds_per_step", "peak_memory_mib"]).to_numpy()
    assert rows[0].tolist() == pytest.approx(rows[1].tolist(), abs=1e-12, nan_ok=True)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"estimators": []}, ValueError, "estimators: expected at least one, got none"),
        ({"estimators": Trace_ELBO()}, TypeError, "estimators: expected a mapping of names to instances"),
        ({"estimators": "trace"}, TypeError, "estimators: expected a mapping of names to instances"),
        ({"estimators": {"a": Trace_ELBO}}, TypeError, r"estimators\['a'\]: expected an instance of pyro"),
        ({"estimators": [STL_ELBO(), Trace_ELBO]}, TypeError, r"estimators\[1\]: expected an instance of"),
        ({"estimators": ["IWAE"]}, TypeError, r"estimators\[0\]: expected an instance of .*, got 'IWAE'"),
        (
            {"estimators": {"stl": STL_ELBO(), "jit": JitTrace_ELBO()}},
            TypeError,
            "estimators: jit: expected an estimator that is not traced by torch.jit",
        ),
        ({"estimators": {"many": IWAE(10**20)}}, ValueError, "estimators: many: "),
        ({"estimators": {1: Trace_ELBO()}}, TypeError, "estimators: expected names that are strings, got 1"),
        ({"repeats": 1}, ValueError, "repeats: expected at least 2, got 1"),
        ({"repeats": 2.0}, TypeError, "repeats: expected a whole number above 0, got 2.0"),
        ({"reference_particles": 0}, ValueError, "reference_particles: expected a whole number above 0"),
        ({"reference_repeats": 1}, ValueError, "reference_repeats: expected 0 or at least 2, got 1"),
        ({"reference_repeats": -1}, ValueError, "reference_repeats: expected a whole number above 0"),
        ({"seed": -1}, ValueError, "seed: expected a whole number from 0"),
        ({"batch": [1.0]}, TypeError, "batch: expected a tensor or a tuple"),
        ({"batch": torch.zeros(0, 3)}, ValueError, "batch: "),
        ({"batch": torch.full((2, 3), math.nan)}, ValueError, "batch: "),
        ({"batch": torch.zeros(2, 5).double()}, ValueError, "batch: model and guide can't run on a batch"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model, guide = affine_pair()
    arguments = {"batch": linear_data(3), "estimators": [Trace_ELBO()], "repeats": 2} | changes
    with pytest.raises(error, match=f"^{message}"):
        compare_estimators(model, guide, progress=False, **arguments)


@pytest.mark.parametrize(
    ("pair", "estimator", "message"),
    [
        (discrete_pair, IWAE(), "site 'z': expected a reparameterised distribution"),
        (discrete_pair, VIMCO(1), "num_particles: expected at least 2"),
        (affine_pair, BetaTC_ELBO(size=2), "size: expected at least the batch's 10 data, got 2"),
    ],
)
def test_estimator_that_cannot_run_is_named_before_any_work(pair: Any, estimator: ELBO, message: str) -> None:
    first = Failing()
    with pytest.raises(ValueError, match=f"^estimators: second: {message}"):
        compare(pair(), {"first": first, "second": estimator}, 2)
    assert first.calls == 0  # put back; a second gradient would have failed with its own message


def test_model_with_marginalised_sites_has_no_evidence_here() -> None:
    class Mixture(DiscreteModel):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                k = pyro.sample(
                    "k", dist.Categorical(logits=torch.zeros(3).to(x)), infer={"enumerate": "parallel"}
                )
                pyro.sample("x", dist.Normal(self.means[k], 1.0).to_event(1), obs=x[:, :1])

    def guide(x: Tensor) -> None:
        pass

    model = Mixture()
    result = compare((model, guide), [TraceEnum_ELBO(max_plate_nesting=1)], 2, reference_repeats=2)
    x = linear_data()[:, :1]
    exact = torch.distributions.Normal(model.means[:, 0], 1.0).log_prob(x).logsumexp(-1) - math.log(3)
    assert result.table.bound.tolist() == pytest.approx([exact.mean().item()])
    assert math.isnan(result.log_likelihood)
    assert result.table.guide_snr.isna().all() and result.table.model_gradient_bias.isna().all()
