"""The plot of inference gaps: heights, order, means, and what is refused."""

import math
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppl_vae.evaluation import Estimate
from ppl_vae.evaluation.inference_gaps import InferenceGaps
from ppl_vae.plots.gaps import plot_gaps

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def gaps(approximation: list[float] | Tensor, amortization: list[float] | Tensor) -> InferenceGaps:
    parts = [torch.as_tensor(values, dtype=torch.float64) for values in (approximation, amortization)]
    ends = [-80 - 0 * parts[0], -80 - parts[0], -80 - parts[0] - parts[1]]
    estimates = [Estimate(values, 10, 0.1) for values in (*ends, *parts, parts[0] + parts[1])]
    return InferenceGaps(*estimates, {}, len(parts[0]), 10, "shared", 50, True)


def bars(ax: Axes) -> list[list[tuple[float, float, float]]]:
    """Return left edge, base and top of each bar, by container."""
    containers: list[Any] = list(ax.containers)
    return [
        [(bar.get_x(), bar.get_y(), bar.get_y() + bar.get_height()) for bar in container]
        for container in containers
    ]


def test_bars_are_stacked_in_the_order_of_their_sums() -> None:
    ax = plot_gaps(gaps([1.0, 2.0, 0.5], [0.25, 3.0, 2.0]), ax=Figure().subplots())
    lower, upper = bars(ax)
    assert lower == [(0.5, 0, 2.0), (1.5, 0, 0.5), (2.5, 0, 1.0)]
    assert upper == [(0.5, 2.0, 5.0), (1.5, 0.5, 2.5), (2.5, 1.0, 1.25)]
    lines = [line.get_ydata()[0] for line in ax.lines]  # type: ignore[index]
    assert lines == pytest.approx([3.5 / 3, 8.75 / 3, 0.0])
    legend = ax.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0].startswith("amortisation gap 1.75 ± ") and texts[1] == "approximation gap 1.17 ± 0.44"
    assert ax.get_ylim()[0] == 0 or ax.get_ylim()[0] < 0
    assert "3 data" in ax.get_title()


def test_negative_gaps_go_down_from_zero() -> None:
    ax = plot_gaps(gaps([-0.5, 1.0], [2.0, -0.25]), ax=Figure().subplots())
    lower, upper = bars(ax)
    assert lower == [(0.5, 0, -0.5), (1.5, 0, 1.0)]
    assert upper == [(0.5, 0, 2.0), (1.5, 0, -0.25)]
    both = plot_gaps(gaps([-0.5], [-0.25]), ax=Figure().subplots())
    assert bars(both) == [[(0.5, 0, -0.5)], [(0.5, -0.5, -0.75)]]
    assert "\N{MINUS SIGN}0.50" in str(both.get_legend_handles_labels()[1]) and "nan" not in str(
        both.get_legend_handles_labels()[1]
    )


@settings(deadline=None, max_examples=3)
@given(n=st.integers(201, 1500))
def test_many_data_share_bars_that_keep_the_means(n: int) -> None:
    torch.manual_seed(n)
    result = gaps(torch.rand(n), 2 * torch.rand(n))
    ax = plot_gaps(result, ax=Figure().subplots())
    lower, upper = bars(ax)
    assert len(lower) == len(upper) == 200
    edges = [left for left, _, _ in lower] + [n + 0.5]
    widths = [b - a for a, b in pairwise(edges)]
    assert edges[0] == 0.5 and min(widths) > 0
    tops = [top for _, _, top in upper]
    assert tops == sorted(tops, reverse=True)
    mean = sum(width * top for width, top in zip(widths, tops, strict=True)) / n
    assert mean == pytest.approx(result.inference_gap.mean)


def test_makes_a_figure_only_without_axes() -> None:
    before = plt.get_fignums()
    given_ax = Figure().subplots()
    assert plot_gaps(gaps([1.0], [2.0]), ax=given_ax) is given_ax
    assert plt.get_fignums() == before
    ax = plot_gaps(gaps([1.0], [2.0]))
    figure: Any = ax.figure
    figure.canvas.draw()
    plt.close(figure)


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong in (None, {"approximation_gap": 1.0}, torch.zeros(3)):
        with pytest.raises(TypeError, match=r"^result: expected InferenceGaps"):
            plot_gaps(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^result: expected finite gaps"):
        plot_gaps(gaps([1.0, math.nan], [1.0, 1.0]), ax=Figure().subplots())
