"""The plots of calibration: histograms, coverage, bands and what has a colour."""

import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import binom

from ppl_vae.evaluation.calibration import Calibration
from ppl_vae.plots.calibration import plot_calibration, plot_coverage

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch


def calibration(good: int = 1) -> Calibration:
    torch.manual_seed(0)
    ranks = {f"z[{i}]": torch.arange(200) % 20 for i in range(good)}
    return Calibration(ranks | {"narrow": torch.arange(200) % 2 * 19}, num_draws=19, bins=10)


def steps(ax: Axes) -> list[StepPatch]:
    return [patch for patch in ax.patches if isinstance(patch, StepPatch)]


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def test_a_histogram_per_quantity_over_the_band_of_a_calibrated_guide() -> None:
    ax = plot_calibration(calibration(), ax=Figure().subplots())
    flat, narrow = steps(ax)
    assert np.asarray(flat.get_data().values).tolist() == [20] * 10
    assert np.asarray(narrow.get_data().values).tolist() == [100] + [0] * 8 + [100]
    assert np.asarray(flat.get_data().edges)[[0, 1, -1]].tolist() == [-0.5, 1.5, 19.5]
    low, high = binom.interval(0.99, 200, 0.1)
    (band,) = [patch for patch in ax.patches if not isinstance(patch, StepPatch)]
    box = band.get_extents().transformed(ax.transData.inverted())
    assert (box.y0, box.y1) == pytest.approx((low, high))
    assert {"z[0]", "narrow, rejected", "expected"} <= set(legend(ax))
    assert ax.get_title() == "Calibration: 1 of 2 quantities rejected"


def test_of_many_quantities_only_the_rejected_have_a_colour() -> None:
    for plot in (plot_calibration, plot_coverage):
        ax = plot(calibration(good=15), ax=Figure().subplots())
        assert "15 others" in legend(ax) and "narrow, rejected" in legend(ax)
        assert not any("z[" in label for label in legend(ax))


def test_the_coverage_of_uniform_ranks_is_the_diagonal() -> None:
    ax = plot_coverage(calibration(), ax=Figure().subplots())
    curves = {str(line.get_label()): np.asarray(line.get_data()) for line in ax.lines}
    np.testing.assert_allclose(*curves["z[0]"])
    assert float(curves["narrow, rejected"][1].max()) == 0  # at the ends alone
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 1), (0, 1))


@pytest.mark.parametrize("plot", [plot_calibration, plot_coverage])
def test_without_axes_a_figure_is_made_and_other_results_are_refused(plot: object) -> None:
    assert callable(plot)
    ax = plot(calibration())
    assert ax.figure is plt.gcf()
    plt.close()
    with pytest.raises(TypeError, match="result: expected Calibration, got list"):
        plot([])


def test_one_draw_can_be_drawn() -> None:
    result = Calibration({"a": torch.arange(20) % 2}, num_draws=1, bins=2)
    for plot in (plot_calibration, plot_coverage):
        plot(result, ax=Figure().subplots()).figure.canvas.draw()
