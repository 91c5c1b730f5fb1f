"""Estimators of one pair side by side."""

import math
from typing import TYPE_CHECKING

from ppl_vae.evaluation.estimators import EstimatorComparison
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPS = {"guide": ("o", "tab:blue", -0.13), "model": ("D", "tab:orange", 0.13)}


def plot_estimators(result: EstimatorComparison, ax: "Axes | None" = None) -> "Axes":
    """Draw the signal-to-noise ratios of each estimator's gradients, with its bound beside its name.

    A ratio of zero (no signal above the noise) is a triangle at the left edge, an infinite one (no noise) a
    triangle at the right edge. A group of parameters without a gradient has no mark.

    Args:
        result: what ``compare_estimators`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> import pandas as pd
        >>> from matplotlib.figure import Figure
        >>> table = pd.DataFrame({"bound": [-90.0], "guide_snr": [0.5], "model_snr": [2.0]}, index=["STL"])
        >>> ax = plot_estimators(EstimatorComparison(table, -89.0, 0.1, 50, 100, 0), ax=Figure().subplots())
        >>> ax.get_yticklabels()[0].get_text().split()
        ['STL', '−90.00']
    """
    table = check_result(result, EstimatorComparison).table
    bounds = ["no bound" if math.isnan(bound) else f"{bound:z.2f}" for bound in table["bound"]]
    bounds = [bound.replace("-", "\N{MINUS SIGN}") for bound in bounds]
    labels = [f"{name}   {bound}" for name, bound in zip(table.index, bounds, strict=True)]
    if ax is None:
        import matplotlib.pyplot as plt

        size = (4.6 + 0.09 * max(map(len, labels)), 1.5 + 0.32 * len(table))  # inches
        _, ax = plt.subplots(figsize=size, layout="constrained")
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
    from matplotlib.transforms import blended_transform_factory

    edges = blended_transform_factory(ax.transAxes, ax.transData)
    finite: list[float] = []
    for role, (marker, colour, shift) in _GROUPS.items():
        values = [float(value) for value in table[f"{role}_snr"]]
        inside = [(v, i + shift) for i, v in enumerate(values) if 0 < v < math.inf]
        finite += [v for v, _ in inside]
        xs, ys = zip(*inside, strict=True) if inside else ((), ())
        ax.plot(xs, ys, marker, color=colour, markersize=6, label=f"{role}'s gradient", zorder=3)
        for i, value in enumerate(values):
            if value in (0.0, math.inf):
                at, triangle = (0.012, "<") if value == 0 else (0.988, ">")
                ax.plot(
                    at,
                    i + shift,
                    triangle,
                    color=colour,
                    markerfacecolor="none",
                    markersize=6,
                    transform=edges,
                    zorder=3,
                )
    ax.set_xscale("log")
    low, high = (min(finite), max(finite)) if finite else (0.1, 10.0)
    margin = max((high / low) ** 0.08, 1.3)
    ax.set_xlim(low / margin, high * margin)
    wide = high / low * margin**2 > 30
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter(LogFormatterSciNotation() if low < 1e-3 or high > 1e4 else "{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(table)), labels)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(table) - 0.5, -0.5)  # the first on top
    for i in range(1, len(table)):
        ax.axhline(i - 0.5, color="0.9", linewidth=0.8, zorder=0)
    ax.grid(axis="x", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("signal-to-noise ratio of one gradient")
    title = "estimator and its bound (nats per datum)"
    if not math.isnan(result.log_likelihood):
        title += f"; log p(x) = {result.log_likelihood:z.2f}".replace("-", "\N{MINUS SIGN}")
    ax.set_title(
        title,
        fontsize="medium",
        loc="right",
        pad=22,
    )
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.1,
        ncols=2,
        frameon=False,
        fontsize="small",
        handletextpad=0.2,
    )
    return ax
