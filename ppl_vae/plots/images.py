"""A table of images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ppl_vae.plots._tiles import check_images, draw_tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_images(
    images: Tensor,
    ax: "Axes | None" = None,
    *,
    rows: Sequence[object] | None = None,
    columns: Sequence[object] | None = None,
) -> "Axes":
    """Draw images as a table, with a label for each row and column.

    Args:
        images: ``[rows, columns, C, H, W]`` in [0, 1], C 1 or 3.
        ax: where to draw; None makes a figure that fits.
        rows: a label for each row, shown as text.
        columns: a label for each column.

    Returns:
        The axes.

    Raises:
        TypeError: if ``images`` is no tensor.
        ValueError: if these are no images, or there are more or fewer labels than rows or columns.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = plot_images(torch.rand(2, 5, 1, 8, 8), Figure().subplots(), rows=["data", "mean"])
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['data', 'mean']
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 5:
        raise ValueError(f"images: expected [rows, columns, C, H, W], got {list(images.shape)}")
    tiles = check_images("images", images, grid=2)
    for name, labels, count in (("rows", rows, tiles.shape[0]), ("columns", columns, tiles.shape[1])):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{name}: expected {count} labels, got {len(labels)}")
    return draw_tiles(
        tiles,
        ax,
        rows=None if rows is None else [str(label) for label in rows],
        columns=None if columns is None else [str(label) for label in columns],
    )
