"""The plots of tasks: what is drawn, in which order, with which labels."""

from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae.models import LinearGaussian
from ppl_vae.plots.tasks import (
    plot_anomaly_scores,
    plot_augmentation,
    plot_denoising,
    plot_edits,
    plot_imputation,
    plot_latent_arithmetic,
    plot_roc_curves,
)
from ppl_vae.tasks.anomaly import AnomalyDetection, detect_anomalies
from ppl_vae.tasks.arithmetic import Edits, LatentArithmetic
from ppl_vae.tasks.augmentation import Augmented
from ppl_vae.tasks.denoising import Denoised
from ppl_vae.tasks.imputation import Imputation

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def detection() -> AnomalyDetection:
    torch.manual_seed(0)
    model = LinearGaussian(2, 5)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))

    normal, anomalous = torch.randn(50, 5), 2 + torch.randn(30, 5)
    return detect_anomalies(model, guide, normal, anomalous, num_particles=5, bootstrap=5, progress=False)


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def tiles(ax: Axes, rows: int, columns: int, side: int = 4) -> np.ndarray:
    """Return the top left pixel of each tile, ``[rows, columns]``."""
    canvas = np.asarray(ax.images[0].get_array())
    return np.array([[canvas[r * (side + 1), c * (side + 1)] for c in range(columns)] for r in range(rows)])


def flat(values: Any) -> Tensor:
    """Return images of 4 x 4 with these grey values."""
    values = torch.as_tensor(values, dtype=torch.float32)
    return values[..., None, None, None].expand(*values.shape, 1, 4, 4)


def test_roc_curves_enclose_the_areas_of_the_table() -> None:
    result = detection()
    ax = plot_roc_curves(result, ax=Figure().subplots())
    curves = {str(line.get_label()): line.get_data() for line in ax.lines if ":" in str(line.get_label())}
    assert len(curves) == 4
    for (label, (x, y)), (_, row) in zip(curves.items(), result.table.iterrows(), strict=True):
        assert np.trapezoid(np.asarray(y), np.asarray(x)) == pytest.approx(row["auroc"])
        assert label.endswith(f"{row['auroc']:.3f} ± {row['auroc_se']:.3f}")
    assert "normal" in ax.get_xlabel() and "anomalous" in ax.get_ylabel()


def test_histograms_have_shares_that_sum_to_one_and_say_what_is_left_out() -> None:
    result = detection()
    ax = plot_anomaly_scores(result, ax=Figure().subplots(), score="log_likelihood")
    heights = [sum(bar.get_height() for bar in group) for group in ax.containers]  # type: ignore[attr-defined]
    assert heights == pytest.approx([1.0, 1.0])
    assert ax.get_xlabel() == "minus log p(x), nats"
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["normal (n=50)", "anomalous (n=30)"]
    result.anomalous["elbo"][0] = 1e6
    ax = plot_anomaly_scores(result, ax=Figure().subplots())
    assert ax.get_xlim()[1] < 1e5
    legend = ax.get_legend()
    assert legend is not None and "1 above" in legend.get_texts()[1].get_text()
    with pytest.raises(ValueError, match=r"score: unknown 'elbow'.*did you mean 'elbo'"):
        plot_anomaly_scores(result, score="elbow")


@pytest.mark.parametrize("known", [False, True])
def test_denoised_images_stand_between_noisy_and_clean_ones(known: bool) -> None:
    noisy, mean, clean = (flat([v, v + 0.1]) for v in (0.1, 0.4, 0.7))
    result = Denoised(noisy, mean, mean, torch.ones(2), 10, clean if known else None)
    ax = plot_denoising(result, ax=Figure().subplots())
    assert labels(ax.yaxis) == ["noisy", "denoised", "clean"][: 2 + known]
    expected = [[0.1, 0.2], [0.4, 0.5], [0.7, 0.8]][: 2 + known]
    np.testing.assert_allclose(tiles(ax, 2 + known, 2), expected, atol=1e-6)
    # errors of 0.6 and 0.3: 20 log10(1 / 0.6) = 4.4 dB and 10.5 dB
    assert ("PSNR 4.4 dB before, 10.5 dB after" in ax.get_title()) == known


