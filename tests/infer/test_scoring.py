"""Tests of scales, masks and wrong uses: how a run's log-probabilities become what estimators combine."""

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from hypothesis import example, given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae.infer import (
    CIWAE,
    CUBO,
    DIP_ELBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    TVO,
    VIMCO,
    BetaTC_ELBO,
    DReG,
    EnumELBO,
    RelaxedELBO,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
)
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.running import in_own_store
from ppl_vae.infer.scoring import score

Program = Callable[..., Any]
# Float64 rounds at 1e-16; the sums here have fewer than 1000 terms of order 1 to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}

# The check model: z ~ N(0, 1), x | z ~ N(z, 1), q(z | x) = N(0.3 x + 0.2, 0.5), for ten data.

B = 10
# What the exact values depend on are the sums of x and of its squares: -3.819 and 23.926.
_line = torch.linspace(-1, 1, B, dtype=torch.float64).unsqueeze(-1)
X = -0.3819 + _line * math.sqrt((23.926 - B * 0.3819**2) / float(_line.square().sum()))
KL = float((0.5 * ((0.3 * X + 0.2) ** 2 + 0.25 - 1 - math.log(0.25))).sum())
RECONSTRUCTION = float((-0.5 * ((0.7 * X - 0.2) ** 2 + 0.25) - 0.5 * math.log(2 * math.pi)).sum())
LOG_PRIOR = float((-0.5 * ((0.3 * X + 0.2) ** 2 + 0.25) - 0.5 * math.log(2 * math.pi)).sum())  # E_q[log p(z)]
LOG_Q = -B * 0.5 * math.log(2 * math.pi * math.e * 0.25)  # E_q[log q(z | x)]
EVIDENCE = float(dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum())
# Two draws at one standard deviation either side have the mean of any quadratic function of z exactly.
BOTH_SIDES = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1).expand(2, B, 1)


def name_of(value: Any) -> str:
    return type(value).__name__


def scaled(by: Any) -> Any:
    return contextlib.nullcontext() if by is None else poutine.scale(scale=by)


def check_pair(in_model: Any = None, in_guide: Any = None, **plate: Any) -> tuple[Program, Program, Tensor]:
    """Return the check model and its guide, whose site z each may scale, and the guide's parameters."""
    parameters = torch.tensor([0.3, 0.2, math.log(0.5)], dtype=torch.float64, requires_grad=True)

    def data_plate(x: Tensor) -> Any:
        return pyro.plate(**({"name": "data", "size": len(x), "dim": -1} | plate))

    def model(x: Tensor) -> None:
        with data_plate(x):
            with scaled(in_model):
                z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        slope, shift, log_scale = parameters
        with data_plate(x), scaled(in_guide):
            pyro.sample("z", dist.Normal(slope * x + shift, log_scale.exp()).to_event(1))

    return model, guide, parameters


def loss_and_gradient(
    estimator: Any, pair: tuple[Program, Program, Tensor], x: Tensor = X
) -> tuple[Tensor, Tensor]:
    """Return both at seed 3."""
    model, guide, parameters = pair
    parameters.grad = None
    torch.manual_seed(3)
    loss = estimator.loss_and_grads(model, guide, x)
    assert parameters.grad is not None
    return loss, parameters.grad


def value(estimator: Any, model: Program, guide: Program, *_: Any) -> float:
    """Return the ELBO of the two draws ``BOTH_SIDES``."""
    with Draws(z=BOTH_SIDES):
        return -float(estimator.loss(model, guide, X))


