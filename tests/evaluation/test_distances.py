"""Tests of distances between samples: against brute force, scikit-learn and the closed forms of normals."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from ppl_vae.evaluation import distances
from ppl_vae.evaluation.distances import median_distance, sliced_wasserstein, squared_mmd


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def brute_force_w2(x: Tensor, y: Tensor) -> float:
    """Match draws, each as often as makes both samples as many."""
    x, y = x.repeat_interleave(len(y), 0), y.repeat_interleave(len(x), 0)
    cost = torch.cdist(x, y).square().numpy()
    rows, columns = linear_sum_assignment(cost)
    return math.sqrt(float(cost[rows, columns].mean()))


# -- sliced Wasserstein ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(m=st.integers(1, 9), k=st.integers(1, 9))
def test_in_one_dimension_sliced_wasserstein_is_the_best_matching_of_samples_of_any_sizes(
    m: int, k: int
) -> None:
    x, y = torch.randn(m, 1).double(), torch.randn(k, 1).double() + 1
    assert float(sliced_wasserstein(x, y)) == pytest.approx(brute_force_w2(x, y), rel=1e-9, abs=1e-9)
    assert float(sliced_wasserstein(y, x)) == pytest.approx(float(sliced_wasserstein(x, y)), rel=1e-9)


@pytest.mark.parametrize("dims", [1, 2, 3, 7])
def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimensions_without_noise(
    dims: int,
) -> None:
    x, shift = torch.randn(50, dims).double(), torch.randn(dims).double()
    exact = float(shift.norm()) / math.sqrt(dims)
    for seed in range(3):
        assert float(sliced_wasserstein(x, x + shift, num_projections=5, seed=seed)) == pytest.approx(exact)


def test_sliced_wasserstein_of_two_normals_with_other_means_and_scales_is_the_closed_form() -> None:
    # seed 0 of the fixture; 30 pairs of samples; the bias of m draws is that of two equal normals or less
    shift, scale, m = torch.tensor([1.0, -0.5, 0.25]), 1.6, 800
    x, y = torch.randn(30, m, 3), shift + scale * torch.randn(30, m, 3)
    exact = float(shift.square().sum()) / 3 + (scale - 1) ** 2
    mean, error = mean_and_error(sliced_wasserstein(x, y, num_projections=30).square())
    noise = float(sliced_wasserstein(x, torch.randn(30, m, 3), num_projections=30).square().mean())
    assert noise < 0.02
    assert -4 * error < mean - exact < 4 * error + scale**2 * noise and error < 0.02


def test_directions_are_uniform_so_that_an_elongated_normal_has_the_integral_over_the_circle() -> None:
    # W_2^2 of direction (cos t, sin t) between N(0, I) and N(0, diag(9, 1)) is (sqrt(9 cos^2 + sin^2) - 1)^2
    angle = torch.linspace(0, 2 * math.pi, 2001).double()[:-1]
    exact = float(((9 * angle.cos() ** 2 + angle.sin() ** 2).sqrt() - 1).square().mean())
    x, y = torch.randn(20, 1000, 2), torch.randn(20, 1000, 2) * torch.tensor([3.0, 1.0])
    pairs = enumerate(zip(x, y, strict=True))
    values = [sliced_wasserstein(a, b, num_projections=200, seed=i).square() for i, (a, b) in pairs]
    mean, error = mean_and_error(torch.stack(values))
    assert abs(mean - exact) < 4 * error + 0.02 and error < 0.04


def test_sliced_wasserstein_of_equal_samples_is_zero_and_falls_with_the_draws_for_equal_distributions() -> (
    None
):
    x = torch.randn(4, 100, 3)
    assert float(sliced_wasserstein(x, x.flip(-2)).abs().max()) == 0.0
    few, many = (sliced_wasserstein(*torch.randn(2, 20, m, 3)).square().mean() for m in (60, 1500))
    assert float(many) < float(few) / 10 and float(many) < 0.02  # the bias is of order 1 / m


# -- MMD ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(m=st.integers(2, 12), k=st.integers(2, 12), dims=st.integers(1, 4))
def test_squared_mmd_is_the_u_statistic_of_the_kernel_of_scikit_learn(m: int, k: int, dims: int) -> None:
    x, y, h = torch.randn(m, dims).double(), torch.randn(k, dims).double() + 0.5, 0.8
    xx, yy, xy = (
        torch.from_numpy(rbf_kernel(a.numpy(), b.numpy(), gamma=1 / (2 * h**2)))
        for a, b in ((x, x), (y, y), (x, y))
    )
    exact = (xx.sum() - m) / (m * (m - 1)) + (yy.sum() - k) / (k * (k - 1)) - 2 * xy.mean()
    assert float(squared_mmd(x, y, bandwidth=h)) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 1.0), (0.3, 1.7)])
def test_squared_mmd_of_two_normals_is_the_closed_form_without_bias_even_of_few_draws(
    shift: float, scale: float
) -> None:
    h, dims = 1.3, 2

    def mean_kernel(variance: float, distance: float) -> float:
        s = h**2 + variance
        return (h**2 / s) ** (dims / 2) * math.exp(-dims * distance**2 / (2 * s))

    exact = mean_kernel(2, 0) + mean_kernel(2 * scale**2, 0) - 2 * mean_kernel(1 + scale**2, shift)
    x, y = torch.randn(1500, 20, dims), shift + scale * torch.randn(1500, 25, dims)
    mean, error = mean_and_error(squared_mmd(x, y, bandwidth=h))
    assert abs(mean - exact) < 4 * error < 0.01


def test_the_default_bandwidth_is_the_median_distance_of_both_samples_together() -> None:
    x, y = torch.randn(2, 3, 30, 2).double()
    both = torch.cat([x, y + 1], -2)
    exact = torch.stack([torch.pdist(part).median() for part in both])
    torch.testing.assert_close(median_distance(both), exact)
    torch.testing.assert_close(squared_mmd(x, y + 1), squared_mmd(x, y + 1, bandwidth=exact))
    assert float(squared_mmd(torch.ones(3, 2), torch.ones(4, 2))) == pytest.approx(0, abs=1e-12)


def test_the_median_distance_of_many_draws_is_that_of_some_of_them() -> None:
    x = torch.randn(2, 3000, 1)
    exact = 2 * 0.6744897501960817 / math.sqrt(2)  # |a - b| of normals is sqrt(2) |normal|
    assert (median_distance(x) - exact).abs().max() < 0.1


# -- both --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(batch=st.lists(st.integers(1, 3), max_size=2), m=st.integers(2, 7), dims=st.integers(1, 4))
def test_a_batch_of_pairs_has_the_distances_of_each_pair(batch: list[int], m: int, dims: int) -> None:
    x, y = torch.randn(*batch, m, dims), torch.randn(*batch, m + 1, dims)
    for distance in (sliced_wasserstein, squared_mmd):
        together = distance(x, y)
        assert together.shape == tuple(batch) and together.dtype == torch.float64
        apart = [
            distance(a, b) for a, b in zip(x.reshape(-1, m, dims), y.reshape(-1, m + 1, dims), strict=True)
        ]
        torch.testing.assert_close(together.reshape(-1), torch.stack(apart))


def test_the_size_of_a_block_does_not_change_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(2, 3, 40, 2)
    before = sliced_wasserstein(x, y), squared_mmd(x, y), median_distance(x)
    monkeypatch.setattr(distances, "_BLOCK", 100)
    torch.testing.assert_close((sliced_wasserstein(x, y), squared_mmd(x, y), median_distance(x)), before)


def test_distances_leave_the_random_stream_alone_and_repeat() -> None:
    x, y = torch.randn(2, 30, 3)
    state = torch.get_rng_state()
    first = sliced_wasserstein(x, y, num_projections=3), squared_mmd(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sliced_wasserstein(x, y, num_projections=3), first[0])
    assert not torch.equal(sliced_wasserstein(x, y, num_projections=3, seed=1), first[0])


@pytest.mark.parametrize("distance", [sliced_wasserstein, squared_mmd])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        ([[1.0]], torch.ones(2, 2), TypeError, "x: expected a tensor of floats"),
        (torch.ones(2, 2), torch.ones(2, 2).long(), TypeError, "y: expected a tensor of floats"),
        (torch.ones(2), torch.ones(2), ValueError, "x: expected draws"),
        (torch.ones(2, 2), torch.ones(0, 2), ValueError, "y: expected draws"),
        (torch.ones(2, 2), torch.full((2, 2), math.nan), ValueError, "y: expected finite draws"),
        (torch.ones(2, 2), torch.ones(2, 3), ValueError, "y: expected the batch and the dimensions"),
        (torch.ones(1, 2, 2), torch.ones(2, 2, 2), ValueError, "y: expected the batch and the dimensions"),
    ],
)
def test_wrong_draws_are_named(distance: Any, x: Any, y: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        distance(x, y)


def test_wrong_settings_are_named() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="num_projections"):
        sliced_wasserstein(x, x, num_projections=0)
    with pytest.raises(ValueError, match="seed"):
        sliced_wasserstein(x, x, seed=-1)
    with pytest.raises(ValueError, match="y: expected 2 draws"):
        squared_mmd(x, x[:1])
    with pytest.raises(ValueError, match="x: expected 2 draws"):
        median_distance(x[:1])
    for bandwidth in (0.0, -1.0, torch.tensor(0.0), torch.tensor(math.nan), torch.ones(3)):
        with pytest.raises(ValueError, match="bandwidth"):
            squared_mmd(x, x, bandwidth=bandwidth)
