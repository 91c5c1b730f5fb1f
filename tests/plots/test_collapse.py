"""The plot of collapse: where points are, which are filled, and what is drawn where the KL is unknown."""

import math

import matplotlib
import pandas as pd
import pytest

from ppl_vae.evaluation.active_units import CollapseReport
from ppl_vae.plots.collapse import plot_collapse

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def report(threshold: float = 0.01, kl: float = 1.0) -> CollapseReport:
    index = pd.MultiIndex.from_tuples([("z1", 0), ("z1", 1), ("z2", 0)], names=["site", "dimension"])
    variances = [0.8, 1e-4, 0.0]
    columns = {
        "variance_of_means": variances,
        "kl": [1.9 * kl, 0.001 * kl, 0.0 * kl],
        "posterior_sd": [0.3, 0.9, 1.0],
        "active": [v > threshold for v in variances],
    }
    return CollapseReport(pd.DataFrame(columns, index=index), {}, threshold, 500, 50)


def points(ax: Axes) -> dict[str, tuple[float, float, bool]]:
    """Return x, y and whether it is filled, by label, of the lines of one point."""
    return {
        str(line.get_label()): (
            float(next(iter(line.get_xdata()))),
            float(next(iter(line.get_ydata()))),
            line.get_markerfacecolor() != "none",
        )
        for line in ax.lines
        if line.get_marker() != "None"
    }


def test_a_point_per_dimension_filled_if_active_and_a_line_at_the_threshold() -> None:
    ax = plot_collapse(report(), ax=Figure().subplots())
    found = points(ax)
    assert found["z1, 1 active"] == (0.8, 1.9, True)
    assert found["z1, 1 not active"] == (1e-4, 0.001, False)
    x, y, filled = found["z2, 1 not active"]
    assert 0 < x < 1e-4 and (y, filled) == (0.0, False)  # a variance of zero at the left edge
    (line,) = [line for line in ax.lines if line.get_marker() == "None"]
    assert list(line.get_xdata()) == [0.01, 0.01]
    assert ax.get_xscale() == "log" and ax.get_title() == "1 of 3 dimensions active"
    assert [text.get_text() for text in ax.texts] == ["0"]  # the active dimension's number


def test_where_the_kl_is_unknown_the_standard_deviation_is_drawn() -> None:
    ax = plot_collapse(report(kl=math.nan), ax=Figure().subplots())
    assert points(ax)["z1, 1 active"][1] == 0.3 and "standard deviation" in ax.get_ylabel()


def test_a_threshold_of_zero_has_no_line() -> None:
    ax = plot_collapse(report(threshold=0.0), ax=Figure().subplots())
    assert all(line.get_marker() != "None" for line in ax.lines)
    assert ax.get_title() == "2 of 3 dimensions active"


def test_without_axes_a_figure_is_made_and_other_results_are_refused() -> None:
    ax = plot_collapse(report())
    assert ax.figure is plt.gcf()
    plt.close()
    with pytest.raises(TypeError, match="result: expected CollapseReport, got int"):
        plot_collapse(3)  # type: ignore[arg-type]
