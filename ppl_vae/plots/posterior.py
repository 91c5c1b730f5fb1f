"""One datum's posterior and guides."""

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ppl_vae.evaluation.guides import PosteriorDensity
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARES = (0.9, 0.5)
_MOST_DRAWS = 3000


def plot_posterior(result: PosteriorDensity, ax: "Axes | None" = None) -> "Axes":
    """Draw one datum's guides over its posterior, in the plane of two latent dimensions.

    Each guide has two contours: of the smallest regions that hold 50 % and 90 % of it. The posterior's two
    regions are grey, and the reference's draws are dots. Guides that are shown by a kernel estimate from
    draws have dashed contours.

    Args:
        result: what ``posterior_density`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if a guide's density is not finite or zero everywhere.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppl_vae.evaluation.guides import posterior_density
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> result = posterior_density(model, {"mean field": guide}, torch.randn(3, 5), grid=20)
        >>> ax = plot_posterior(result, ax=Figure().subplots())
        >>> ax.get_xlabel(), ax.get_title()
        ('z[0]', 'datum 0')
    """
    check_result(result, PosteriorDensity)
    levels = {name: _levels(f"result.guides[{name!r}]", d) for name, d in result.guides.items()}
    ax = axes_or_new(ax, (5.6, 4.6))
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    x, y = result.x.numpy(), result.y.numpy()
    handles: list[Any] = []
    if result.posterior is not None:
        low, high = _levels("result.posterior", result.posterior)
        greys = ["0.88", "0.72"]
        ax.contourf(
            x, y, result.posterior.numpy(), levels=[low, high, _top(result.posterior, high)], colors=greys
        )
        handles.append(Patch(color=greys[1], label="posterior"))
    if result.draws is not None:
        step = -(-len(result.draws) // _MOST_DRAWS)
        first, second = result.draws[::step].T.numpy()
        ax.scatter(first, second, s=2.0, color="0.35", alpha=0.5, linewidths=0, zorder=1.5)
        handles.append(
            Line2D([], [], linestyle="", marker="o", markersize=3, color="0.35", label="reference")
        )
    for i, (name, density) in enumerate(result.guides.items()):
        style: Literal["solid", "dashed"] = "solid" if result.scored[name] else "dashed"
        colour = f"C{i}"
        ax.contour(
            x, y, density.numpy(), levels=levels[name], colors=colour, linestyles=style, linewidths=[1.0, 1.8]
        )
        handles.append(Line2D([], [], color=colour, linestyle=style, label=name))
    ax.legend(handles=handles, frameon=False, fontsize="small", loc="best")
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.set_ylim(float(y[0]), float(y[-1]))
    ax.set_xlabel(f"{result.site}[{result.dims[0]}]")
    ax.set_ylabel(f"{result.site}[{result.dims[1]}]")
    ax.set_title(f"datum {result.datum}")
    return ax


def _levels(name: str, density: Tensor) -> list[float]:
    """Return the densities above which 90 % and 50 % of the mass on the grid are, the lower first."""
    if not bool(density.isfinite().all()) or not bool((density > 0).any()):
        raise ValueError(f"{name}: expected a finite density that is above 0 somewhere, got none")
    ordered = density.double().flatten().sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    low, high = (float(ordered[int((mass < share).sum())]) for share in _SHARES)
    return [low, _top(density, low) if high <= low else high]


def _top(density: Tensor, above: float) -> float:
    """Return a number above all densities, and above another number."""
    return 1.01 * max(float(density.max()), above)
