"""The plot of rate against distortion: points, lines of equal ELBO, labels."""

from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest

from ppl_vae.evaluation.rate_distortion import RateDistortion
from ppl_vae.plots.rate_distortion import plot_rate_distortion

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def sweep() -> RateDistortion:
    columns = {"rate": [2.0, 9.0, 5.0], "distortion": [84.0, 80.0, 80.5]}
    columns["elbo"] = [-r - d for r, d in zip(columns["rate"], columns["distortion"], strict=True)]
    columns |= {"rate_se": [0.1, 0.2, 0.3], "distortion_se": [0.4, 0.5, 0.6]}
    table = pd.DataFrame(columns, index=pd.Index([4.0, 0.25, 1.0], name="kl_weight"))
    return RateDistortion(table, [], [], True)


def test_a_point_per_weight_in_the_order_of_rates_and_a_line_of_its_elbo_through_each() -> None:
    ax = plot_rate_distortion(sweep(), ax=Figure().subplots())
    (curve,) = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert np.asarray(curve.get_xdata()).tolist() == [2.0, 5.0, 9.0]
    assert np.asarray(curve.get_ydata()).tolist() == [84.0, 80.5, 80.0]
    lines: list[Any] = [line for line in ax.lines if type(line).__name__ == "AxLine"]
    points = []
    for line in lines:
        assert line.get_slope() == -1
        points.append(line.get_xy1())
    assert sorted(points) == [(2.0, 84.0), (5.0, 80.5), (9.0, 80.0)]
    dashed = [line.get_xy1() for line in lines if line.get_linestyle() == "--"]
    assert dashed == [(5.0, 80.5)]  # of the highest ELBO


def test_labels_name_the_weights_and_the_best_elbo() -> None:
    ax = plot_rate_distortion(sweep(), ax=Figure().subplots())
    assert [text.get_text() for text in ax.texts] == ["4", "1", "0.25"]
    legend = ax.get_legend()
    assert legend is not None and "ELBO = −85.50" in [text.get_text() for text in legend.get_texts()]
    assert "distortion" in ax.get_ylabel()


def test_without_axes_a_figure_is_made_and_other_results_are_refused() -> None:
    ax = plot_rate_distortion(sweep())
    assert ax.figure is plt.gcf()
    plt.close()
    with pytest.raises(TypeError, match="result: expected RateDistortion, got dict"):
        plot_rate_distortion({})  # type: ignore[arg-type]
