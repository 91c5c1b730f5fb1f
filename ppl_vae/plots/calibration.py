"""Simulation-based calibration: rank histograms and coverage."""

from typing import TYPE_CHECKING, Any

from ppl_vae.evaluation.calibration import Calibration
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

_SIZE = (6.4, 4.0)
_BAND = 0.99  # of the binomial counts of a calibrated guide
_NAMED = 10  # quantities that have a colour each


def plot_calibration(result: Calibration, ax: "Axes | None" = None) -> "Axes":
    """Draw the rank histogram of each quantity over the band expected of a calibrated guide.

    The band holds 99 % of the counts of a bin, each bin for itself. A U says that the guide is too narrow, a
    hump that it is too wide, a slope that it is shifted: down to the right, that draws are too high. Of more
    than ten quantities only those that the test rejects have a colour, ten at most.

    Args:
        result: what ``simulation_based_calibration`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> result = Calibration({"z[0]": torch.arange(200) % 20}, num_draws=19, bins=10)
        >>> ax = plot_calibration(result, ax=Figure().subplots())
        >>> ax.get_xlabel()
        'rank of the true value among 19 draws'
    """
    check_result(result, Calibration)
    from scipy.stats import binom

    ax = axes_or_new(ax, _SIZE)
    n, bins, ranks = result.num_data, result.bins, result.num_draws + 1
    low, high = binom.interval(_BAND, n, 1 / bins)
    ax.axhspan(low, high, color="0.9", zorder=0, label=f"{_BAND:.0%} of a bin's counts")
    ax.axhline(n / bins, color="0.6", linewidth=0.9, zorder=1, label="expected")
    edges = [i * ranks / bins - 0.5 for i in range(bins + 1)]
    for name, style in _styles(result):
        ax.stairs(result.histogram(name).tolist(), edges, linewidth=1.3, baseline=None, **style)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"rank of the true value among {result.num_draws} draws")
    ax.set_ylabel(f"data of {n}")
    ax.set_title(_title(result), fontsize="medium")
    _legend(ax)
    return ax


def plot_coverage(result: Calibration, ax: "Axes | None" = None) -> "Axes":
    """Draw how often central intervals hold the true value, over the band expected of a calibrated guide.

    A curve below the diagonal is of a guide that is too narrow. The band holds 99 % of the shares at each
    level, each for itself. Colours are those of ``plot_calibration``.

    Args:
        result: what ``simulation_based_calibration`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> result = Calibration({"z[0]": torch.arange(200) % 20}, num_draws=19, bins=10)
        >>> ax = plot_coverage(result, ax=Figure().subplots())
        >>> ax.get_ylabel()
        'share of data that it holds'
    """
    check_result(result, Calibration)
    from scipy.stats import binom

    ax = axes_or_new(ax, _SIZE)
    n, found = result.num_data, result.coverage()
    levels = found.index.unique("level").to_numpy()
    low, high = binom.interval(_BAND, n, levels)
    label = f"{_BAND:.0%} of shares at a level"
    ax.fill_between(levels, low / n, high / n, color="0.9", linewidth=0, zorder=0, label=label)
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.9, zorder=1, label="expected")
    for name, style in _styles(result):
        ax.plot(levels, found["coverage"].xs(name, level="quantity"), linewidth=1.3, **style)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.set_xlabel("level of the central interval")
    ax.set_ylabel("share of data that it holds")
    ax.set_title(_title(result), fontsize="medium")
    _legend(ax)
    return ax


def _title(result: Calibration) -> str:
    rejected, count = len(result.rejected), len(result.ranks)
    return f"Calibration: {rejected} of {count} quantities rejected"


def _styles(result: Calibration) -> "Sequence[tuple[str, dict[str, Any]]]":
    """Return the quantities with their styles, those without a colour first."""
    import matplotlib

    names, rejected = list(result.ranks), result.rejected
    coloured = names if len(names) <= _NAMED else rejected[:_NAMED]
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    others = [name for name in names if name not in coloured]
    grey = [
        (name, {"color": "0.65", "zorder": 2, "label": f"{len(others)} others" if i == 0 else None})
        for i, name in enumerate(others)
    ]
    labels = [f"{name}, rejected" if name in rejected else name for name in coloured]
    return grey + [
        (name, {"color": colours[i], "zorder": 3, "label": labels[i]}) for i, name in enumerate(coloured)
    ]


def _legend(ax: "Axes") -> None:
    ax.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False, fontsize="small"
    )
