"""Modularity and explicitness."""

import math

import torch
from torch import Tensor

from ppl_vae.evaluation.disentanglement_metrics._table import (
    JointCounts,
    check_bootstrap,
    check_table,
    information,
    number_of,
    resamples,
    train_and_test,
)
from ppl_vae.evaluation.disentanglement_metrics.score import Score


def modularity(
    codes: Tensor, factors: Tensor, *, bins: int = 20, bootstrap: int = 100, seed: int = 0
) -> Score:
    r"""Return the modularity: whether each code knows of one factor only.

    .. math:: \frac{1}{L} \sum_c 1 - \frac{\sum_{f \ne f_c} I(c; f)^2}{(F - 1) I(c; f_c)^2}

    with :math:`f_c` the factor that code c knows most of. A code of no information counts as 0, as in
    disentanglement_lib, and so do its bins and its mutual information: see ``mutual_information_gap``. Noise
    does not score 0: its mutual informations are those of chance, and one is the largest. The standard error
    is that of a bootstrap over data, the bins being kept; it is too large, by a factor of two say, where
    mutual informations are as small as their bias.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``, two factors or more.
        bins: of each code.
        bootstrap: the number of resamples; 0 for no standard error.
        seed: of the resamples.

    Raises:
        ValueError: if a shape is wrong, values are not finite, or a factor does not vary.

    References:
        Learning Deep Disentangled Embeddings With the F-Statistic Loss (Ridgeway and Mozer, 2018),
        arXiv:1802.05312

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        >>> float(modularity(factors.float(), factors))
        1.0
    """
    table, count = check_table(codes, factors, least_factors=2), check_bootstrap(bootstrap)
    counts = JointCounts(table, bins)

    def score(weights: Tensor | None = None) -> float:
        squares = information(counts(weights))[0].square()
        most = squares.amax(1)
        others = (squares.sum(1) - most) / (most * (squares.shape[1] - 1)).clamp(min=1e-300)
        return float((1 - others).where(most > 0, 0.0).mean())

    scores = torch.tensor([score(weights) for weights in resamples(len(table), count, seed)])
    error = float(scores.std()) if count else math.nan
    return Score(score(), error, {"bins": bins, "bootstrap": count, "seed": seed})


def explicitness(codes: Tensor, factors: Tensor, *, bootstrap: int = 100, seed: int = 0) -> Score:
    """Return the explicitness: how well values of factors are told linearly from all codes.

    Multinomial logistic regression (scikit-learn's, C = 1) on the standardised codes predicts each factor.
    The score is the area under the ROC curve of each value against the others, averaged over values, then
    factors: 1 at best, 0.5 by chance. As in disentanglement_lib it is not rescaled. Rotations of the codes
    don't matter much to it. The linear classifier can tell a value in the middle from both sides only in
    part.

    The classifiers are trained on two thirds of the data at random, and the areas are those of the others; a
    value that is not among both is left out. The standard error is that of a bootstrap over these others,
    with the classifiers kept.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``.
        bootstrap: the number of resamples; 0 for no standard error.
        seed: of the split and the resamples.

    Raises:
        ValueError: if a shape is wrong, values are not finite, a factor does not vary, or data are too few.

    References:
        Learning Deep Disentangled Embeddings With the F-Statistic Loss (Ridgeway and Mozer, 2018),
        arXiv:1802.05312

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(20, 1)
        >>> float(explicitness(factors.float(), factors))
        1.0
    """
    from sklearn.linear_model import LogisticRegression

    table, count = check_table(codes, factors), check_bootstrap(bootstrap)
    train, test = train_and_test(table, seed)
    mean, sd = table.codes[train].mean(0), table.codes[train].std(0)
    x = ((table.codes - mean) / sd.where(sd > 0, 1.0)).numpy()
    weights = torch.stack([torch.ones(len(test)), *resamples(len(test), count, seed)]).double()
    areas = []  # [1 + resamples] of each factor
    for f in range(len(table.sizes)):
        y = table.levels[:, f]
        classifier = LogisticRegression(max_iter=1000, random_state=number_of(seed, 6, f))
        classifier.fit(x[train], y[train].numpy())
        scores = torch.from_numpy(classifier.predict_proba(x[test]))
        of_values = [
            area_under_curve(column, y[test] == value, weights)
            for column, value in zip(scores.unbind(1), classifier.classes_.tolist(), strict=True)
        ]
        areas.append(torch.stack(of_values).nanmean(0))
    values = torch.stack(areas).nanmean(0)
    if bool(values[0].isnan()):
        raise ValueError(f"codes: expected more data, to train and test on, got {len(table)}")
    error = float(values[1:].std()) if count else math.nan
    return Score(float(values[0]), error, {"bootstrap": count, "seed": seed})


def area_under_curve(scores: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Return the area under the ROC curve under each row of weights, ``[rows]``, ties counted by half.

    Args:
        scores: the higher, the more likely positive, ``[n]``.
        positive: booleans ``[n]``.
        weights: of the data, ``[rows, n]``.

    Returns:
        Areas; NaN where all data are of one kind.
    """
    ordered, order = scores.sort()
    positive, weights = positive[order], weights[:, order]
    negatives = torch.nn.functional.pad((weights * ~positive).cumsum(1), (1, 0))
    below = negatives[:, torch.searchsorted(ordered, ordered)]
    up_to = negatives[:, torch.searchsorted(ordered, ordered, right=True)]
    positives = weights * positive
    pairs = positives.sum(1) * negatives[:, -1]
    return ((positives * (below + up_to)).sum(1) / 2 / pairs).where(pairs > 0, math.nan)
