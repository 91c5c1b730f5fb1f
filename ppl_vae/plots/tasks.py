"""Plots of tasks: scores of anomalies, denoised, imputed and new images, and images of moved latents."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_vae._checks import check_choice
from ppl_vae.plots._axes import axes_or_new
from ppl_vae.plots._tiles import check_images, check_result, draw_tiles, number
from ppl_vae.tasks.anomaly import AnomalyDetection
from ppl_vae.tasks.arithmetic import Edits, LatentArithmetic
from ppl_vae.tasks.augmentation import Augmented
from ppl_vae.tasks.denoising import Denoised
from ppl_vae.tasks.imputation import Imputation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {
    "elbo": "minus ELBO",
    "log_likelihood": "minus log p(x)",
    "reconstruction": "minus E[log p(x | z)]",
    "kl": "KL divergence",
}
_MOST = 12  # data in one plot
_GREY = 0.5  # of missing elements


def plot_roc_curves(result: AnomalyDetection, ax: "Axes | None" = None) -> "Axes":
    """Draw the ROC curve of each anomaly score, with the area under it in the legend.

    Args:
        result: what ``detect_anomalies`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.tasks import detect_anomalies
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> normal, anomalous = torch.randn(50, 5), 10 + torch.randn(30, 5)
        >>> result = detect_anomalies(model, guide, normal, anomalous, progress=False)
        >>> ax = plot_roc_curves(result, ax=Figure().subplots())
        >>> ax.get_legend_handles_labels()[1][1]
        'minus log p(x): 1.000 ± 0.000'
    """
    check_result(result, AnomalyDetection)
    from sklearn.metrics import roc_curve

    ax = axes_or_new(ax, (6.8, 4.2))
    for score in result.normal:
        normal, anomalous = result.normal[score], result.anomalous[score]
        labels = torch.cat([torch.zeros_like(normal), torch.ones_like(anomalous)])
        values = torch.cat([normal, anomalous]).nan_to_num()
        false, true, _ = roc_curve(labels.numpy(), values.numpy())
        row = result.table.loc[score]
        ax.plot(false, true, label=f"{_NAMES[score]}: {row['auroc']:.3f} ± {row['auroc_se']:.3f}")
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":", zorder=0)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set_xlabel("normal data above the threshold")
    ax.set_ylabel("anomalous data above the threshold")
    ax.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize="small",
        title="area under the curve",
    )
    ax.set_title("ROC curves of anomaly scores", fontsize="medium")
    return ax


def plot_anomaly_scores(result: AnomalyDetection, ax: "Axes | None" = None, *, score: str = "elbo") -> "Axes":
    """Draw histograms of one score: of normal and of anomalous data.

    The highest hundredth of all scores is left out where it would squeeze the rest.

    Args:
        result: what ``detect_anomalies`` returns.
        ax: where to draw; None makes a figure.
        score: which score.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if there is no such score.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.tasks import detect_anomalies
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> normal, anomalous = torch.randn(50, 5), 10 + torch.randn(30, 5)
        >>> result = detect_anomalies(model, guide, normal, anomalous, progress=False)
        >>> ax = plot_anomaly_scores(result, ax=Figure().subplots(), score="log_likelihood")
        >>> ax.get_xlabel()
        'minus log p(x), nats'
    """
    check_result(result, AnomalyDetection)
    check_choice("score", score, result.normal)
    ax = axes_or_new(ax, (5.6, 3.6))
    named = {"normal": result.normal[score], "anomalous": result.anomalous[score]}
    values = torch.cat(list(named.values()))
    values = values[values.isfinite()].double()
    low, high = float(values.min()), float(values.max())
    most = float(values.quantile(0.99, interpolation="lower")) if len(values) < 2**24 else high
    if high - low > 2 * (most - low):
        high = most
    edges = torch.linspace(low, high if high > low else low + 1.0, 41, dtype=torch.float64).numpy()
    for label, kind in named.items():
        inside = kind[(kind >= low) & (kind <= high)]
        left_out = len(kind) - len(inside)
        note = f", {left_out} above {number(high)} left out" if left_out else ""
        ax.hist(
            inside.numpy(),
            bins=edges,  # type: ignore[arg-type]
            weights=[1.0 / len(kind)] * len(inside),
            alpha=0.6,
            label=f"{label} (n={len(kind)}{note})",
        )
    ax.set_xlabel(f"{_NAMES.get(score, score)}, nats")
    ax.set_ylabel("share of the data")
    ax.legend(frameon=False, fontsize="small")
    row = result.table.loc[score]
    ax.set_title(
        f"Anomaly scores: area under ROC {row['auroc']:.3f} ± {row['auroc_se']:.3f}", fontsize="medium"
    )
    return ax


def plot_denoising(result: Denoised, ax: "Axes | None" = None) -> "Axes":
    """Draw noisy images over denoised ones, and the clean ones below where they are known; the first 12.

    Args:
        result: what ``denoise`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x = torch.rand(4, 1, 8, 8)
        >>> result = Denoised(x, x.sqrt(), torch.zeros(4, 1, 8, 8), torch.ones(4), num_particles=1)
        >>> ax = plot_denoising(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['noisy', 'denoised']
    """
    check_result(result, Denoised)
    rows = {"noisy": result.noisy, "denoised": result.mean}
    if result.clean is not None:
        rows["clean"] = result.clean
    tiles = [check_images(f"result.{name}", images[:_MOST], grid=1) for name, images in rows.items()]
    ax = draw_tiles(torch.stack(tiles), ax, rows=list(rows))
    title = "Denoised: posterior means"
    if result.clean is not None:
        before, after = (
            float(result.peak_signal_to_noise_ratio(of_noisy=of_noisy).mean()) for of_noisy in (True, False)
        )
        title += f", PSNR {before:.1f} dB before, {after:.1f} dB after"
    ax.set_title(title, fontsize="medium")
    return ax


def plot_imputation(result: Imputation, ax: "Axes | None" = None) -> "Axes":
    """Draw images with missing elements in grey, their posterior means and two draws; the first 12.

    Args:
        result: what ``impute`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x, missing = torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8) < 0.3
        >>> none = torch.zeros(4, 1, 8, 8)
        >>> result = Imputation(x, missing, x.expand(8, -1, -1, -1, -1), none, none, "importance")
        >>> ax = plot_imputation(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['observed', 'mean', 'draw 1', 'draw 2']
    """
    check_result(result, Imputation)
    observed = torch.where(result.missing, _GREY, result.x)
    rows = {"observed": observed, "mean": result.x}
    rows |= {f"draw {i}": draw for i, draw in enumerate(result.draws[:2], 1)}
    if result.truth is not None:
        rows["truth"] = result.truth
    tiles = [check_images(f"result, {name}", images[:_MOST], grid=1) for name, images in rows.items()]
    ax = draw_tiles(torch.stack(tiles), ax, rows=list(rows))
    ax.set_title(f"Missing elements (grey) imputed: {result.method}", fontsize="medium")
    return ax


def plot_augmentation(result: Augmented, ax: "Axes | None" = None) -> "Axes":
    """Draw images over the new ones that were made from them; the first 12.

    Args:
        result: what ``augment`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x, y, source = torch.rand(4, 1, 8, 8), torch.tensor([7, 1, 0, 3]), torch.arange(4)
        >>> result = Augmented(x.sqrt(), y, source, x, copies=1)
        >>> ax = plot_augmentation(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['7', '1', '0', '3']
    """
    check_result(result, Augmented)
    original = check_images("result.original", result.original[:_MOST], grid=1)
    new = result.x.reshape(result.copies, -1, *result.x.shape[1:])[:8, :_MOST]
    new = check_images("result.x", new, grid=2)
    labels = ["data", "new", *[""] * (len(new) - 1)]
    names = None
    if result.y is not None and result.y.dim() == 1:
        names = [str(int(label)) for label in result.y[: len(original)]]
    ax = draw_tiles(torch.cat([original[None], new]), ax, rows=labels, columns=names)
    ax.set_title("Data, and new data near them", fontsize="medium")
    return ax


def plot_latent_arithmetic(result: LatentArithmetic, ax: "Axes | None" = None) -> "Axes":
    """Draw the images of a, b, c and a − b + c in a row.

    Args:
        result: what ``latent_arithmetic`` returns, of images ``[4, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> result = LatentArithmetic(z=torch.randn(4, 2), x=torch.rand(4, 1, 8, 8))
        >>> ax = plot_latent_arithmetic(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['a', 'b', 'c', 'a − b + c']
    """
    images = check_images("result.x", check_result(result, LatentArithmetic).x, grid=1)
    columns = ["a", "b", "c", "a \N{MINUS SIGN} b + c"]
    ax = draw_tiles(images[None], ax, columns=columns)
    ax.set_title("Arithmetic of mean latents", fontsize="medium")
    return ax


def plot_edits(result: Edits, ax: "Axes | None" = None) -> "Axes":
    """Draw images, and below them what they become as a vector is added to their latents; the first 12.

    Args:
        result: what ``edit`` returns, of images ``[n, C, H, W]`` in [0, 1].
        ax: where to draw; None makes a figure that fits.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.
        ValueError: if its data are not images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> x, moved, strengths = torch.rand(4, 1, 8, 8), torch.rand(4, 2, 1, 8, 8), torch.tensor([0.0, 1.5])
        >>> ax = plot_edits(Edits(x, moved, strengths), ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['data', '0', '1.5']
    """
    check_result(result, Edits)
    original = check_images("result.original", result.original[:_MOST], grid=1)
    moved: Tensor = check_images("result.x", result.x[:_MOST], grid=2)
    rows = ["data", *(number(float(strength)) for strength in result.strengths)]
    ax = draw_tiles(torch.cat([original[None], moved.transpose(0, 1)]), ax, rows=rows)
    ax.set_ylabel("strength of the vector")
    ax.set_title("Data edited by an attribute vector", fontsize="medium")
    return ax
