"""How well clusters agree with labels."""

from typing import Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice


def clustering_accuracy(
    clusters: Tensor, y: Tensor, *, matching: Literal["one-to-one", "many-to-one"] = "one-to-one"
) -> float:
    """Return the share of data whose cluster is matched with their label, in [0, 1].

    Clusters are matched with labels so that the share is the largest: one cluster to a label at most, by the
    Hungarian method (Kuhn, 1955), or each cluster with its most frequent label (purity). With more clusters
    than labels the first leaves clusters without a label; the second grows with their number, whatever they
    are.

    Args:
        clusters: whole numbers from 0, ``[n]``.
        y: labels, whole numbers from 0, ``[n]``.
        matching: ``"one-to-one"`` or ``"many-to-one"``.

    Raises:
        ValueError: if the two differ in shape, are empty or hold other than whole numbers from 0.

    References:
        Unsupervised Deep Embedding for Clustering Analysis (Xie et al., 2016), arXiv:1511.06335, section 4.2

    Example:
        >>> clustering_accuracy(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 1, 1]))
        0.75
        >>> clustering_accuracy(
        ...     torch.tensor([1, 1, 0, 2]), torch.tensor([0, 0, 1, 1]), matching="many-to-one"
        ... )
        1.0
    """
    check_choice("matching", matching, ("one-to-one", "many-to-one"))
    table = contingency_table(clusters, y)
    if matching == "many-to-one":
        matched = int(table.amax(1).sum())
    else:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
        matched = int(table[rows, columns].sum())
    return matched / len(y)


def normalized_mutual_information(clusters: Tensor, y: Tensor) -> float:
    """Return the mutual information of clusters and labels over the mean of their entropies, in [0, 1].

    It is scikit-learn's ``normalized_mutual_info_score``.

    Args:
        clusters: whole numbers from 0, ``[n]``.
        y: labels, whole numbers from 0, ``[n]``.

    Raises:
        ValueError: if the two differ in shape, are empty or hold other than whole numbers from 0.

    Example:
        >>> normalized_mutual_information(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    _check(clusters, y)
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(y.cpu().numpy(), clusters.cpu().numpy()))


def contingency_table(clusters: Tensor, y: Tensor) -> Tensor:
    """Return how many data have each cluster and label, ``[clusters, labels]``, on the CPU.

    Raises:
        ValueError: if the two differ in shape, are empty or hold other than whole numbers from 0.

    Example:
        >>> contingency_table(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1]))
        tensor([[0, 1],
                [1, 1]])
    """
    _check(clusters, y)
    clusters, y = clusters.long().cpu(), y.long().cpu()
    rows, columns = int(clusters.max()) + 1, int(y.max()) + 1
    return torch.bincount(clusters * columns + y, minlength=rows * columns).view(rows, columns)


def _check(clusters: Tensor, y: Tensor) -> None:
    for name, values in (("clusters", clusters), ("y", y)):
        if values.dim() != 1 or not len(values) or values.is_floating_point() or bool((values < 0).any()):
            raise ValueError(
                f"{name}: expected whole numbers from 0, shape [n], got {values.dtype} of shape "
                f"{list(values.shape)}" + (" with values below 0" if bool((values < 0).any()) else "")
            )
    if len(clusters) != len(y):
        raise ValueError(f"y: expected as many labels as clusters, {len(clusters)}, got {len(y)}")
