"""The plot of a comparison of estimators: marks, labels, and results at the ends of the axis."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import matplotlib
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_vae.evaluation import EstimatorComparison
from ppl_vae.plots import plot_estimators

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def comparison(guide: list[float], model: list[float], names: list[str] | None = None) -> EstimatorComparison:
    names = names or [f"estimator {i}" for i in range(len(guide))]
    bounds = [-90.0 - i for i in range(len(guide))]
    table = pd.DataFrame({"bound": bounds, "guide_snr": guide, "model_snr": model}, index=names)
    return EstimatorComparison(table, -89.5, 0.1, 50, 100, 0)


def marks(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each labelled line."""
    lines: list[Any] = [line for line in ax.lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): list(zip(*map(list, line.get_data()), strict=True)) for line in lines}


def triangles(ax: Axes) -> list[tuple[str, int]]:
    return [
        (str(line.get_marker()), round(next(iter(line.get_ydata()))))
        for line in ax.lines
        if line.get_marker() in ("<", ">")
    ]


def labels(ax: Axes) -> list[list[str]]:
    return [text.get_text().split("   ") for text in ax.get_yticklabels()]


def test_a_mark_for_each_ratio_on_a_log_axis() -> None:
    ax = plot_estimators(comparison([0.1, 2.0], [1.0, 30.0], ["IWAE (K=50)", "stl"]), ax=Figure().subplots())
    assert ax.get_xscale() == "log"
    drawn = marks(ax)
    assert [x for x, _ in drawn["guide's gradient"]] == [0.1, 2.0]
    assert [x for x, _ in drawn["model's gradient"]] == [1.0, 30.0]
    for points in drawn.values():
        assert [round(y) for _, y in points] == [0, 1]
    low, high = ax.get_xlim()
    assert 0 < low < 0.1 < 30 < high
    assert labels(ax) == [["IWAE (K=50)", "−90.00"], ["stl", "−91.00"]]
    bottom, top = ax.get_ylim()
    assert bottom > 1 > 0 > top  # the first above
    assert "−89.50" in ax.get_title(loc="right")
    assert triangles(ax) == []


def test_ratios_at_the_ends_are_triangles_and_none_is_no_mark() -> None:
    result = comparison([0.0, 0.5, math.inf], [math.nan, math.nan, 2.0])
    ax = plot_estimators(result, ax=Figure().subplots())
    assert marks(ax)["guide's gradient"] == [(0.5, pytest.approx(1, abs=0.3))]
    assert marks(ax)["model's gradient"] == [(2.0, pytest.approx(2, abs=0.3))]
    assert triangles(ax) == [("<", 0), (">", 2)]


def test_estimator_without_a_bound() -> None:
    result = comparison([1.0], [1.0])
    result.table["bound"] = math.nan
    assert labels(plot_estimators(result, ax=Figure().subplots())) == [["estimator 0", "no bound"]]


def test_title_without_an_evidence_and_zero_without_a_sign() -> None:
    result = comparison([1.0], [1.0])
    result.table["bound"] = -0.001
    ax = plot_estimators(dataclasses.replace(result, log_likelihood=math.nan), ax=Figure().subplots())
    assert ax.get_title(loc="right") == "estimator and its bound (nats per datum)"
    assert labels(ax) == [["estimator 0", "0.00"]]


@settings(deadline=None, max_examples=8)
@given(
    ratios=st.lists(
        st.tuples(*[st.floats(1e-8, 1e8) | st.sampled_from([0.0, math.inf, math.nan])] * 2),
        min_size=1,
        max_size=12,
    )
)
def test_any_ratios_can_be_drawn(ratios: list[tuple[float, float]]) -> None:
    guide, model = (list(column) for column in zip(*ratios, strict=True))
    figure = Figure(layout="constrained")
    ax = plot_estimators(comparison(guide, model), ax=figure.subplots())
    figure.canvas.draw()
    count = sum(map(len, marks(ax).values())) + len(triangles(ax))
    assert count == sum(not math.isnan(value) for value in [*guide, *model])


def test_twelve_long_names_do_not_overlap() -> None:
    names = [f"an estimator with a long name (K={i})" for i in range(12)]
    ax = plot_estimators(comparison([0.1] * 12, [1.0] * 12, names))
    figure: Any = ax.figure
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert ax.get_window_extent().width > 0.4 * figure.bbox.width
    plt.close(figure)


def test_makes_a_figure_only_without_axes() -> None:
    before = plt.get_fignums()
    given_ax = Figure().subplots()
    assert plot_estimators(comparison([1.0], [1.0]), ax=given_ax) is given_ax
    assert plt.get_fignums() == before
    plt.close(plot_estimators(comparison([1.0], [1.0])).figure)


@pytest.mark.parametrize("result", [None, {"bound": [1.0]}, pd.DataFrame()])
def test_other_results_are_refused(result: Any) -> None:
    with pytest.raises(TypeError, match=r"^result: expected "):
        plot_estimators(result)
