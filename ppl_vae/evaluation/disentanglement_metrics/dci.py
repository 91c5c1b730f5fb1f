"""Disentanglement, completeness and informativeness."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice
from ppl_vae.evaluation.disentanglement_metrics._table import Table, check_table, number_of, train_and_test
from ppl_vae.evaluation.disentanglement_metrics.score import Score

ESTIMATORS = ("gradient_boosting", "random_forest", "lasso")


@dataclass(frozen=True, eq=False)
class DCI:
    """What ``dci`` measured.

    Attributes:
        disentanglement: whether a code is of one factor.
        completeness: whether a factor is in one code.
        informativeness: how well factors are predicted from the codes, on the test data.
        informativeness_train: the same on the training data.
        importance: of each code for each factor, ``[latent, factors]``, from 0.
    """

    disentanglement: Score
    completeness: Score
    informativeness: Score
    informativeness_train: float
    importance: Tensor = field(repr=False)

    def __str__(self) -> str:
        return (
            f"disentanglement {self.disentanglement}, completeness {self.completeness}, "
            f"informativeness {self.informativeness}"
        )


def dci(
    codes: Tensor,
    factors: Tensor,
    *,
    estimator: Literal["gradient_boosting", "random_forest", "lasso"] = "gradient_boosting",
    seed: int = 0,
    on_factor: Callable[[], Any] | None = None,
) -> DCI:
    r"""Return disentanglement, completeness and informativeness of the codes.

    A predictor of each factor from all codes is trained, and the importance :math:`R_{cf}` of code c for it
    is read off. The disentanglement of a code is one minus the entropy of :math:`R_{cf} / \sum_f R_{cf}`,
    logarithm to the base of the number of factors, and its weight is its share of all importance.
    Completeness of a factor is one minus the entropy of :math:`R_{cf} / \sum_c R_{cf}` to the base of the
    number of codes, weighted likewise.

    ``"gradient_boosting"`` is that of disentanglement_lib: scikit-learn's ``GradientBoostingClassifier`` with
    its own settings; minutes for 10,000 data and factors of many values. ``"random_forest"`` is a
    ``RandomForestClassifier`` of 100 trees that see all codes at each split, much quicker. Informativeness is
    their accuracy. ``"lasso"`` is for codes in which factors are linear: ``LassoCV`` on standardised codes,
    importance the size of its coefficients, informativeness the R\ :sup:`2`.

    Predictors are trained on two thirds of the data at random. Informativeness has the standard error over
    test data (not of the lasso); the other two have none, as that would take new predictors.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``, two factors or more.
        estimator: the predictor.
        seed: of the split and the predictors.
        on_factor: is called when a factor is done, for a progress bar.

    Raises:
        ValueError: if a shape is wrong, values are not finite, a factor does not vary, or data are too few.

    References:
        A Framework for the Quantitative Evaluation of Disentangled Representations (Eastwood and Williams,
        2018)

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(3)).repeat(20, 1)
        >>> print(dci(factors.float(), factors, estimator="lasso"))
        disentanglement 1.0..., completeness 1.0..., informativeness 1.0...
    """
    check_choice("estimator", estimator, ESTIMATORS)
    table = check_table(codes, factors, least_factors=2)
    train, test = train_and_test(table, seed)
    columns, train_scores, test_scores = [], [], []
    predict = _regress if estimator == "lasso" else _classify
    for f in range(len(table.sizes)):
        importance, on_train, on_test = predict(table, f, train, test, estimator, number_of(seed, 2, f))
        columns.append(importance)
        train_scores.append(on_train)
        test_scores.append(on_test)
        if on_factor is not None:
            on_factor()
    matrix = torch.stack(columns, 1)
    shares = matrix / matrix.sum().clamp(min=1e-300)
    per_datum = torch.stack(test_scores).mean(0)  # [test], or one number of the lasso
    error = float(per_datum.std()) / math.sqrt(len(per_datum)) if len(per_datum) > 1 else math.nan
    settings = {"estimator": estimator, "seed": seed}
    return DCI(
        Score(float((_concentration(matrix) * shares.sum(1)).sum()), settings=settings),
        Score(float((_concentration(matrix.T) * shares.sum(0)).sum()), settings=settings),
        Score(float(per_datum.mean()), error, settings),
        float(torch.stack(train_scores).mean()),
        matrix,
    )


def _concentration(importance: Tensor) -> Tensor:
    """Return one minus the entropy of each row, to the base of its length."""
    p = importance + 1e-11  # as in disentanglement_lib: a row of zeros is spread evenly
    p = p / p.sum(1, keepdim=True)
    return 1 + p.xlogy(p).sum(1) / math.log(p.shape[1])


def _classify(
    table: Table, f: int, train: Tensor, test: Tensor, estimator: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return importances ``[latent]``, the accuracy on training data, and hits on test data ``[test]``."""
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

    x, y = table.codes.numpy(), table.levels[:, f].numpy()
    if estimator == "gradient_boosting":
        model = GradientBoostingClassifier(random_state=seed)
    else:  # a split that sees some codes only would have to use others than the one that matters
        model = RandomForestClassifier(max_features=None, random_state=seed)
    model.fit(x[train], y[train])
    hits = [torch.from_numpy(model.predict(x[rows]) == y[rows]).double() for rows in (train, test)]
    return torch.from_numpy(model.feature_importances_).double(), hits[0].mean(), hits[1]


def _regress(
    table: Table, f: int, train: Tensor, test: Tensor, estimator: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the size of the coefficients ``[latent]``, and R^2 on training and test data."""
    from sklearn.linear_model import LassoCV

    del estimator
    mean, sd = table.codes[train].mean(0), table.codes[train].std(0)
    x = ((table.codes - mean) / sd.where(sd > 0, 1.0)).numpy()
    values = table.factors[:, f].double()
    y = ((values - values[train].mean()) / values[train].std()).numpy()
    if len(train) < 5:
        raise ValueError(f"codes: expected more data, for the five folds of the lasso, got {len(table)}")
    model = LassoCV(random_state=seed).fit(x[train], y[train])
    spread = y[test].var()
    on_test = 1 - ((model.predict(x[test]) - y[test]) ** 2).mean() / spread if spread else math.nan
    return (
        torch.from_numpy(abs(model.coef_)),
        torch.tensor(model.score(x[train], y[train])),
        torch.tensor([on_test]),
    )
