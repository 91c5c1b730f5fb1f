"""The separated attribute predictability score."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_vae.evaluation.disentanglement_metrics._table import (
    Table,
    check_bootstrap,
    check_table,
    gap,
    resamples,
    train_and_test,
)
from ppl_vae.evaluation.disentanglement_metrics.score import Score


def sap_score(
    codes: Tensor,
    factors: Tensor,
    *,
    continuous: bool | Sequence[bool] = False,
    bootstrap: int = 100,
    seed: int = 0,
) -> Score:
    r"""Return the SAP score: how much better the best code predicts a factor than the second best.

    .. math:: \frac{1}{F} \sum_f S(c_{(1)}, f) - S(c_{(2)}, f)

    where S is how well f is predicted from one code alone.

    - Of a factor that is not continuous, S is the accuracy on the test data of a linear support vector
      machine (one against the rest, C = 0.01, balanced classes), as in disentanglement_lib, which takes all
      factors so. One threshold on a line can't tell a value in the middle from those on both sides, so that
      factors of more than two values stay below 1. The codes' scale matters.
    - Of a continuous one, S is the squared correlation over all data, the R\ :sup:`2` of a linear regression:
      1 for the factor itself.

    The machines are trained on two thirds of the data at random. The standard error is that of a bootstrap
    over the data that S is taken on, with the trained machines kept.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``.
        continuous: whether factors are numbers to regress on; one for all, or one for each.
        bootstrap: the number of resamples; 0 for no standard error.
        seed: of the split and the resamples.

    Raises:
        ValueError: if a shape is wrong, values are not finite, or a factor does not vary.

    References:
        Variational Inference of Disentangled Latent Concepts from Unlabeled Observations (Kumar et al.,
        2018), arXiv:1711.00848

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        >>> round(float(sap_score(factors.float(), factors, continuous=True)), 6)
        1.0
    """
    table, count = check_table(codes, factors), check_bootstrap(bootstrap)
    regressed = check_continuous(continuous, table.factors.shape[1])
    values = torch.zeros(table.factors.shape[1], dtype=torch.float64)
    scores = torch.zeros(count, len(values), dtype=torch.float64)
    if any(regressed):
        columns = [f for f, is_continuous in enumerate(regressed) if is_continuous]
        y = table.factors[:, columns].double()
        values[columns] = gap(_squared_correlation(table.codes, y))
        for b, weights in enumerate(resamples(len(table), count, seed)):
            scores[b, columns] = gap(_squared_correlation(table.codes, y, weights.double()))
    if not all(regressed):
        columns = [f for f, is_continuous in enumerate(regressed) if not is_continuous]
        correct = _svm_hits(table, columns, seed)  # [test, latent, classified]
        values[columns] = gap(correct.mean(0))
        for b, weights in enumerate(resamples(len(correct), count, seed)):
            scores[b, columns] = gap(torch.einsum("n,nlf->lf", weights.double(), correct) / len(correct))
    error = float(scores.mean(1).std()) if count else math.nan
    settings = {"continuous": continuous if isinstance(continuous, bool) else regressed}
    return Score(float(values.mean()), error, {**settings, "bootstrap": count, "seed": seed})


def check_continuous(continuous: bool | Sequence[bool], factors: int) -> list[bool]:
    """Return for each factor whether it is continuous."""
    if isinstance(continuous, bool):
        return [continuous] * factors
    chosen = list(continuous) if isinstance(continuous, Sequence) else None
    if chosen is None or len(chosen) != factors or not all(isinstance(c, bool) for c in chosen):
        raise ValueError(
            f"continuous: expected a bool, or one for each of {factors} factors, got {continuous!r}"
        )
    return chosen


def _squared_correlation(codes: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``[latent, factors]``, 0 where one of the two does not vary."""
    w = (torch.ones(len(codes), dtype=codes.dtype) if weights is None else weights)[:, None] / len(codes)
    u, v = codes - (w * codes).sum(0), y - (w * y).sum(0)
    variances = (w * u**2).sum(0)[:, None] * (w * v**2).sum(0)
    covariance = (w * u).T @ v
    return (covariance**2 / variances.clamp(min=1e-300)).where(variances > 1e-24, 0.0)


def _svm_hits(table: Table, columns: list[int], seed: int) -> Tensor:
    """Return 1 where a code's machine is right about a factor, ``[test, latent, columns]``."""
    from sklearn.svm import LinearSVC

    train, test = train_and_test(table, seed)
    x, y = table.codes.numpy(), table.levels.numpy()
    hits = torch.zeros(len(test), x.shape[1], len(columns), dtype=torch.float64)
    for j, f in enumerate(columns):
        for i in range(x.shape[1]):
            # the primal solver is exact; a seed keeps NumPy's stream as it was
            machine = LinearSVC(C=0.01, class_weight="balanced", dual=False, random_state=0)
            machine.fit(x[train, i : i + 1], y[train, f])
            hits[:, i, j] = torch.from_numpy(machine.predict(x[test, i : i + 1]) == y[test, f]).double()
    return hits