# One of each, with the KL weight given.
WEIGHTED: dict[str, Callable[[float], Estimator]] = {
    "KL": lambda w: KL_ELBO(4, kl_weight=w),
    "KL sampled": lambda w: KL_ELBO(4, kl_weight=w, analytic_kl=False),
    "STL": lambda w: STL_ELBO(4, kl_weight=w),
    "IWAE": lambda w: IWAE(4, kl_weight=w),
    "IWAE, stick the landing": lambda w: IWAE(4, kl_weight=w, stick_the_landing=True),
    "Renyi": lambda w: Renyi(4, kl_weight=w),
    "DReG": lambda w: DReG(4, kl_weight=w),
    "DReG, alpha": lambda w: DReG(4, alpha=0.5, kl_weight=w),
    "CIWAE": lambda w: CIWAE(4, kl_weight=w),
    "MIWAE": lambda w: MIWAE(4, num_groups=2, kl_weight=w),
    "PIWAE": lambda w: PIWAE(4, num_groups=2, kl_weight=w),
    "CUBO": lambda w: CUBO(4, kl_weight=w),
    "TVO": lambda w: TVO(4, kl_weight=w),
    "ScoreFunctionELBO": lambda w: ScoreFunctionELBO(4, kl_weight=w),
    "VIMCO": lambda w: VIMCO(4, kl_weight=w),
    "Relaxed": lambda w: RelaxedELBO(4, kl_weight=w),
}
OTHERS: dict[str, Callable[[], Estimator]] = {
    "WakeSleep": lambda: WakeSleep(4),
    "WakeSleep, doubly reparameterised": lambda: WakeSleep(4, dreg=True),
    "BetaTC": lambda: BetaTC_ELBO(1000, num_particles=4),
    "DIP": lambda: DIP_ELBO(num_particles=4),
}
EVERY: dict[str, Callable[[], Estimator]] = {k: lambda m=m: m(1.0) for k, m in WEIGHTED.items()} | OTHERS
weighted = pytest.mark.parametrize("make", WEIGHTED.values(), ids=WEIGHTED)
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
PLACES = {"both": (0.1, 0.1), "model": (0.1, None), "guide": (None, 0.1)}
places = pytest.mark.parametrize(("in_model", "in_guide"), PLACES.values(), ids=PLACES)


def number(scale: float | None) -> float | None:
    return scale


def tensor32(scale: float | None) -> Tensor | None:
    return None if scale is None else torch.tensor(scale)


def tensor64(scale: float | None) -> Tensor | None:
    return None if scale is None else torch.tensor(scale, dtype=torch.float64)


kinds = pytest.mark.parametrize("kind", [number, tensor32, tensor64])


# KL weight


def test_check_model_has_the_stated_values() -> None:
    assert pytest.approx(4.229, abs=5e-4) == KL
    assert pytest.approx(-17.036, abs=5e-4) == RECONSTRUCTION
    assert pytest.approx(LOG_Q - LOG_PRIOR, rel=1e-12) == KL
    assert pytest.approx(-1863.7, abs=0.05) == 100 * EVIDENCE


