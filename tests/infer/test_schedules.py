"""Tests of the schedules themselves; those of what an estimator makes of them are in test_elbo.py."""

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from ppl_vae.infer import IWAE, STL_ELBO, CyclicalWarmup, LinearWarmup

steps = st.integers(0, 300)
ends = st.floats(0, 5, width=32)
CLOSE: dict[str, Any] = {"rel": 1e-5, "abs": 1e-5}  # float32, values up to 10


@given(step=steps, of=st.integers(1, 100), start=ends, end=ends)
def test_linear_warmup_is_a_line_and_then_constant(step: int, of: int, start: float, end: float) -> None:
    value = LinearWarmup(of, start, end)(torch.tensor(step))
    assert value.shape == ()
    assert float(value) == pytest.approx(start + (end - start) * min(step / of, 1.0), **CLOSE)


@given(step=steps, period=st.integers(1, 50), ramp=st.floats(0.01, 1), start=ends, end=ends)
def test_cyclical_warmup_is_a_ramp_in_each_period(
    step: int, period: int, ramp: float, start: float, end: float
) -> None:
    value = CyclicalWarmup(period, ramp, start, end)(torch.tensor(step))
    share = min((step % period) / (period * ramp), 1.0)
    assert value.shape == ()
    assert float(value) == pytest.approx(start + (end - start) * share, **CLOSE)


@given(step=steps, period=st.integers(2, 50), ramp=st.floats(0.1, 1))
def test_cycles_repeat_and_start_low(step: int, period: int, ramp: float) -> None:
    schedule = CyclicalWarmup(period, ramp)
    assert schedule(torch.tensor(step)) == schedule(torch.tensor(step + period))
    assert schedule(torch.tensor(period * step)) == 0 < schedule(torch.tensor(period * step + 1))


@given(step=st.integers(0, 300), period=st.integers(2, 50), ramp=st.floats(0.1, 0.9))
def test_a_cycle_rests_at_its_end(step: int, period: int, ramp: float) -> None:
    assume(step % period >= period * ramp)
    assert CyclicalWarmup(period, ramp, start=0.5, end=2.0)(torch.tensor(step)) == 2.0


@pytest.mark.parametrize("schedule", [LinearWarmup(10, 0.2, 3.0), CyclicalWarmup(6, 0.5, 0.2, 3.0)])
def test_no_value_of_a_tensor_is_read(schedule: Any) -> None:
    """A step that has no value in Python, as when a step is traced to be compiled."""
    many = torch.func.vmap(schedule)(torch.arange(20))
    torch.testing.assert_close(many, torch.stack([schedule(torch.tensor(i)) for i in range(20)]))
    assert len(many.unique()) > 3


def test_the_step_is_left_alone() -> None:
    step = torch.tensor(3)
    LinearWarmup(10)(step), CyclicalWarmup(10)(step)
    assert step == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LinearWarmup(0), ValueError, "steps: expected a whole number above 0, got 0"),
        (lambda: LinearWarmup(2.5), TypeError, "steps: expected a whole number above 0, got 2.5"),
        (lambda: LinearWarmup(True), TypeError, "steps: expected a whole number above 0, got True"),
        (lambda: CyclicalWarmup(0), ValueError, "period: expected a whole number above 0, got 0"),
        (lambda: CyclicalWarmup("10"), TypeError, "period: expected a whole number above 0, got '10'"),
        (lambda: CyclicalWarmup(9, 0.0), ValueError, "expected a share of the period in (0, 1], got 0.0"),
        (lambda: CyclicalWarmup(9, 1.1), ValueError, "expected a share of the period in (0, 1], got 1.1"),
    ],
)
def test_wrong_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize("estimator", [IWAE, STL_ELBO])
def test_any_function_of_the_step_is_a_schedule(estimator: Any) -> None:
    elbo = estimator(kl_weight=lambda step: torch.where(step < 2, 0.5, 1.0))
    assert elbo.at_step(elbo.kl_weight) == 0.5
    elbo.step += 2
    assert elbo.at_step(elbo.kl_weight) == 1.0
