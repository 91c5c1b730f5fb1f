"""Plots, drawn without a screen: what is on the axes, which figures are open, and what is refused."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_vae.evaluation.generation import Interpolation, Latents, Reconstructions, Samples, Traversal
from ppl_vae.plots import (
    plot_history,
    plot_interpolation,
    plot_latents,
    plot_reconstructions,
    plot_samples,
    plot_traversal,
)

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def history(epochs: int, *, validation: bool = True) -> list[dict[str, float]]:
    rows = []
    for epoch in range(1, epochs + 1):
        kl, reconstruction = 25.0 * (1 - math.exp(-epoch / 5)), -70.0 - 100.0 / epoch
        row = {"epoch": epoch, "learning_rate_0": 1e-3, "learning_rate_1": 1e-4, "seconds": 2.0}
        for split in ("train", "validation") if validation else ("train",):
            row[f"{split}_reconstruction"], row[f"{split}_kl_z"] = reconstruction, kl
            row["train_loss"] = kl - reconstruction
            row[f"{split}_elbo"] = reconstruction - kl - (split == "validation")
        rows.append(row)
    return rows


IMAGES = torch.linspace(0, 1, 6 * 64).reshape(6, 1, 8, 8)
RGB = torch.linspace(0, 1, 6 * 3 * 64).reshape(6, 3, 8, 8)
GRID = IMAGES.reshape(2, 3, 1, 8, 8)
STEPS = torch.tensor([-1.0, 0.0, 1.0])
WEIGHTS = torch.tensor([0.0, 0.5, 1.0])
IMAGE_PLOTS: dict[str, tuple[Callable[..., Axes], Callable[[torch.Tensor], Any], int]] = {
    "samples": (plot_samples, lambda x: Samples(x, x), 1),
    "reconstructions": (plot_reconstructions, lambda x: Reconstructions(x, x), 1),
    "traversal": (plot_traversal, lambda x: Traversal(x, STEPS, torch.tensor([0, 7])), 2),
    "interpolation": (plot_interpolation, lambda x: Interpolation(x, WEIGHTS), 2),
}
PLOTS: dict[str, tuple[Callable[..., Axes], Any]] = {
    "samples": (plot_samples, Samples(IMAGES, IMAGES)),
    "rgb samples": (plot_samples, Samples(RGB, RGB)),
    "reconstructions": (plot_reconstructions, Reconstructions(IMAGES, IMAGES)),
    "latents": (plot_latents, Latents(torch.randn(20, 2))),
    "labelled latents": (plot_latents, Latents(torch.randn(20, 5), torch.arange(20) % 3)),
    "traversal": (plot_traversal, Traversal(GRID, STEPS, torch.tensor([0, 7]))),
    "interpolation": (plot_interpolation, Interpolation(GRID, WEIGHTS)),
    "history": (plot_history, history(5)),
}


@pytest.fixture(autouse=True)
def no_figures() -> Iterator[None]:
    yield
    plt.close("all")


def axes() -> Axes:
    return Figure(figsize=(6, 6)).subplots()


def canvas(ax: Axes) -> np.ndarray:
    """Return the one array that all images are tiled into."""
    (image,) = ax.get_images()
    return np.asarray(image.get_array())


def texts(labels: list[Any]) -> list[str]:
    return [label.get_text() for label in labels]


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [] if found is None else texts(found.get_texts())


def raises(kind: type[Exception], match: str, call: Callable[..., object], *args: Any) -> None:
    """Check that a call raises an error of one line, and opens no figure."""
    with pytest.raises(kind, match=match) as info:
        call(*args)
    assert "\n" not in str(info.value)
    assert plt.get_fignums() == []


# Every plot


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_makes_one_figure_of_its_own(name: str) -> None:
    plot, result = PLOTS[name]
    settings = dict(matplotlib.rcParams)
    ax = plot(result)
    assert isinstance(ax, Axes)
    assert len(plt.get_fignums()) == 1
    assert ax.figure is plt.figure(plt.get_fignums()[0])
    assert ax.get_title()
    ax.figure.canvas.draw()  # a layout that doesn't fit warns, and warnings are errors
    width, height = ax.figure.get_size_inches()
    assert 3 <= width <= 10.5
    assert 1 <= height <= 10.5
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_draws_on_the_axes_it_is_given(name: str) -> None:
    plot, result = PLOTS[name]
    fig = Figure(figsize=(8, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    assert plot(result, right) is right
    assert plt.get_fignums() == []
    assert not left.has_data()
    assert right.get_title()
    fig.canvas.draw()


@pytest.mark.parametrize("name", [name for name in PLOTS if name != "history"])
def test_another_kind_of_result_is_refused(name: str) -> None:
    plot, result = PLOTS[name]
    raises(TypeError, f"^result: expected {type(result).__name__}, got dict$", plot, {})


# Images


@pytest.mark.parametrize("name", IMAGE_PLOTS)
def test_only_images_are_drawn(name: str) -> None:
    plot, make, grid = IMAGE_PLOTS[name]
    lead = (6,) if grid == 1 else (2, 3)
    vectors, pairs = torch.zeros(*lead, 64), torch.zeros(*lead, 2, 8, 8)
    raises(ValueError, r"images \[C, H, W\] are needed, got data of shape \[64\]", plot, make(vectors))
    raises(ValueError, r"images of 1 \(grey\) or 3 \(RGB\) channels, got 2$", plot, make(pairs))
    raises(ValueError, "expected at least one image", plot, make(torch.zeros(0, *lead[1:], 1, 8, 8)))
    raises(ValueError, "expected finite values", plot, make(torch.full((*lead, 1, 8, 8), math.nan)))


def test_values_outside_are_clipped_and_pixels_stay_crisp() -> None:
    ax = plot_samples(Samples(IMAGES, torch.stack([IMAGES[0] - 9, IMAGES[0] + 9])), axes())
    assert set(np.unique(canvas(ax))) == {0.0, 1.0}
    (image,) = ax.get_images()
    assert image.get_interpolation() == "nearest"
    assert image.get_clim() == (0.0, 1.0)


def test_images_smaller_than_their_pixels_are_averaged() -> None:
    big = torch.rand(4, 1, 200, 200)
    (image,) = plot_samples(Samples(big, big), Figure(figsize=(2, 2)).subplots()).get_images()
    assert image.get_interpolation() == "antialiased"


@given(count=st.integers(1, 30), height=st.integers(1, 9), width=st.integers(1, 9), rgb=st.booleans())
def test_each_pixel_is_drawn_once(count: int, height: int, width: int, rgb: bool) -> None:
    # Black on white: what is black counts the pixels, whatever the gaps and blanks.
    black = torch.zeros(count, 3 if rgb else 1, height, width)
    for plot, result, images in (
        (plot_samples, Samples(black, black), count),
        (plot_reconstructions, Reconstructions(black, black), 2 * count),
        (plot_interpolation, Interpolation(black[None], torch.linspace(0, 1, count)), count),
    ):
        drawn = canvas(plot(result, axes()))
        assert drawn.ndim == (3 if rgb else 2)
        assert (drawn == 0).sum() == images * black[0].numel()


def test_samples_are_in_order() -> None:
    levels = torch.arange(4.0) / 4
    drawn = canvas(plot_samples(Samples(IMAGES, levels[:, None, None, None].expand(4, 1, 8, 8)), axes()))
    corners = [drawn[0, 0], drawn[0, -1], drawn[-1, 0], drawn[-1, -1]]
    assert corners == levels.tolist()


def test_reconstructions_are_below_their_data() -> None:
    x = (torch.arange(12.0) / 100)[:, None, None, None].expand(12, 1, 8, 8)
    ax = plot_reconstructions(Reconstructions(x, x + 0.5), axes())
    drawn = canvas(ax)
    assert texts(ax.get_yticklabels()) == ["data", "mean", "data", "mean"]
    rows = [drawn[round(y), drawn[round(y)] < 1] for y in ax.get_yticks()]
    first, second = x[:6, 0, 0].flatten(), x[6:, 0, 0].flatten()
    for row, expected in zip(rows, (first, first + 0.5, second, second + 0.5), strict=True):
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_reconstructions_of_another_shape_are_refused() -> None:
    result = Reconstructions(IMAGES, IMAGES[:3])
    raises(
        ValueError, r"^result.mean: expected x's shape \(6, 1, 8, 8\), got \(3,", plot_reconstructions, result
    )


def test_traversal_is_labelled() -> None:
    ax = plot_traversal(Traversal(GRID, STEPS, torch.tensor([0, 7])), axes())
    assert texts(ax.get_yticklabels()) == ["z[0]", "z[7]"]
    assert texts(ax.get_xticklabels()) == ["−1", "0", "1"]
    assert ax.get_xlabel()


def test_interpolation_is_labelled() -> None:
    ax = plot_interpolation(Interpolation(GRID, WEIGHTS), axes())
    assert texts(ax.get_xticklabels()) == ["0", "0.5", "1"]
    assert ax.get_xlabel()


def test_labels_are_thinned_where_there_is_no_room() -> None:
    x, values = torch.zeros(60, 40, 1, 4, 4), torch.linspace(-1, 1, 40)
    ax = plot_traversal(Traversal(x, values, torch.arange(60)))
    rows, columns = texts(ax.get_yticklabels()), texts(ax.get_xticklabels())
    assert 1 < len(rows) < 60
    assert rows[0] == "z[0]"
    assert 1 < len(columns) < 40
    assert columns[0] == "−1"


def test_labels_that_do_not_fit_the_images_are_refused() -> None:
    raises(
        ValueError,
        r"^result.values: expected shape \(3,\)",
        plot_traversal,
        Traversal(GRID, STEPS[:2], STEPS[:2]),
    )
    raises(ValueError, r"^result.dims: expected shape \(2,\)", plot_traversal, Traversal(GRID, STEPS, STEPS))
    raises(
        ValueError,
        r"^result.weights: expected shape \(3,\)",
        plot_interpolation,
        Interpolation(GRID, STEPS[:2]),
    )


# Latents


def test_latents_of_two_dimensions_are_drawn_as_they_are() -> None:
    z = torch.randn(50, 2)
    ax = plot_latents(Latents(z), axes())
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), z)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[0]", "z[1]")
    assert legend(ax) == []


def test_wider_latents_are_drawn_by_principal_components() -> None:
    # Variances 9 and 1, in a plane of a space of five dimensions: shares 90 % and 10 %.
    plane = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    directions = torch.linalg.qr(torch.randn(5, 2)).Q
    ax = plot_latents(Latents(plane @ directions.T + 4.0), axes())
    assert ax.get_xlabel() == "PC 1 of z (90% of variance)"
    assert ax.get_ylabel() == "PC 2 of z (10% of variance)"
    (points,) = ax.collections
    np.testing.assert_allclose(np.abs(points.get_offsets()), plane.abs(), atol=1e-5)


def test_collapsed_latents_are_drawn() -> None:
    ax = plot_latents(Latents(torch.ones(10, 3)), axes())
    assert ax.get_xlabel() == "PC 1 of z (0% of variance)"


@pytest.mark.parametrize("classes", [1, 10, 17, 30])
def test_each_label_has_a_colour_and_a_place_in_the_legend(classes: int) -> None:
    y = torch.arange(60).flip(0) % classes * 2
    ax = plot_latents(Latents(torch.randn(60, 2), y), axes())
    assert legend(ax) == [str(2 * i) for i in range(classes)]
    (points,) = ax.collections
    colours = [tuple(colour) for colour in points.get_facecolors()]
    assert len(set(zip(y.tolist(), colours, strict=True))) == len(set(colours)) == classes


def test_latents_that_cannot_be_drawn_are_refused() -> None:
    z = torch.randn(5, 2)
    raises(ValueError, r"^result.z: expected latents .* got \(5, 1\)$", plot_latents, Latents(z[:, :1]))
    raises(ValueError, r"^result.z: expected latents .* got \(0, 2\)$", plot_latents, Latents(z[:0]))
    raises(ValueError, "^result.z: expected finite values", plot_latents, Latents(z / 0))
    raises(
        ValueError, "^result.z: principal components need 2 latents", plot_latents, Latents(torch.ones(1, 3))
    )
    raises(
        ValueError, "^result.y: expected one label for each of 5", plot_latents, Latents(z, torch.arange(4))
    )
    raises(ValueError, "^result.y: expected whole numbers", plot_latents, Latents(z, torch.rand(5)))
    assert legend(plot_latents(Latents(z, torch.ones(5)), axes())) == ["1"]


# History


def test_history_draws_elbo_and_kl_on_an_axis_each() -> None:
    rows = history(30)
    ax = plot_history(rows, axes())
    train, validation = ax.get_lines()
    np.testing.assert_allclose(train.get_ydata(), [row["train_elbo"] for row in rows])
    np.testing.assert_allclose(validation.get_ydata(), [row["validation_elbo"] for row in rows])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "ELBO (nats per datum)")
    (right,) = (other for other in ax.figure.axes if other is not ax)
    assert right.get_ylabel() == "KL (nats per datum)"
    (kl,) = right.get_lines()
    np.testing.assert_allclose(kl.get_ydata(), [row["train_kl_z"] for row in rows])
    best, epoch = max((row["validation_elbo"], row["epoch"]) for row in rows)
    assert legend(ax) == [
        "ELBO, train",
        f"ELBO, validation (best −{-best:.2f} at epoch {epoch})",
        "KL of z, train",
    ]


def test_history_without_validation_or_kl() -> None:
    assert legend(plot_history(history(3, validation=False), axes())) == ["ELBO, train", "KL of z, train"]
    rows = [{"epoch": 1, "validation_elbo": -2.0}, {"epoch": 2, "validation_elbo": -1.0}]
    ax = plot_history(rows, axes())
    assert legend(ax) == ["ELBO, validation (best −1.00 at epoch 2)"]
    assert ax.figure.axes == [ax]


def test_history_of_several_latent_sites_and_rare_validation() -> None:
    rows = [{"epoch": i, "train_elbo": -9.0, "train_kl_z1": 1.0, "train_kl_z2": 2.0} for i in range(6)]
    rows[2]["validation_elbo"], rows[5]["validation_elbo"] = -8.0, -7.0
    ax = plot_history(rows, axes())
    assert legend(ax)[2:] == ["KL of z1, train", "KL of z2, train"]
    assert list(ax.get_lines()[1].get_xdata()) == [2, 5]


@pytest.mark.parametrize("epochs", [1, 2, 1000])
def test_history_is_readable_at_any_length(epochs: int) -> None:
    ax = plot_history(history(epochs))
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert 1 <= len(ticks) <= 11
    assert all(tick == round(tick) for tick in ticks)
    assert ax.get_lines()[0].get_marker() == ("o" if epochs < 1000 else "")


def test_the_first_epochs_do_not_flatten_the_rest() -> None:
    rows = [{"epoch": i, "train_elbo": -100.0 - 500.0 * (i == 1) + 0.01 * i} for i in range(1, 101)]
    low, high = plot_history(rows, axes()).get_ylim()
    assert -101 < low < rows[10]["train_elbo"]
    assert high > rows[-1]["train_elbo"]
    low, _ = plot_history(rows[:10], axes()).get_ylim()  # too short a run to leave an epoch out
    assert low < -599


def test_a_run_that_diverged_is_drawn() -> None:
    rows = history(25)
    expected = legend(plot_history(rows[:20], axes()))
    for row in rows[20:]:
        row.update({key: math.nan for key in row if key != "epoch"})
    ax = plot_history(rows)
    ax.figure.canvas.draw()
    assert legend(ax) == expected
    nothing = [{"epoch": 1, "train_elbo": math.nan, "validation_elbo": math.inf, "train_kl_z": math.nan}]
    assert legend(plot_history(nothing, axes()))[1] == "ELBO, validation"


def test_histories_that_cannot_be_drawn_are_refused() -> None:
    row = {"epoch": 1, "train_elbo": -1.0}
    raises(TypeError, "^result: expected a list of dicts.* got dict$", plot_history, row)
    raises(TypeError, r"^result\[1\]: expected a dict, got int$", plot_history, [row, 3])
    raises(ValueError, "^result: expected a history of at least one epoch", plot_history, [])
    raises(
        ValueError,
        r"^result\[0\]: unknown key 'train_elb' \(did you mean 'train_elbo'\?\); expected one of",
        plot_history,
        [{"epoch": 1, "train_elb": -1.0}],
    )
    raises(ValueError, r"^result\[0\]: expected the key 'epoch'", plot_history, [{"train_elbo": -1.0}])
    raises(ValueError, "^result: expected train_elbo or validation_elbo", plot_history, [{"epoch": 1}])
