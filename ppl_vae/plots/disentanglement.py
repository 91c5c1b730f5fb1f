"""Which code knows of which factor."""

from typing import TYPE_CHECKING

from ppl_vae.evaluation.disentanglement_metrics import Disentanglement
from ppl_vae.plots._tiles import check_result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEADLINE = ("MIG", "SAP", "DCI disentanglement", "FactorVAE")
_NUMBERED = 16  # codes, beyond which the squares have no numbers


def plot_disentanglement(result: Disentanglement, ax: "Axes | None" = None) -> "Axes":
    """Draw how much each code knows of each factor: mutual information over the factor's entropy.

    A row for each code, a column for each factor. Codes that are disentangled have one dark square in a row,
    and factors that are in one code have one in a column.

    Args:
        result: what ``disentanglement`` returns.
        ax: where to draw; None makes a figure.

    Returns:
        The axes.

    Raises:
        TypeError: if the result is of another kind.

    Example:
        >>> from matplotlib.figure import Figure
        >>> import torch
        >>> information, entropy = torch.eye(2), torch.ones(2)
        >>> result = Disentanglement({}, information, entropy, information, ("shape", "scale"), 10)
        >>> ax = plot_disentanglement(result, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['shape', 'scale']
    """
    check_result(result, Disentanglement)
    shares = (result.mutual_information / result.entropy).double().clamp(0.0, 1.0)
    latent, factors = shares.shape
    if ax is None:
        import matplotlib.pyplot as plt

        size = (2.2 + 0.75 * factors, 1.6 + 0.34 * min(latent, 24))  # inches
        _, ax = plt.subplots(figsize=(max(size[0], 4.2), size[1]), layout="constrained")
    image = ax.imshow(
        shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest"
    )
    if latent <= _NUMBERED:
        for row in range(latent):
            for column in range(factors):
                share = float(shares[row, column])
                ax.text(
                    column,
                    row,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize="small",
                    color="white" if share > 0.6 else "0.3",
                )
    ax.set_xticks(range(factors), result.names)
    every = -(-latent // 24)
    rows = range(0, latent, every)
    ax.set_yticks(rows, [f"z[{row}]" for row in rows])
    ax.tick_params(length=0, labelsize="small")
    ax.spines[:].set_visible(False)
    known = [f"{name} {result.scores[name].value:.2f}" for name in _HEADLINE if name in result.scores]
    pairs = [", ".join(known[i : i + 2]) for i in range(0, len(known), 2)]
    ax.set_title(",\n".join(pairs) or f"{result.num_data} data", fontsize="medium")
    ax.figure.colorbar(image, ax=ax, label="mutual information / entropy of the factor")
    return ax
