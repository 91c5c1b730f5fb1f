"""Inference gaps of data."""

from typing import TYPE_CHECKING

import torch

from ppl_vae.evaluation.inference_gaps import InferenceGaps
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS = 200
_PARTS = (
    ("approximation_gap", "approximation gap", "tab:blue"),
    ("amortization_gap", "amortisation gap", "tab:orange"),
)


def plot_gaps(result: InferenceGaps, ax: "Axes | None" = None) -> "Axes":
    """Draw the two inference gaps of each datum as stacked bars, the largest sum first.

    Dashed lines are the means, of the approximation gap and of both together; the legend has them as numbers
    with their standard errors over data. A gap below zero, by noise, goes down from zero. Of more than 200
    data, each bar is the mean over neighbours in the order of the sums.

    Args:
        result: what ``inference_gaps`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if values are not finite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppl_vae.evaluation import Estimate
        >>> gaps = [Estimate(torch.tensor(v), 10, 0.1) for v in ([1.0, 2.0], [0.5, 3.0], [1.5, 5.0])]
        >>> result = InferenceGaps(*[gaps[2]] * 3, *gaps, {}, 2, 10, "shared", 50, True)
        >>> ax = plot_gaps(result, ax=Figure().subplots())
        >>> ax.get_ylabel()
        'nats'
    """
    from matplotlib.ticker import MaxNLocator

    check_result(result, InferenceGaps)
    values = torch.stack([getattr(result, name).values.double().cpu() for name, _, _ in _PARTS])
    if not bool(values.isfinite().all()):
        raise ValueError("result: expected finite gaps, got nan or inf")
    n = values.shape[1]
    values = values[:, values.sum(0).argsort(descending=True)]
    groups = values.tensor_split(min(n, _MOST_BARS), dim=1)
    bars = torch.stack([group.mean(1) for group in groups], 1)
    sizes = torch.tensor([group.shape[1] for group in groups])
    left = (sizes.cumsum(0) - sizes).double() + 0.5  # ranks from 1, bars around them
    ax = axes_or_new(ax, (6.4, 3.8))
    above, below = torch.zeros_like(left), torch.zeros_like(left)
    total = 0.0
    for (name, label, colour), heights in zip(_PARTS, bars, strict=True):
        estimate = getattr(result, name)
        text = f"{label} {_number(estimate.mean, estimate.standard_error)}"
        base = torch.where(heights >= 0, above, below)
        ax.bar(
            left.tolist(),
            heights.tolist(),
            sizes.tolist(),
            base.tolist(),
            align="edge",
            color=colour,
            label=text,
            linewidth=0,
        )
        above, below = above + heights.clamp(min=0), below + heights.clamp(max=0)
        total += estimate.mean
        ax.axhline(total, color="black", linestyle="--", linewidth=0.8, alpha=0.7)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.set_xlim(0.5, n + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(y=0.05)
    ax.set_xlabel("datum, by its inference gap")
    ax.set_ylabel("nats")
    ax.set_title(f"Inference gaps of {n} data", fontsize="medium")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small", loc="upper right")
    return ax


def _number(mean: float, error: float) -> str:
    text = f"{mean:.2f}" if error != error else f"{mean:.2f} ± {error:.2f}"  # NaN of one datum
    return text.replace("-", "\N{MINUS SIGN}")
