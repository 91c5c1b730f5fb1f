"""Images of one plot, tiled into one array."""

import math
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

T = TypeVar("T")

_MAX_INCHES = 9.0  # all tiles together, on either side


def check_result(result: object, kind: type[T]) -> T:
    """Return the result, or raise if it is of another kind."""
    if not isinstance(result, kind):
        raise TypeError(f"result: expected {kind.__name__}, got {type(result).__name__}")
    return result


def check_images(name: str, images: Tensor, grid: int) -> Tensor:
    """Return images ``[*grid, C, H, W]``, C 1 or 3, clipped to [0, 1]; ``grid`` is their leading dims."""
    shape = tuple(images.shape)
    if len(shape) != grid + 3:
        raise ValueError(f"{name}: images [C, H, W] are needed, got data of shape {list(shape[grid:])}")
    if 0 in shape:
        raise ValueError(f"{name}: expected at least one image, got shape {shape}")
    if shape[grid] not in (1, 3):
        raise ValueError(f"{name}: expected images of 1 (grey) or 3 (RGB) channels, got {shape[grid]}")
    images = images.detach().float().cpu()
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got nan or inf")
    return images.clamp(0.0, 1.0)


def draw_tiles(
    tiles: Tensor,
    ax: "Axes | None",
    *,
    rows: list[str] | None = None,
    columns: list[str] | None = None,
    group: int = 1,
) -> "Axes":
    """Draw tiles ``[rows, columns, C, H, W]`` as one image, with labels of rows and columns.

    Args:
        tiles: the images, in [0, 1].
        ax: where to draw; None makes a figure that fits.
        rows: a label for each row, empty for none.
        columns: a label for each column.
        group: rows that belong together; a wider gap sets groups apart.

    Returns:
        The axes.
    """
    n_rows, n_columns, channels, height, width = tiles.shape
    gap = max(1, round(max(height, width) / 12))
    wide = max(2, height // 4) if group > 1 else 0
    tops = [row * (height + gap) + row // group * wide for row in range(n_rows)]
    lefts = [column * (width + gap) for column in range(n_columns)]
    canvas = torch.ones(tops[-1] + height, lefts[-1] + width, channels)
    for row, top in zip(tiles, tops, strict=True):
        for tile, left in zip(row, lefts, strict=True):
            canvas[top : top + height, left : left + width] = tile.permute(1, 2, 0)

    if ax is None:
        import matplotlib.pyplot as plt

        # Small tiles are 0.6 inches, or up to 1.2 where there are few of them; larger keep their pixels.
        side = max(min(max(0.6, 3.2 / n_columns), 1.2), max(height, width) / 100)
        inches = min(side / max(height, width), _MAX_INCHES / max(canvas.shape[:2]))
        size = (
            max(canvas.shape[1] * inches + (0.65 if rows else 0.15), 3.6),
            canvas.shape[0] * inches + (0.9 if columns else 0.4),
        )
        _, ax = plt.subplots(figsize=size, layout="constrained")
    box, dpi = ax.get_window_extent(), ax.figure.dpi
    fits = canvas.shape[0] <= box.height and canvas.shape[1] <= box.width
    ax.imshow(
        canvas.squeeze(-1).numpy(),
        cmap="gray",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest" if fits else "antialiased",
    )
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    _label(ax.yaxis, [top + (height - 1) / 2 for top in tops], rows, box.height / dpi / 0.16)
    _label(ax.xaxis, [left + (width - 1) / 2 for left in lefts], columns, box.width / dpi / 0.4)
    return ax


def _label(axis: "Axis", positions: list[float], labels: list[str] | None, room: float) -> None:
    """Put labels at positions, only each k-th where there is room for fewer."""
    every = math.ceil(len(positions) / max(room, 1.0))
    axis.set_ticks(positions[::every] if labels else [], labels=labels[::every] if labels else [])


def number(value: float) -> str:
    """Return a short label with a real minus sign."""
    return f"{value + 0.0:.3g}".replace("-", "\N{MINUS SIGN}")
