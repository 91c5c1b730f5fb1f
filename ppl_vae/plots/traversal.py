"""A latent traversal."""

from typing import TYPE_CHECKING

from ppl_vae.evaluation.generation import Traversal
from ppl_vae.plots._tiles import check_images, check_result, draw_tiles, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_traversal(result: Traversal, ax: "Axes | None" = None) -> "Axes":
    """Draw the means of a traversal: a row for each latent dimension, a column for each value.

    Args:
        result: what ``traverse`` returns, of images ``[dims, steps, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images, or values and dims don't fit them.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> x, values = torch.rand(2, 3, 1, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
        >>> result = Traversal(x, values, dims=torch.tensor([0, 4]))
        >>> ax = plot_traversal(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['z[0]', 'z[4]']
    """
    tiles = check_images("result.x", check_result(result, Traversal).x, grid=2)
    for name, labels, length in zip(
        ("dims", "values"), (result.dims, result.values), tiles.shape, strict=False
    ):
        if tuple(labels.shape) != (length,):
            raise ValueError(f"result.{name}: expected shape ({length},), got {tuple(labels.shape)}")
    ax = draw_tiles(
        tiles,
        ax,
        rows=[f"z[{dim}]" for dim in result.dims.tolist()],
        columns=[number(value) for value in result.values.tolist()],
    )
    ax.set_title("Latent traversal: mean of x", fontsize="medium")
    ax.set_xlabel("what the dimension that moves is set to", fontsize="small")
    return ax
