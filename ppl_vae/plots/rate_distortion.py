"""Rate against distortion over KL weights."""

from typing import TYPE_CHECKING

from ppl_vae.evaluation.rate_distortion import RateDistortion
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_rate_distortion(result: RateDistortion, ax: "Axes | None" = None) -> "Axes":
    """Draw distortion against rate, a point per KL weight, each with the line of its ELBO.

    On a line, distortion = - ELBO - rate: pairs on it have the same ELBO; the lower the line, the higher the
    ELBO. That of the highest ELBO is dashed and darker. Bars are standard errors over the test data.

    Args:
        result: what ``rate_distortion`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> import pandas as pd
        >>> from matplotlib.figure import Figure
        >>> columns = {"rate": [5.0, 2.0], "distortion": [80.0, 84.0], "elbo": [-85.0, -86.0]}
        >>> columns |= {"rate_se": [0.1, 0.1], "distortion_se": [0.5, 0.5]}
        >>> table = pd.DataFrame(columns, index=pd.Index([0.5, 2.0], name="kl_weight"))
        >>> ax = plot_rate_distortion(RateDistortion(table, [], [], True), ax=Figure().subplots())
        >>> ax.get_xlabel()
        'rate (nats per datum)'
    """
    table = check_result(result, RateDistortion).table.sort_values("rate")
    ax = axes_or_new(ax, (5.6, 4.4))
    best = table["elbo"].idxmax()
    for weight, elbo, rate in zip(table.index, table["elbo"], table["rate"], strict=True):
        colour, line = ("0.45", "--") if weight == best else ("0.85", "-")
        ax.axline((rate, -elbo - rate), slope=-1, linewidth=0.9, zorder=1, color=colour, linestyle=line)
    label = f"ELBO = {table['elbo'].max():z.2f}".replace("-", "\N{MINUS SIGN}")
    ax.plot([], [], color="0.45", linestyle="--", linewidth=0.9, label=label)
    ax.errorbar(
        table["rate"],
        table["distortion"],
        xerr=table["rate_se"],
        yerr=table["distortion_se"],
        fmt="o-",
        color="tab:blue",
        ecolor="tab:blue",
        elinewidth=0.9,
        linewidth=1.2,
        markersize=5,
        zorder=3,
        label="KL weight",
    )
    for weight, rate, distortion in zip(table.index, table["rate"], table["distortion"], strict=True):
        ax.annotate(f"{weight:g}", (rate, distortion), (5, 5), textcoords="offset points", fontsize="small")
    ax.margins(0.12)
    ax.set_xlabel("rate (nats per datum)")
    ax.set_ylabel("distortion (nats per datum)")
    ax.set_title("Rate and distortion; lines of equal ELBO", fontsize="medium")
    ax.legend(frameon=False, fontsize="small")
    return ax
