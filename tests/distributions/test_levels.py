"""Tests of categories over levels in [0, 1]."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ppl_vae.distributions.levels import CategoricalLevels, Levels


@given(levels=st.integers(2, 4096))
def test_every_level_is_in_the_support_in_any_precision_and_the_middle_of_two_is_not(levels: int) -> None:
    for dtype in (torch.float32, torch.float64):
        k = torch.arange(levels, dtype=dtype)
        assert Levels(levels).check(k / (levels - 1)).all()
        assert Levels(levels).check(k * (1 / (levels - 1))).all()
        assert not Levels(levels).check((k + 0.5) / (levels - 1)).any()


@pytest.mark.parametrize("value", [-1 / 255, 256 / 255, float("nan"), float("inf"), 3.0, 0.503])
def test_what_is_no_level_is_outside_the_support(value: float) -> None:
    assert not Levels(256).check(torch.tensor(value))
    with pytest.raises(ValueError, match=r"support \(Levels\(k / 255 for whole k from 0 to 255\)\)"):
        CategoricalLevels(torch.zeros(256)).log_prob(torch.tensor(value))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("size", [0.0, 1.0, 100.0, 1e4])
def test_probabilities_sum_to_one_also_at_extreme_logits(
    dtype: torch.dtype, close: float, size: float
) -> None:
    distribution = CategoricalLevels(size * torch.randn(50, 256, dtype=dtype))
    x = (torch.arange(256, dtype=dtype) / 255)[:, None]
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (256, 50)
    torch.testing.assert_close(log_prob.exp().sum(0), torch.ones(50, dtype=dtype), rtol=0, atol=close)


def test_moments_are_those_of_the_probabilities() -> None:
    distribution = CategoricalLevels(torch.randn(3, 4, 7).double())
    x = torch.arange(7).double() / 6
    p = distribution.log_prob(x[:, None, None]).exp()
    mean = (p * x[:, None, None]).sum(0)
    torch.testing.assert_close(distribution.mean, mean)
    torch.testing.assert_close(distribution.variance, (p * x[:, None, None] ** 2).sum(0) - mean**2)


def test_draws_have_the_probabilities_and_are_levels() -> None:
    distribution = CategoricalLevels(torch.tensor([0.0, 1.0, -1.0, 0.5, -3.0]))
    torch.manual_seed(0)
    x = distribution.sample((20_000,))
    assert Levels(5).check(x).all()
    counts = (4 * x).round().long().bincount(minlength=5)
    expected = 20_000 * distribution.logits.double().softmax(-1)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_expands_and_keeps_the_particles_apart() -> None:
    distribution = CategoricalLevels(torch.randn(3, 5))
    expanded = distribution.expand((2, 3))
    assert (expanded.batch_shape, expanded.sample((4,)).shape) == ((2, 3), (4, 2, 3))
    x = distribution.sample()
    assert torch.equal(expanded.log_prob(x), distribution.log_prob(x).expand(2, 3))
