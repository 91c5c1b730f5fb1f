"""The course of a training run."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ppl_vae._checks import did_you_mean
from ppl_vae.plots._axes import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEYS = [
    "epoch",
    "train_loss",
    "train_elbo",
    "train_reconstruction",
    "train_kl_z",
    "validation_elbo",
    "validation_reconstruction",
    "validation_kl_z",
    "kl_weight",
    "capacity",
    "temperature",
    "learning_rate",
    "seconds",
]
_KL = re.compile(r"(train|validation)_kl_(\w+)")
_RATE = re.compile(r"learning_rate_\d+")  # of each parameter group, where they differ
_FEW = 40  # curves of up to this many points get markers


def plot_history(result: Sequence[Mapping[str, float]], ax: "Axes | None" = None) -> "Axes":
    """Draw the ELBO of training and validation data over epochs, with the KL of each latent site.

    The ELBO is on the left axis and the KL, of training data if recorded, on the right one, both in nats per
    datum. Where the first tenth of 20 epochs or more is far below the rest, the left axis starts at the rest.

    Args:
        result: one mapping for each epoch, such as ``fit`` records, with the key epoch and any of
            train_loss, train_elbo, train_reconstruction, train_kl_z (one for each latent site), the same of
            validation, learning_rate and seconds.
        ax: where to draw; None makes a figure.

    Returns:
        The axes of the ELBO.

    Raises:
        TypeError: if the result is not a sequence of mappings.
        ValueError: if it is empty, a key is unknown, or epoch or the ELBO is missing.

    Example:
        >>> from matplotlib.figure import Figure
        >>> history = [{"epoch": 1, "train_elbo": -150.0}, {"epoch": 2, "train_elbo": -120.0}]
        >>> ax = plot_history(history, ax=Figure().subplots())
        >>> ax.get_ylabel()
        'ELBO (nats per datum)'
    """
    _check(result)
    ax = axes_or_new(ax, (6.4, 4.0))
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    lines = []
    for split, colour in (("train", "tab:blue"), ("validation", "tab:orange")):
        epochs, elbo = _curve(result, f"{split}_elbo")
        if epochs:
            label = f"ELBO, {split}"
            if split == "validation" and any(map(math.isfinite, elbo)):
                best, epoch = max(
                    (value, epoch) for epoch, value in zip(epochs, elbo, strict=True) if math.isfinite(value)
                )
                label += f" (best {best:.2f} at epoch {epoch:g})".replace("-", "\N{MINUS SIGN}")
            lines += ax.plot(
                epochs,
                elbo,
                color=colour,
                linewidth=1.5 if len(epochs) < 200 else 1.0,
                marker=_marker(epochs),
                markersize=4,
                label=label,
            )
    _limit(ax, result)
    first, last = result[0]["epoch"], result[-1]["epoch"]
    margin = 0.03 * (last - first) or 0.5
    ax.set_xlim(first - margin, last + margin)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.set_xlabel("epoch")
    ax.set_ylabel("ELBO (nats per datum)")
    ax.set_title("Training history", fontsize="medium")

    matches = {key: match for row in result for key in row if (match := _KL.fullmatch(key))}
    split = "train" if any(match[1] == "train" for match in matches.values()) else "validation"
    sites = sorted(match[2] for match in matches.values() if match[1] == split)
    if sites:
        right = ax.twinx()
        for site, dash in zip(sites, ["--", ":", "-."] * len(sites), strict=False):
            epochs, kl = _curve(result, f"{split}_kl_{site}")
            lines += right.plot(
                epochs,
                kl,
                color="tab:green",
                linestyle=dash,
                linewidth=1.0,
                marker=_marker(epochs),
                markersize=3,
                label=f"KL of {site}, {split}",
            )
        # Headroom keeps the KL in the lower half, below the ELBO curves as they settle.
        right.set_ylim(min(0.0, right.dataLim.y0), 2 * right.dataLim.y1 if right.dataLim.y1 > 0 else None)
        right.set_ylabel("KL (nats per datum)", color="tab:green")
        right.tick_params(axis="y", colors="tab:green")
        right.spines["right"].set_color("tab:green")
    below = ax.transAxes + ScaledTranslation(0.0, -0.45, ax.figure.dpi_scale_trans)  # inches, past the label
    ax.legend(
        handles=lines,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=below,
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    return ax


def _check(history: Sequence[Mapping[str, float]]) -> None:
    """Raise if the history can't be drawn."""
    if isinstance(history, (str, Mapping)) or not isinstance(history, Sequence):
        raise TypeError(f"result: expected a list of dicts, one for each epoch, got {type(history).__name__}")
    if not history:
        raise ValueError("result: expected a history of at least one epoch, got an empty one")
    for i, row in enumerate(history):
        if not isinstance(row, Mapping):
            raise TypeError(f"result[{i}]: expected a dict, got {type(row).__name__}")
        for key in row:
            if key not in _KEYS and not _KL.fullmatch(key) and not _RATE.fullmatch(key):
                raise ValueError(
                    f"result[{i}]: unknown key {key!r}{did_you_mean(key, _KEYS)}; expected one of {_KEYS}"
                )
        if "epoch" not in row:
            raise ValueError(f"result[{i}]: expected the key 'epoch', got {list(row)}")
    if not any(key in row for row in history for key in ("train_elbo", "validation_elbo")):
        raise ValueError(
            f"result: expected train_elbo or validation_elbo among the keys, got {list(history[0])}"
        )


def _curve(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Return the epochs that have a value, and their values."""
    rows = [row for row in history if row.get(key) is not None]
    return [float(row["epoch"]) for row in rows], [float(row[key]) for row in rows]


def _marker(epochs: Sequence[float]) -> str:
    return "o" if len(epochs) <= _FEW else ""


def _limit(ax: "Axes", history: Sequence[Mapping[str, float]]) -> None:
    """Start the axis where the ELBO is after the first tenth of epochs, if the start is far below."""
    values = [
        (i, row[key])
        for i, row in enumerate(history)
        for key in ("train_elbo", "validation_elbo")
        if row.get(key) is not None and math.isfinite(row[key])
    ]
    later = [value for i, value in values if i >= len(history) / 10]
    if len(history) < 20 or not later:
        return
    low, high = min(later), max(later)
    if low - min(value for _, value in values) > high - low > 0:
        ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
