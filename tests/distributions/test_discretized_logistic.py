"""Tests of discretised logistic distributions and their mixtures."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from ppl_vae.distributions.discretized_logistic import DiscretizedLogisticMixture

LOCS = [-1e3, -2.0, 0.0, 0.3, 1.0, 1e3]
SCALES = [math.exp(-7), 0.01, 1.0, math.exp(7)]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}


def grid(dtype: torch.dtype, levels: int) -> DiscretizedLogisticMixture:
    """Return every location with every scale, one component each."""
    loc, scale = torch.cartesian_prod(torch.tensor(LOCS, dtype=dtype), torch.tensor(SCALES, dtype=dtype)).T
    return DiscretizedLogisticMixture(torch.zeros_like(loc)[:, None], loc[:, None], scale[:, None], levels)


def mixture(dtype: torch.dtype = torch.float64, levels: int = 9) -> DiscretizedLogisticMixture:
    return DiscretizedLogisticMixture(
        torch.tensor([0.5, -0.5, 0.0], dtype=dtype),
        torch.tensor([0.1, 0.9, 0.5], dtype=dtype),
        torch.tensor([0.05, 0.02, 0.3], dtype=dtype),
        levels,
    )


def values(levels: int, dtype: torch.dtype, dims: int) -> Tensor:
    return (torch.arange(levels, dtype=dtype) / (levels - 1)).reshape(-1, *[1] * dims)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_probabilities_of_all_levels_sum_to_one_also_at_extremes(dtype: torch.dtype, levels: int) -> None:
    for distribution in (grid(dtype, levels), mixture(dtype, levels)):
        x = values(levels, dtype, len(distribution.batch_shape))
        total = distribution.log_prob(x).exp().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=CLOSE[dtype])


def test_log_probabilities_are_differences_of_scipys_distribution_functions() -> None:
    distribution = grid(torch.float64, 17)
    x = values(17, torch.float64, 1)
    loc, scale = distribution.loc[:, 0], distribution.scale[:, 0]
    a, b = (x - 1 / 32 - loc) / scale, (x + 1 / 32 - loc) / scale
    a[0], b[-1] = -math.inf, math.inf
    upper = a > 0  # there 1 - F keeps its precision, below F does
    far, near = torch.where(upper, -b, a), torch.where(upper, -a, b)
    log_far, log_near = (torch.as_tensor(stats.logistic.logcdf(t.numpy())) for t in (far, near))
    expected = log_near + torch.log(-torch.expm1(log_far - log_near))
    # The difference of two neighbours is right to rounding over its own size, as small as 1e-5 here
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=1e-9, atol=1e-9)


def test_float32_keeps_its_precision_where_sigmoids_would_cancel() -> None:
    # 100 scales from the mean both sigmoids are 1 in float32, whose difference would be log 0.
    loc, scale = torch.tensor([[0.1]]), torch.tensor([[0.005]])
    x = values(256, torch.float32, 1)
    single = DiscretizedLogisticMixture(torch.zeros(1, 1), loc, scale, 256).log_prob(x)
    double = DiscretizedLogisticMixture(torch.zeros(1, 1).double(), loc.double(), scale.double(), 256)
    assert single.isfinite().all()
    torch.testing.assert_close(single.double(), double.log_prob(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("levels", [2, 256])
def test_gradients_are_finite_for_all_levels_also_at_extremes(dtype: torch.dtype, levels: int) -> None:
    distribution = grid(dtype, levels)
    leaves = [t.clone().requires_grad_() for t in (distribution.logits, distribution.loc, distribution.scale)]
    log_prob = DiscretizedLogisticMixture(*leaves, levels).log_prob(values(levels, dtype, 1))
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_gradients_are_those_of_finite_differences() -> None:
    m = mixture()
    leaves = [t.clone().requires_grad_() for t in (m.logits, m.loc, m.scale)]
    x = values(9, torch.float64, 0)
    assert torch.autograd.gradcheck(lambda *p: DiscretizedLogisticMixture(*p, 9).log_prob(x), leaves)


def test_mean_is_that_of_the_probabilities() -> None:
    for distribution in (grid(torch.float64, 17), mixture()):
        x = values(distribution.levels, torch.float64, len(distribution.batch_shape))
        expected = (distribution.log_prob(x).exp() * x).sum(0)
        torch.testing.assert_close(distribution.mean, expected, rtol=1e-9, atol=1e-10)


def test_draws_have_the_probabilities_and_are_levels() -> None:
    distribution = mixture()
    torch.manual_seed(0)
    x = distribution.sample((20_000,))
    assert distribution.support.check(x).all()
    counts = (8 * x).round().long().bincount(minlength=9)
    expected = 20_000 * distribution.log_prob(values(9, torch.float64, 0)).exp()
    assert float(expected.min()) > 5  # for the chi-square approximation
    assert stats.chisquare(counts.numpy(), (expected * 20_000 / expected.sum()).numpy()).pvalue > 1e-3


def test_expands_and_keeps_the_particles_apart() -> None:
    distribution = grid(torch.float64, 9)
    expanded = distribution.expand((3, 24))
    assert (expanded.batch_shape, expanded.sample((4,)).shape) == ((3, 24), (4, 3, 24))
    x = distribution.sample()
    assert torch.equal(expanded.log_prob(x), distribution.log_prob(x).expand(3, 24))


def test_grey_values_between_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Levels\(k / 8 for whole k from 0 to 8\)"):
        mixture().log_prob(torch.tensor(0.3).double())