@places
@kinds
@pytest.mark.parametrize(
    "estimator",
    [KL_ELBO(2), KL_ELBO(2, analytic_kl=False), STL_ELBO(2), ScoreFunctionELBO(2), Renyi(2, alpha=1.0)],
    ids=["KL", "KL sampled", "STL", "ScoreFunctionELBO", "Renyi"],
)
def test_kl_weight_on_any_side_is_the_weight(
    estimator: Estimator, kind: Callable[[Any], Any], in_model: float, in_guide: float
) -> None:
    found = value(estimator, *check_pair(kind(in_model), kind(in_guide)))
    rounding = 1e-7 if kind is tensor32 else 1e-12
    assert found == pytest.approx(RECONSTRUCTION - 0.1 * KL, rel=rounding)


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceMeanField_ELBO])
@places
def test_kl_weight_on_one_side_is_wrong_in_pyro(estimator: Any, in_model: float, in_guide: float) -> None:
    # three values for one pair: the reason for the rule above
    right = RECONSTRUCTION - 0.1 * KL
    expected = {
        (Trace_ELBO, 0.1, None): RECONSTRUCTION + 0.1 * LOG_PRIOR - LOG_Q,  # -10.9
        (Trace_ELBO, None, 0.1): RECONSTRUCTION + LOG_PRIOR - 0.1 * LOG_Q,  # -27.8
        (TraceMeanField_ELBO, 0.1, None): RECONSTRUCTION - KL,  # -21.3
    }.get((estimator, in_model, in_guide), right)
    elbo = estimator(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    assert value(elbo, *check_pair(in_model, in_guide)) == pytest.approx(expected, rel=1e-12)
    assert expected == right or abs(expected - right) > 3.5


@weighted
@places
def test_weight_of_a_program_is_that_of_the_estimator(
    make: Callable[[float], Estimator], in_model: float, in_guide: float
) -> None:
    by_program = loss_and_gradient(make(1.0), check_pair(in_model, in_guide))
    by_estimator = loss_and_gradient(make(0.1), check_pair())
    torch.testing.assert_close(by_program, by_estimator, **CLOSE)
    assert not torch.isclose(by_program[0], loss_and_gradient(make(1.0), check_pair())[0])


@weighted
def test_weights_of_program_and_estimator_multiply(make: Callable[[float], Estimator]) -> None:
    together = loss_and_gradient(make(0.5), check_pair(0.2))
    torch.testing.assert_close(together, loss_and_gradient(make(0.1), check_pair()), **CLOSE)


def test_weight_zero_is_the_reconstruction_where_poutine_scale_raises() -> None:
    for estimator in (KL_ELBO(2, kl_weight=0), STL_ELBO(2, kl_weight=0), ScoreFunctionELBO(2, kl_weight=0.0)):
        assert value(estimator, *check_pair()) == pytest.approx(RECONSTRUCTION, rel=1e-12)
    with pytest.raises(ValueError, match="Expected scale > 0"):
        poutine.scale(scale=0.0)


def test_terms_are_of_the_true_elbo_whatever_the_weight() -> None:
    estimator = KL_ELBO(2, kl_weight=0.1)
    value(estimator, *check_pair(0.3))
    assert estimator.terms is not None
    assert float(estimator.terms.log_weights().sum()) / 2 == pytest.approx(RECONSTRUCTION - KL, rel=1e-12)


@kinds
def test_scales_that_contradict_each_other_raise(kind: Callable[[Any], Any]) -> None:
    message = (
        "site 'z': expected one KL weight, got the scale 0.1 in the model and 0.5 in the guide beside 1 "
        "of the data; set the estimator's `kl_weight` instead of `poutine.scale`"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        value(KL_ELBO(2), *check_pair(kind(0.1), kind(0.5)))


@kinds
def test_scale_of_the_whole_model_alone_raises(kind: Callable[[Any], Any]) -> None:
    model, guide, _ = check_pair()
    with pytest.raises(ValueError, match=r"0\.1 in the model and 1 in the guide beside 0\.1 of the data"):
        value(IWAE(2), poutine.scale(model, scale=kind(0.1)), guide)


def test_tensors_that_contradict_each_other_give_no_number_without_validation() -> None:
    # values of tensors are then not looked at
    with pyro.validation_enabled(False):
        assert math.isnan(value(KL_ELBO(2), *check_pair(tensor64(0.1), tensor64(0.5))))
        agreed = value(KL_ELBO(2), *check_pair(tensor64(0.1), tensor64(0.1)))
    assert agreed == pytest.approx(RECONSTRUCTION - 0.1 * KL, rel=1e-12)


# Scale of a whole program


@every
@kinds
def test_scale_of_both_programs_is_outside_the_objective(
    make: Callable[[], Estimator], kind: Callable[[Any], Any]
) -> None:
    model, guide, parameters = check_pair()
    loss, gradient = loss_and_gradient(make(), (model, guide, parameters))
    both = poutine.scale(model, scale=kind(1 / B)), poutine.scale(guide, scale=kind(1 / B)), parameters
    scaled_loss, scaled_gradient = loss_and_gradient(make(), both)
    rounding = 1e-7 if kind is tensor32 else 1e-11
    torch.testing.assert_close(scaled_loss, loss / B, rtol=rounding, atol=0.0)
    torch.testing.assert_close(scaled_gradient, gradient / B, rtol=rounding, atol=1e-8)


def test_scale_of_both_programs_is_inside_in_pyro() -> None:
    model, guide, _ = check_pair()
    noise = torch.randn(50, B, 1, dtype=torch.float64)
    both = [poutine.scale(program, scale=1 / B) for program in (model, guide)]
    theirs = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    with Draws(z=noise):
        ours, expected = IWAE(50).loss(*both, X), IWAE(50).loss(model, guide, X) / B
        assert abs(theirs.loss(*both, X) - float(expected)) > 0.05
    torch.testing.assert_close(ours, expected, **CLOSE)


@kinds
def test_scale_of_both_programs_and_a_kl_weight(kind: Callable[[Any], Any]) -> None:
    expected, _ = loss_and_gradient(IWAE(4, kl_weight=0.5), check_pair())
    model, guide, parameters = check_pair(kind(0.5), kind(0.5))
    both = poutine.scale(model, scale=kind(0.25)), poutine.scale(guide, scale=kind(0.25)), parameters
    torch.testing.assert_close(loss_and_gradient(IWAE(4), both)[0], 0.25 * expected, rtol=1e-7, atol=0.0)


def two_views(first: Any, second: Any) -> Program:
    """Return a model of x seen twice, each with a scale of its own."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            for name, scale in (("x", first), ("y", second)):
                with scaled(scale):
                    pyro.sample(name, dist.Normal(z, 1.0).to_event(1), obs=x)

    return model


@kinds
def test_scale_of_both_programs_with_two_observed_sites(kind: Callable[[Any], Any]) -> None:
    model, (_, guide, parameters) = two_views(None, None), check_pair()
    expected, _ = loss_and_gradient(IWAE(4), (model, guide, parameters))
    both = poutine.scale(model, scale=kind(0.25)), poutine.scale(guide, scale=kind(0.25)), parameters
    torch.testing.assert_close(loss_and_gradient(IWAE(4), both)[0], 0.25 * expected, rtol=1e-7, atol=0.0)


@kinds
def test_scales_of_two_observed_sites_weigh_their_likelihoods(kind: Callable[[Any], Any]) -> None:
    found = value(KL_ELBO(2), two_views(kind(0.25), None), check_pair()[1])
    assert found == pytest.approx(1.25 * RECONSTRUCTION - KL, rel=1e-7)


# Subsampling plates


@every
def test_subsampling_plate_multiplies_the_loss(make: Callable[[], Estimator]) -> None:
    loss, gradient = loss_and_gradient(make(), check_pair())
    batch = check_pair(size=1000, subsample=torch.arange(B))
    found, found_gradient = loss_and_gradient(make(), batch)
    torch.testing.assert_close(found, 100 * loss, **CLOSE)
    torch.testing.assert_close(found_gradient, 100 * gradient, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("make", [EVERY[name] for name in EVERY if name != "WakeSleep"])  # draws by itself
def test_subsampling_plate_that_draws_its_indices(make: Callable[[], Estimator]) -> None:
    noise = torch.randn(4, B, 1, dtype=torch.float64)
    estimator = make()
    with Draws(z=noise):
        loss = estimator.loss(*check_pair()[:2], X)
        found = estimator.loss(*check_pair(size=1000, subsample_size=B)[:2], X)
    torch.testing.assert_close(found, 100 * loss, **CLOSE)


def test_importance_weighted_bound_of_a_subsample_is_a_bound_here_but_not_in_pyro() -> None:
    model, guide, _ = check_pair(size=1000, subsample_size=B)
    noise = torch.randn(50, B, 1, dtype=torch.float64)
    theirs = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    with Draws(z=noise):
        unscaled = -float(IWAE(50).loss(*check_pair()[:2], X))
        ours, other = -float(IWAE(50).loss(model, guide, X)), -theirs.loss(model, guide, X)
    assert ours == pytest.approx(100 * unscaled, rel=1e-12)
    assert other > 100 * EVIDENCE + 1000  # -320 beside -1864


@example(k=3, n=10, extra=4, weight=0.1, side="model")  # 14 / 10 * 3 / 3 is not 14 / 10 to the last digit
@given(
    k=st.integers(1, 7),
    n=st.integers(1, B),
    extra=st.integers(0, 50),
    weight=st.floats(0.01, 3.0),
    side=st.sampled_from(["both", "model", "guide"]),
)
def test_any_weight_in_any_plate(k: int, n: int, extra: int, weight: float, side: str) -> None:
    sides = (weight if side != "guide" else None, weight if side != "model" else None)
    batch = check_pair(*sides, size=n + extra, subsample=torch.arange(n))
    found, _ = loss_and_gradient(IWAE(k), batch, X[:n])
    expected, _ = loss_and_gradient(IWAE(k, kl_weight=weight), check_pair(), X[:n])
    torch.testing.assert_close(found, (n + extra) / n * expected, **CLOSE)


@pytest.mark.parametrize(
    ("of_model", "of_guide"),
    [({"size": 1000, "subsample_size": B}, {}), ({}, {"size": 1000, "subsample_size": B})],
    ids=["model of N, guide of B", "model of B, guide of N"],
)
@pytest.mark.parametrize("estimator", [KL_ELBO(), IWAE(2), STL_ELBO(), VIMCO(2)], ids=name_of)
def test_plates_of_different_sizes_are_refused(
    estimator: Estimator, of_model: dict[str, int], of_guide: dict[str, int]
) -> None:
    message = (
        r"^site 'z': expected the plate scale N / B = .*: model and guide disagree on the data's number$"
    )
    with pytest.raises(ValueError, match=message):
        estimator.loss(check_pair(**of_model)[0], check_pair(**of_guide)[1], X)


@pytest.mark.parametrize(
    ("elbo", "expected"),
    [
        (Trace_ELBO, 100 * (RECONSTRUCTION + LOG_PRIOR) - LOG_Q),  # -2845
        (TraceMeanField_ELBO, 100 * RECONSTRUCTION - KL),  # -1708
    ],
)
def test_plates_of_different_sizes_are_taken_by_pyro(elbo: Any, expected: float) -> None:
    model, guide = check_pair(size=1000, subsample_size=B)[0], check_pair()[1]
    found = value(elbo(num_particles=2, vectorize_particles=True, max_plate_nesting=1), model, guide)
    assert found == pytest.approx(expected, rel=1e-12)
    assert abs(expected - 100 * (RECONSTRUCTION - KL)) > 400


# Masks


def masked_pair(mask: Tensor, way: str) -> tuple[Program, Program]:
    """Return the check model and its guide, masked by a handler or in their distributions."""
    model, guide, _ = check_pair()
    if way == "handler":
        return poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)

    def masked_model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(mask), obs=x)

    def masked_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x + 0.2, 0.5).to_event(1).mask(mask))

    return masked_model, masked_guide


def objective(estimator: Estimator, model: Program, guide: Program) -> Tensor:
    """Return the objective per datum, at seed 3."""
    torch.manual_seed(3)
    scores = score(model, guide, X, num_particles=4, gradient=estimator.gradient)
    estimator.check(scores)
    return estimator.objective(scores, 1.0).detach()


MASK = torch.arange(B) % 3 != 0


@pytest.mark.parametrize("way", ["handler", "distribution"])
@weighted
def test_masked_data_have_an_objective_of_zero(make: Callable[[float], Estimator], way: str) -> None:
    estimator = make(1.0)
    if way == "handler" and isinstance(estimator, KL_ELBO):
        estimator.analytic_kl = False  # a mask leaves no closed form, so none in what it is compared with
    expected = objective(estimator, *check_pair()[:2]) * MASK
    found = objective(estimator, *masked_pair(MASK, way))
    if way == "distribution" or not isinstance(estimator, RelaxedELBO):  # which has no other KL than that
        torch.testing.assert_close(found, expected, **CLOSE)
    assert (found[MASK] != 0).all() and (found[~MASK] == 0).all()


def test_masked_distributions_have_a_closed_form() -> None:
    estimator = KL_ELBO(2)
    estimator.loss(*masked_pair(MASK, "distribution"), X)
    assert estimator.analytic == {"z": True}
    estimator.loss(*masked_pair(MASK, "handler"), X)
    assert estimator.analytic == {"z": False}


@pytest.mark.parametrize("estimator", [KL_ELBO(4), STL_ELBO(4), ScoreFunctionELBO(4)], ids=name_of)
def test_masked_observations_leave_the_kl(estimator: Estimator) -> None:
    _, guide, _ = check_pair()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            with poutine.mask(mask=MASK):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    found, plain = objective(estimator, model, guide), objective(estimator, *check_pair()[:2])
    torch.manual_seed(3)
    scores = score(*check_pair()[:2], X, num_particles=4)
    missing = scores.reconstruction.mean(0).detach() * ~MASK
    torch.testing.assert_close(found, plain - missing, **CLOSE)


# Guides that an estimator can't take


def discrete_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(3)))
        pyro.sample("x", dist.Normal(y[..., :1], 1.0).to_event(1), obs=x)


def discrete_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("y", dist.OneHotCategorical(logits=x * torch.ones(3).to(x)))


def mixture_guide(x: Tensor) -> None:
    locs = torch.stack([0.3 * x, 0.1 * x - 1], -2)
    with pyro.plate("data", len(x), dim=-1):
        parts = dist.Categorical(logits=torch.zeros_like(locs[..., 0]))
        pyro.sample("z", dist.MixtureSameFamily(parts, dist.Normal(locs, 0.5).to_event(1)))


NEEDS_GRADIENTS = {
    name: make for name, make in EVERY.items() if name not in {"TVO", "ScoreFunctionELBO", "VIMCO", "Relaxed"}
}
NEEDS_GRADIENTS.pop("WakeSleep")


@pytest.mark.parametrize(
    ("model", "guide", "found"),
    [
        (discrete_model, discrete_guide, "site 'y'.*OneHotCategorical"),
        (check_pair()[0], mixture_guide, "site 'z'.*MixtureSameFamily"),
    ],
    ids=["discrete", "mixture"],
)
@pytest.mark.parametrize("make", NEEDS_GRADIENTS.values(), ids=NEEDS_GRADIENTS)
def test_site_without_a_gradient_is_named_with_what_to_use(
    make: Callable[[], Estimator], model: Program, guide: Program, found: str
) -> None:
    pattern = f"^{found}.*; use VIMCO .*, EnumELBO or RelaxedELBO$"
    with pytest.raises(ValueError, match=pattern):
        make().loss(model, guide, X)


@pytest.mark.parametrize("instead", [VIMCO(2), EnumELBO(), RelaxedELBO()], ids=name_of)
def test_what_the_error_names_takes_the_discrete_site(instead: Any) -> None:
    assert math.isfinite(float(instead.loss(discrete_model, discrete_guide, X)))


@pytest.mark.parametrize("plate", [{}, {"size": 1000, "subsample_size": B}], ids=["whole", "subsample"])
@pytest.mark.parametrize("estimator", [KL_ELBO(), IWAE(2), STL_ELBO(), WakeSleep(2)], ids=name_of)
def test_global_latent_is_named(estimator: Estimator, plate: dict[str, int]) -> None:
    model, guide, _ = check_pair(**plate)

    def with_global(program: Program) -> Program:
        def run(x: Tensor) -> None:
            pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
            program(x)

        return run

    with pytest.raises(ValueError, match=r"site 'mean': expected per-datum randomness in `pyro.plate\("):
        estimator.loss(with_global(model), with_global(guide), X)


@pytest.mark.parametrize("estimator", [KL_ELBO(), IWAE(2), STL_ELBO()], ids=name_of)
def test_sites_that_only_one_program_has_are_named(estimator: Estimator) -> None:
    model, guide, _ = check_pair()

    def renamed(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("w", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide: lacks the model's latent sites \['z'\]; it has \['w'\]"):
        estimator.loss(model, renamed, X)

    def larger(x: Tensor) -> None:
        guide(x)
        with pyro.plate("more data", len(x), dim=-1):
            pyro.sample("w", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide: site 'w' is no latent site of the model: \['z'\]"):
        estimator.loss(model, larger, X)
    with pytest.raises(ValueError, match="model: expected an observed site"):
        estimator.loss(guide, guide, X)


# Guides that are run twice


class TwoSites(nn.Module):
    """A guide that draws z1 given x, then z2 given z1."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Identity() if layer is None else layer
        self.one, self.two = nn.Linear(1, 2), nn.Linear(1, 2)
        self.double()

    def forward(self, x: Tensor) -> None:
        h = self.layer(x)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.one(h).chunk(2, -1)
            z1 = pyro.sample("z1", dist.Normal(loc, log_scale.exp()).to_event(1))
            loc, log_scale = self.two(z1).chunk(2, -1)
            pyro.sample("z2", dist.Normal(loc, log_scale.exp()).to_event(1))


def two_site_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)


TWICE = {
    "STL": lambda: STL_ELBO(4),
    "DReG": lambda: DReG(4),
    "IWAE": lambda: IWAE(4, stick_the_landing=True),
}
run_twice = pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)


