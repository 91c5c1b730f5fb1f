"""Interpolations between latents."""

from typing import TYPE_CHECKING

from ppl_vae.evaluation.generation import Interpolation
from ppl_vae.plots._tiles import check_images, check_result, draw_tiles, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_interpolation(result: Interpolation, ax: "Axes | None" = None) -> "Axes":
    """Draw the means on the lines between latents: a row for each pair, a column for each weight.

    Args:
        result: what ``interpolate`` returns, of images ``[pairs, steps, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images, or the weights don't fit them.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> result = Interpolation(torch.rand(2, 3, 1, 8, 8), torch.tensor([0.0, 0.5, 1.0]))
        >>> ax = plot_interpolation(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['0', '0.5', '1']
    """
    tiles = check_images("result.x", check_result(result, Interpolation).x, grid=2)
    if tuple(result.weights.shape) != (tiles.shape[1],):
        raise ValueError(
            f"result.weights: expected shape ({tiles.shape[1]},), got {tuple(result.weights.shape)}"
        )
    ax = draw_tiles(tiles, ax, columns=[number(weight) for weight in result.weights.tolist()])
    ax.set_title("Latent interpolation: mean of x", fontsize="medium")
    ax.set_xlabel("weight of the end point", fontsize="small")
    return ax
