"""Samples from the prior."""

import math
from typing import TYPE_CHECKING

import torch

from ppl_vae.evaluation.generation import Samples
from ppl_vae.plots._tiles import check_images, check_result, draw_tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_samples(result: Samples, ax: "Axes | None" = None) -> "Axes":
    """Draw the likelihood's means of samples from the prior in a grid.

    Args:
        result: what ``sample`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images, or it has no means.

    Example:
        >>> from matplotlib.figure import Figure
        >>> images = torch.rand(16, 1, 8, 8)
        >>> ax = plot_samples(Samples(x=images.bernoulli(), mean=images), ax=Figure().subplots())
        >>> ax.get_title()
        'Samples: mean of x given z from the prior'
    """
    mean = check_result(result, Samples).mean
    if mean is None:
        raise ValueError("result.mean: expected means of x to draw, got None: the likelihood has none")
    images = check_images("result.mean", mean, grid=1)
    count = len(images)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    blank = images.new_ones(rows * columns - count, *images.shape[1:])
    tiles = torch.cat([images, blank]).reshape(rows, columns, *images.shape[1:])
    ax = draw_tiles(tiles, ax)
    ax.set_title("Samples: mean of x given z from the prior", fontsize="medium")
    return ax
