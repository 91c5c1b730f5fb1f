"""Tests of the table of images."""

import pytest
import torch
from matplotlib.figure import Figure

from ppl_vae.plots import plot_images


def test_images_stand_in_their_row_and_column_with_their_labels() -> None:
    images = torch.arange(6.0).div(5).reshape(2, 3, 1, 1, 1).expand(2, 3, 1, 4, 4)
    ax = plot_images(images, Figure(figsize=(4, 4)).subplots(), rows=[7, "b"], columns=["x", "y", "z"])
    canvas = torch.from_numpy(ax.images[0].get_array().data)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["7", "b"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["x", "y", "z"]
    at = [[int(t) for t in ticks] for ticks in (ax.get_yticks(), ax.get_xticks())]
    found = [[float(canvas[row, column]) for column in at[1]] for row in at[0]]
    torch.testing.assert_close(torch.tensor(found), images[:, :, 0, 0, 0])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.rand(5, 1, 4, 4), {}, r"images: expected \[rows, columns, C, H, W\], got \[5, 1, 4, 4\]"),
        (
            torch.rand(2, 2, 2, 4, 4),
            {},
            r"images: expected images of 1 \(grey\) or 3 \(RGB\) channels, got 2",
        ),
        (torch.rand(2, 3, 1, 4, 4), {"rows": ["a"]}, "rows: expected 2 labels, got 1"),
        (torch.rand(2, 3, 1, 4, 4), {"columns": range(4)}, "columns: expected 3 labels, got 4"),
        (torch.full((1, 1, 1, 4, 4), torch.nan), {}, "images: expected finite values, got nan or inf"),
    ],
)
def test_wrong_images_and_labels(images: torch.Tensor, labels: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_images(images, **labels)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="images: expected a tensor, got list"):
        plot_images([[1.0]])  # type: ignore[arg-type]
