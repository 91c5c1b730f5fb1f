"""Tests of Pareto smoothing: against ArviZ, known tails and the edge cases."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppl_vae.evaluation import pareto
from ppl_vae.evaluation.pareto import pareto_k_hat, pareto_smooth, tail_size


def by_arviz(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return smoothed weights ``[K, m]`` and k-hat ``[m]``, column by column."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
        smoothed, k_hat = zip(
            *(arviz.psislw(column.numpy(), normalize=False) for column in log_weights.double().T), strict=True
        )
    k = torch.tensor([float(k) for k in k_hat], dtype=torch.float64)
    return torch.stack([torch.from_numpy(s) for s in smoothed], 1), k


@settings(deadline=None, max_examples=25)
@given(
    draws=st.integers(25, 400),
    columns=st.integers(1, 4),
    spread=st.floats(0.05, 20.0),
    seed=st.integers(0, 1000),
)
def test_smoothed_weights_and_k_hat_are_those_of_arviz_in_every_column(
    draws: int, columns: int, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_weights = spread * torch.randn(draws, columns, generator=generator, dtype=torch.float64) - 300
    smoothed, k_hat = pareto_smooth(log_weights)
    expected, expected_k = by_arviz(log_weights)
    torch.testing.assert_close(smoothed, expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(k_hat, expected_k, rtol=1e-9, atol=1e-9)


def test_columns_with_ties_and_impossible_draws_are_those_of_arviz() -> None:
    torch.manual_seed(0)
    log_weights = 2 * torch.randn(200, 6, dtype=torch.float64)
    log_weights[:, 1] = log_weights[:, 1].round()  # ties at the cutoff
    log_weights[::2, 2] = -math.inf
    log_weights[: 200 - 12, 3] = -math.inf  # the tail is what is left
    log_weights[: 200 - 4, 4] = -math.inf  # too few for a fit
    log_weights[5, 5] = 900.0  # all others are nothing beside it
    smoothed, k_hat = pareto_smooth(log_weights)
    expected, expected_k = by_arviz(log_weights)
    assert math.isinf(expected_k[4]) and math.isinf(expected_k[5])
    # which of equal draws gets which of the fit's values is arbitrary
    torch.testing.assert_close(smoothed[:, 1].sort()[0], expected[:, 1].sort()[0], rtol=1e-10, atol=1e-8)
    smoothed[:, 1] = expected[:, 1]
    torch.testing.assert_close(smoothed, expected, rtol=1e-10, atol=1e-8)
    torch.testing.assert_close(k_hat, expected_k, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(smoothed[:, 4:], log_weights[:, 4:])


@pytest.mark.parametrize("tail", [0.3, 0.9])
def test_k_hat_finds_the_shape_of_pareto_weights(tail: float) -> None:
    # log of Pareto draws of shape k; k-hat of M tail draws has standard error (1 + k) / sqrt(M) and is drawn
    # to 1/2 by ten draws
    torch.manual_seed(0)
    draws, columns = 10_000, 200
    log_weights = -tail * torch.rand(draws, columns, dtype=torch.float64).log()
    m = tail_size(draws)
    expected = (m * tail + 10 * 0.5) / (m + 10)
    k_hat = pareto_k_hat(log_weights)
    se = (1 + tail) / math.sqrt(m)
    # the Pareto distribution is a generalised one above any threshold; the fit's bias is of order 1 / M
    assert abs(float(k_hat.mean()) - expected) < 4 * se / math.sqrt(columns) + 1 / m
    assert 0.7 * se < float(k_hat.std()) < 1.3 * se


def test_columns_are_fitted_apart_whatever_the_size_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    log_weights = torch.randn(100, 3, 4, dtype=torch.float64)
    smoothed, k_hat = pareto_smooth(log_weights)
    assert smoothed.shape == (100, 3, 4) and k_hat.shape == (3, 4)
    monkeypatch.setattr(pareto, "_MOST_ELEMENTS", 1)
    for found, expected in zip(pareto_smooth(log_weights), (smoothed, k_hat), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(pareto_smooth(log_weights[:, 1, 2])[1], k_hat[1, 2])


def test_smoothing_keeps_the_order_of_draws_the_body_and_the_largest_weight() -> None:
    torch.manual_seed(0)
    log_weights = 3 * torch.randn(500, dtype=torch.float64)
    smoothed, k_hat = pareto_smooth(log_weights)
    assert bool(k_hat.isfinite())
    assert smoothed.argsort().equal(log_weights.argsort())
    body = log_weights.argsort()[: -tail_size(500)]
    assert smoothed[body].equal(log_weights[body])
    assert bool((smoothed <= log_weights.max() + 1e-12).all())
    assert not smoothed.equal(log_weights)


def test_constant_weights_have_no_tail_and_too_few_draws_tell_nothing() -> None:
    for constant in (torch.zeros(100), torch.full((100,), -741.3), 3 + 1e-16 * torch.arange(100.0).double()):
        smoothed, k_hat = pareto_smooth(constant)
        assert float(k_hat) == -math.inf
        torch.testing.assert_close(smoothed, constant.double())
    for draws in (1, 2, 20):
        smoothed, k_hat = pareto_smooth(torch.zeros(draws, 2))
        assert k_hat.tolist() == [math.inf] * 2 and smoothed.equal(torch.zeros(draws, 2).double())
    none = torch.full((100,), -math.inf)
    smoothed, k_hat = pareto_smooth(none)
    assert float(k_hat) == math.inf and smoothed.equal(none.double())


def test_the_given_weights_are_left_alone() -> None:
    log_weights = torch.randn(100, 2)
    before = log_weights.clone()
    pareto_smooth(log_weights)
    assert log_weights.equal(before)


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([0.0, math.nan]), torch.tensor([0.0, math.inf]), torch.zeros(0, 3), torch.tensor(1.0)],
)
def test_wrong_weights_are_named(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match="log_weights: expected"):
        pareto_smooth(wrong)