def test_imputed_images_show_missing_elements_in_grey_then_means_draws_and_the_truth() -> None:
    x, other = flat([0.1, 0.9]), flat([0.0, 0.0])
    missing = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    missing[1] = True
    draws = flat([[0.2, 0.3], [0.6, 0.7], [0.8, 0.8]])
    result = Imputation(x, missing, draws, other, other, "importance", truth=flat([0.1, 1.0]))
    ax = plot_imputation(result, ax=Figure().subplots())
    assert labels(ax.yaxis) == ["observed", "mean", "draw 1", "draw 2", "truth"]
    expected = [[0.1, 0.5], [0.1, 0.9], [0.2, 0.3], [0.6, 0.7], [0.1, 1.0]]
    np.testing.assert_allclose(tiles(ax, 5, 2), expected, atol=1e-6)
    assert "importance" in ax.get_title()


def test_new_images_stand_below_the_ones_that_they_come_from() -> None:
    result = Augmented(
        flat([0.2, 0.3, 0.4, 0.5]), torch.tensor([7, 1, 7, 1]), torch.arange(4) % 2, flat([0.0, 1.0]), 2
    )
    ax = plot_augmentation(result, ax=Figure().subplots())
    np.testing.assert_allclose(tiles(ax, 3, 2), [[0.0, 1.0], [0.2, 0.3], [0.4, 0.5]], atol=1e-6)
    assert labels(ax.yaxis) == ["data", "new", ""] and labels(ax.xaxis) == ["7", "1"]
    unlabelled = Augmented(result.x, None, result.source, result.original, 2)
    assert labels(plot_augmentation(unlabelled, ax=Figure().subplots()).xaxis) == []


def test_arithmetic_is_a_row_of_four_images() -> None:
    result = LatentArithmetic(torch.zeros(4, 2), flat([0.1, 0.2, 0.3, 0.4]))
    ax = plot_latent_arithmetic(result, ax=Figure().subplots())
    np.testing.assert_allclose(tiles(ax, 1, 4), [[0.1, 0.2, 0.3, 0.4]], atol=1e-6)
    assert labels(ax.xaxis) == ["a", "b", "c", "a − b + c"]


def test_edits_go_down_with_the_strength() -> None:
    result = Edits(flat([0.0, 1.0]), flat([[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]]), torch.tensor([0.0, 0.5, -1.0]))
    ax = plot_edits(result, ax=Figure().subplots())
    np.testing.assert_allclose(tiles(ax, 4, 2), [[0.0, 1.0], [0.1, 0.9], [0.2, 0.8], [0.3, 0.7]], atol=1e-6)
    assert labels(ax.yaxis) == ["data", "0", "0.5", "−1"]


PLOTS: list[Callable[..., Axes]] = [
    plot_anomaly_scores,
    plot_augmentation,
    plot_denoising,
    plot_edits,
    plot_imputation,
    plot_latent_arithmetic,
    plot_roc_curves,
]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_result_of_another_kind_is_refused(plot: Callable[..., Axes]) -> None:
    with pytest.raises(TypeError, match=r"result: expected .*, got dict"):
        plot({})


def test_data_that_are_no_images_are_refused_and_long_results_cut() -> None:
    x = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"images .* are needed"):
        plot_denoising(Denoised(x, x, x, torch.ones(4), 10))
    many = flat(torch.zeros(30))
    ax = plot_denoising(Denoised(many, many, many, torch.ones(30), 10), ax=Figure().subplots())
    assert ax.images[0].get_array().shape[1] == 12 * 5 - 1  # type: ignore[union-attr]


def test_a_figure_is_made_where_none_is_given() -> None:
    edits = Edits(flat([0.0]), flat([[0.1]]), torch.ones(1))
    for draw in (lambda: plot_roc_curves(detection()), lambda: plot_edits(edits)):
        assert draw().figure is plt.gcf()
        plt.close()