def of_module(guide: nn.Module) -> Program:
    def run(x: Tensor) -> None:
        pyro.module("guide", guide)
        guide(x)

    return run


FORMS: dict[str, Callable[[nn.Module], Program]] = {
    "module": lambda guide: guide,
    "function": of_module,
    "function in a store of its own": lambda guide: in_own_store(of_module(guide)),
    "unregistered": lambda guide: lambda x: guide(x),
    "bound method": lambda guide: guide.forward,
    "handler": lambda guide: poutine.scale(guide, scale=1.0),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_path_gradient_of_a_two_site_guide_in_any_form(form: Callable[[nn.Module], Program]) -> None:
    guide = TwoSites()
    noise = {name: torch.randn(1, B, 1, dtype=torch.float64) for name in ("z1", "z2")}
    with Draws(**noise):
        STL_ELBO().loss_and_grads(two_site_model, form(guide), X)
    found = [p.grad for p in guide.parameters()]
    assert all(p.requires_grad for p in guide.parameters())
    # by hand: the parameters in log q are constants
    loc1, log1 = guide.one(X).chunk(2, -1)
    z1 = loc1 + log1.exp() * noise["z1"]
    loc2, log2 = guide.two(z1).chunk(2, -1)
    z2 = loc2 + log2.exp() * noise["z2"]
    log_q = dist.Normal(loc1.detach(), log1.detach().exp()).log_prob(z1)
    constant = nn.functional.linear(z1, guide.two.weight.detach(), guide.two.bias.detach())
    log_q = log_q + dist.Normal(constant[..., :1], constant[..., 1:].exp()).log_prob(z2)
    log_p = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(z2, 1.0).log_prob(z1)
    log_p = log_p + dist.Normal(z1, 1.0).log_prob(X)
    expected = torch.autograd.grad((log_q - log_p).sum(), list(guide.parameters()))
    torch.testing.assert_close(found, list(expected), **CLOSE)


def test_path_gradient_by_torch_func() -> None:
    guide = TwoSites()
    parameters = {name: p.detach().clone() for name, p in guide.named_parameters()}
    noise = {name: torch.randn(1, B, 1, dtype=torch.float64) for name in ("z1", "z2")}

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guide = guide

        def forward(self, x: Tensor) -> Tensor:
            return -score(two_site_model, self.guide, x, gradient="path").log_weights().sum()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        named = {f"guide.{name}": p for name, p in parameters.items()}
        return torch.func.functional_call(Pair(), named, (X,))

    with Draws(**noise), pyro.validation_enabled(False):
        found = torch.func.grad(loss)(parameters)
        STL_ELBO().loss_and_grads(two_site_model, guide, X)
    for name, parameter in guide.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **CLOSE)


