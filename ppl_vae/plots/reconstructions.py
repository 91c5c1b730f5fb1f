"""Data over their reconstructions."""

import math
from typing import TYPE_CHECKING

import torch

from ppl_vae.evaluation.generation import Reconstructions
from ppl_vae.plots._tiles import check_images, check_result, draw_tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_reconstructions(result: Reconstructions, ax: "Axes | None" = None) -> "Axes":
    """Draw data and, below each, its reconstruction, in rows of pairs.

    Args:
        result: what ``reconstruct`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images, or x and mean differ in shape.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x = torch.rand(10, 1, 8, 8)
        >>> ax = plot_reconstructions(Reconstructions(x=x, mean=x.sqrt()), ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['data', 'mean']
    """
    x = check_images("result.x", check_result(result, Reconstructions).x, grid=1)
    mean = check_images("result.mean", result.mean, grid=1)
    if mean.shape != x.shape:
        raise ValueError(f"result.mean: expected x's shape {tuple(x.shape)}, got {tuple(mean.shape)}")
    rows = math.ceil(len(x) / max(10, math.ceil(math.sqrt(2 * len(x)))))
    columns = math.ceil(len(x) / rows)
    pairs = torch.stack([x, mean])
    blank = pairs.new_ones(2, rows * columns - len(x), *x.shape[1:])
    tiles = torch.cat([pairs, blank], dim=1).reshape(2, rows, columns, *x.shape[1:])
    ax = draw_tiles(tiles.transpose(0, 1).flatten(0, 1), ax, rows=["data", "mean"] * rows, group=2)
    ax.set_title("Reconstructions: mean of x given z from the guide", fontsize="medium")
    return ax
