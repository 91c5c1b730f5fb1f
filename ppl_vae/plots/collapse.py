"""Which latent dimensions are active, and which have collapsed."""

from typing import TYPE_CHECKING

from ppl_vae.evaluation.active_units import CollapseReport
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^v<>P"
_NAMED = 20  # active dimensions up to which each has its number beside it


def plot_collapse(result: CollapseReport, ax: "Axes | None" = None) -> "Axes":
    """Draw the KL of each latent dimension against the variance of its posterior mean.

    Dimensions right of the dashed line are active and filled. Where the KL of a site is not known, as its
    dimensions don't factorise, all are drawn by their posterior standard deviation instead. A variance of
    zero stands at the left edge.

    Args:
        result: what ``collapse_report`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> import pandas as pd
        >>> from matplotlib.figure import Figure
        >>> index = pd.MultiIndex.from_tuples([("z", 0), ("z", 1)], names=["site", "dimension"])
        >>> columns = {"variance_of_means": [0.8, 1e-5], "kl": [1.9, 0.0], "posterior_sd": [0.3, 1.0]}
        >>> table = pd.DataFrame(columns | {"active": [True, False]}, index=index)
        >>> ax = plot_collapse(CollapseReport(table, {}, 0.01, 500, 50), ax=Figure().subplots())
        >>> ax.get_title()
        '1 of 2 dimensions active'
    """
    table = check_result(result, CollapseReport).table
    ax = axes_or_new(ax, (5.6, 4.2))
    column = "posterior_sd" if table["kl"].isna().any() else "kl"
    variances = table["variance_of_means"]
    positive = [float(v) for v in variances if v > 0] + [result.threshold or 1.0]
    edge = min(positive) / 3
    sites = list(dict.fromkeys(table.index.get_level_values("site")))
    for i, site in enumerate(sites):
        rows = table.loc[site]
        colour, marker = f"C{i % 10}", _MARKERS[i % len(_MARKERS)]
        for is_active in (True, False):
            chosen = rows[rows["active"].astype(bool) == is_active]
            if not len(chosen):
                continue
            ax.plot(
                chosen["variance_of_means"].clip(lower=edge),
                chosen[column],
                marker,
                color=colour,
                markerfacecolor=colour if is_active else "none",
                markersize=6,
                alpha=0.8,
                label=f"{site}, {len(chosen)} {'active' if is_active else 'not active'}",
            )
    active = table[table["active"].astype(bool)]
    if len(active) <= _NAMED:
        dimensions = active.index.get_level_values("dimension")
        points = zip(active["variance_of_means"], active[column], strict=True)
        for dimension, at in zip(dimensions, points, strict=True):
            ax.annotate(str(dimension), at, (4, 4), textcoords="offset points", fontsize="x-small")
    if result.threshold > 0:
        ax.axvline(result.threshold, color="0.5", linestyle="--", linewidth=0.9, zorder=1)
    ax.set_xscale("log")
    ax.margins(0.08)
    ax.set_xlabel(f"variance of the posterior mean over {result.num_data} data")
    ax.set_ylabel("KL (nats per datum)" if column == "kl" else "posterior standard deviation")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]), auto=None)
    ax.set_title(f"{len(active)} of {len(table)} dimensions active", fontsize="medium")
    ax.legend(frameon=False, fontsize="small")
    return ax