@run_twice
def test_dropout_in_training_is_refused(make: Callable[[], Estimator]) -> None:
    guide = TwoSites(nn.Dropout(0.5))
    message = (
        "sites ['z1', 'z2']: expected a guide that draws nothing but its sites, since it is run twice, "
        "got one with dropout or other noise; use KL_ELBO or IWAE, or call `.eval()` on it"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make().loss(two_site_model, guide, X)
    for instead in (KL_ELBO(analytic_kl=False), IWAE(2)):
        assert torch.isfinite(instead.loss(two_site_model, guide, X))
    assert torch.isfinite(make().loss(two_site_model, guide.eval(), X))


@run_twice
def test_batch_normalisation_counts_a_batch_once(make: Callable[[], Estimator]) -> None:
    guide = TwoSites(nn.BatchNorm1d(1))
    layer: Any = guide.layer
    for step in (1, 2):
        make().loss_and_grads(two_site_model, guide, X)
        assert layer.num_batches_tracked == step
        kept = 0.9**step
        torch.testing.assert_close(layer.running_mean, (1 - kept) * X.mean(0), **CLOSE)
        torch.testing.assert_close(layer.running_var, kept + (1 - kept) * X.var(0), **CLOSE)
    assert layer.training and layer.track_running_stats


class PlanarGuide(nn.Module):
    """A guide with a planar flow, which scores the draw it has just made and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = dist.transforms.Planar(1).double()

    def forward(self, x: Tensor) -> None:
        base = dist.Normal(0.3 * x, 0.5).to_event(1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@run_twice
def test_flow_that_scores_no_other_draw_is_refused(make: Callable[[], Estimator]) -> None:
    model, guide = check_pair()[0], PlanarGuide()
    message = (
        r"^sites \['z'\]: expected distributions in the guide that can score a value (that|which) "
        r"they have not drawn, got \['TransformedDistribution'\]; use KL_ELBO or IWAE$"
    )
    with pytest.raises(ValueError, match=message):
        make().loss(model, guide, X)
    for instead in (KL_ELBO(), IWAE(2)):
        loss = instead.loss_and_grads(model, guide, X)
        assert torch.isfinite(loss)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


@pytest.mark.parametrize("flow", ["affine_autoregressive", "affine_coupling"])
def test_path_gradient_of_a_flow(flow: str) -> None:
    # in float32: Pyro inverts the autoregressive flow in the default dtype alone
    layer: Any = getattr(dist.transforms, flow)(2, hidden_dims=[4])
    constant: Any = getattr(dist.transforms, flow)(2, hidden_dims=[4])
    constant.load_state_dict(layer.state_dict())
    for parameter in constant.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(B, 2)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                base = dist.Normal(0.3 * x, 0.5).to_event(1)
                pyro.sample("z", dist.TransformedDistribution(base, [self.layer]))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    torch.manual_seed(3)
    STL_ELBO().loss_and_grads(model, Guide(), x)
    found = [p.grad for p in layer.parameters()]
    base = dist.Normal(0.3 * x, 0.5).to_event(1)
    torch.manual_seed(3)
    z = dist.TransformedDistribution(base, [layer]).rsample()
    log_q = dist.TransformedDistribution(base, [constant]).log_prob(z + 0.0)  # no draw of its own
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    expected = torch.autograd.grad(log_q.sum() - log_p.sum(), list(layer.parameters()))
    torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-4)


# Settings


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KL_ELBO(0), ValueError, "num_particles: expected a whole number above 0, got 0"),
        (lambda: STL_ELBO(-1), ValueError, "num_particles: expected a whole number above 0, got -1"),
        (lambda: IWAE(2.5), TypeError, "num_particles: expected a whole number above 0, got 2.5"),
        (lambda: VIMCO(True), TypeError, "num_particles: expected a whole number above 0, got True"),
        (lambda: IWAE(kl_weight=-0.1), ValueError, "kl_weight: expected a finite number from 0, got -0.1"),
        (lambda: DReG(kl_weight=math.nan), ValueError, "kl_weight: expected a finite number from 0, got nan"),
        (lambda: KL_ELBO(kl_weight="1"), TypeError, "kl_weight: expected a number from 0, got '1'"),
        (lambda: Renyi(alpha=math.nan), ValueError, "alpha: expected a number, got nan"),
        (lambda: DReG(alpha=math.nan), ValueError, "alpha: expected a number, got nan"),
        (lambda: DReG(alpha=math.inf), ValueError, "alpha: expected a finite number, got inf"),
        (lambda: CIWAE(beta=1.5), ValueError, "beta: expected a share in [0, 1], got 1.5"),
        (lambda: CIWAE(beta=-0.5), ValueError, "beta: expected a finite number from 0, got -0.5"),
        (
            lambda: MIWAE(16, num_groups=3),
            ValueError,
            "num_groups: expected a divisor of num_particles=16, got 3",
        ),
        (
            lambda: PIWAE(16, num_groups=3),
            ValueError,
            "num_groups: expected a divisor of num_particles=16, got 3",
        ),
        (lambda: MIWAE(num_groups=0), ValueError, "num_groups: expected a whole number above 0, got 0"),
        (
            lambda: BetaTC_ELBO(10, sampling="stratifed"),
            ValueError,
            "sampling: unknown 'stratifed' (did you mean 'stratified'?); expected one of 'weighted', "
            "'stratified'",
        ),
        (
            lambda: DIP_ELBO(kind="i"),
            ValueError,
            "kind: unknown 'i' (did you mean 'I'?); expected one of 'I', 'II'",
        ),
        (
            lambda: KL_ELBO(free_bits_per="dimensions"),
            ValueError,
            "free_bits_per: unknown 'dimensions' (did you mean 'dimension'?); expected one of 'dimension', "
            "'site'",
        ),
    ],
)
def test_wrong_settings(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make()


def test_a_weight_of_the_likelihood_alone_is_inside_the_logarithm() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = check_pair()[1]
    torch.manual_seed(3)
    plain = score(*check_pair()[:2], X, num_particles=7)
    torch.manual_seed(3)
    scores = score(model, guide, X, num_particles=7)
    expected = (0.5 * plain.reconstruction - plain.kl("z")).logsumexp(0) - math.log(7)
    torch.testing.assert_close(IWAE(7).objective(scores, 1.0), expected, **CLOSE)
    assert scores.scale == 1
