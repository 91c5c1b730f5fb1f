"""Latents of data."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl_vae.evaluation.generation import Latents
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND_ROWS = 15


def plot_latents(result: Latents, ax: "Axes | None" = None) -> "Axes":
    """Draw latents in the plane, in the colours of their labels.

    Latents of more than two dimensions are shown by their first two principal components; the axis labels
    say so, with the share of the variance that each explains.

    Args:
        result: what ``encode`` returns, latents ``[n, latent]`` and labels ``[n]`` or None.
        ax: where to draw; None makes a figure. The legend stands to its right.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if a shape is wrong, values are not finite or labels are not whole numbers.

    Example:
        >>> from matplotlib.figure import Figure
        >>> result = Latents(z=torch.randn(100, 2), y=torch.arange(100) % 10)
        >>> ax = plot_latents(result, ax=Figure().subplots())
        >>> ax.get_xlabel()
        'z[0]'
    """
    z, y = _check(check_result(result, Latents))
    points, labels = _plane(z)
    ax = axes_or_new(ax, (5.6, 4.6))
    style: dict[str, Any] = {
        "s": min(30.0, max(1.5, 15000 / len(z))),
        "alpha": 0.7,
        "linewidths": 0,
        "rasterized": len(z) > 5000,
    }
    if y is None:
        ax.scatter(*points.T, **style)
    else:
        from matplotlib.lines import Line2D

        classes = sorted(set(y.tolist()))
        colours = dict(zip(classes, _colours(len(classes)), strict=True))
        # One scatter of all points: drawn class by class, the last class would hide the others.
        ax.scatter(*points.T, color=[colours[label] for label in y.tolist()], **style)
        handles = [
            Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=str(label))
            for label, colour in colours.items()
        ]
        ax.legend(
            handles=handles,
            title="y",
            ncols=math.ceil(len(classes) / _LEGEND_ROWS),
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            borderaxespad=0.0,
            frameon=False,
            fontsize="small",
            handletextpad=0.2,
            columnspacing=0.8,
        )
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.set_title(f"Latents of {len(z)} data", fontsize="medium")
    return ax


def _check(result: Latents) -> tuple[Tensor, Tensor | None]:
    """Return latents and labels that can be drawn, or raise."""
    z, y = result.z.detach().float().cpu(), result.y
    if z.ndim != 2 or len(z) == 0 or z.shape[1] < 2:
        raise ValueError(f"result.z: expected latents [n, latent] with latent above 1, got {tuple(z.shape)}")
    if not bool(z.isfinite().all()):
        raise ValueError("result.z: expected finite values, got nan or inf")
    if y is None:
        return z, None
    if y.shape != z.shape[:1]:
        raise ValueError(f"result.y: expected one label for each of {len(z)} latents, got {tuple(y.shape)}")
    whole = y.detach().cpu().long()
    if not torch.equal(whole.to(y.dtype), y.detach().cpu()):
        raise ValueError(f"result.y: expected whole numbers as labels, got {y.dtype} with fractions")
    return z, whole


def _plane(z: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Return points ``[n, 2]`` and the labels of the two axes."""
    if z.shape[1] == 2:
        return z, ("z[0]", "z[1]")
    if len(z) < 2:
        raise ValueError(f"result.z: principal components need 2 latents or more, got {len(z)}")
    import numpy as np
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2)
    with np.errstate(invalid="ignore"):  # latents that are all the same have no variance to share
        points = pca.fit_transform(z.numpy())
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    return torch.from_numpy(points), (
        f"PC 1 of z ({shares[0]:.0%} of variance)",
        f"PC 2 of z ({shares[1]:.0%} of variance)",
    )


def _colours(count: int) -> list[Any]:
    """Return colours for labels: the usual ten or twenty, or a scale where those don't reach."""
    import matplotlib

    if count <= 10:
        return list(matplotlib.colormaps["tab10"].colors[:count])  # type: ignore[attr-defined]
    if count <= 20:
        return list(matplotlib.colormaps["tab20"].colors[:count])  # type: ignore[attr-defined]
    return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]
