"""Scores of which factor was fixed: those of the beta-VAE and of FactorVAE."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_at_least, check_positive_int, check_seed
from ppl_vae.evaluation.disentanglement_metrics._table import Table, check_table, generator_of, number_of
from ppl_vae.evaluation.disentanglement_metrics.score import Score

_PASS = 2**22  # numbers that a pass gathers


def beta_vae_score(
    codes: Tensor,
    factors: Tensor,
    *,
    batch_size: int = 64,
    num_train: int = 10_000,
    num_test: int = 5_000,
    seed: int = 0,
) -> Score:
    r"""Return how often a linear classifier tells which factor pairs of data share, the beta-VAE score.

    A point is made of ``batch_size`` pairs of data that agree on one factor, chosen at random: the mean of
    \|c - c'\| of each code. Multinomial logistic regression (scikit-learn's, C = 1) on ``num_train`` points
    predicts the factor, and the score is its accuracy on ``num_test`` others: 1 at best, about one over the
    number of factors by chance. As in disentanglement_lib, which draws new images; here pairs are drawn from
    the data given: the first datum at random, the second from the others with the same value, which are
    spread as the factors in the data are. The standard error is that of drawing the test points.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``, two factors or more; each value in two data or more, better
            in dozens.
        batch_size: pairs of a point.
        num_train: points to train on.
        num_test: points to test on.
        seed: of the draws.

    Raises:
        ValueError: if a shape is wrong, values are not finite, a factor does not vary, or a value is that of
            one datum only.

    References:
        beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework (Higgins et al.,
        2017)

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        >>> float(beta_vae_score(factors.float(), factors, num_train=500, num_test=200))
        1.0
    """
    from sklearn.linear_model import LogisticRegression

    table, settings = _check(codes, factors, batch_size, num_train, num_test, seed)
    groups = Groups(table)

    def points(fixed: Tensor, generator: torch.Generator) -> Tensor:
        first = torch.randint(len(table), (len(fixed), batch_size), generator=generator)
        second = groups.another(first, fixed, generator)
        return (table.codes[first] - table.codes[second]).abs().mean(1)

    draw = _drawer(table, batch_size, points)
    x, y = draw(num_train, generator_of(seed, 3))
    if len(y.unique()) < 2:
        raise ValueError(f"num_train: expected points of two factors or more, got {num_train} of one")
    classifier = LogisticRegression(max_iter=1000, random_state=number_of(seed, 5)).fit(x.numpy(), y.numpy())
    x, y = draw(num_test, generator_of(seed, 4))
    return _accuracy(torch.from_numpy(classifier.predict(x.numpy())) == y, settings)


def factor_vae_score(
    codes: Tensor,
    factors: Tensor,
    *,
    batch_size: int = 64,
    num_train: int = 10_000,
    num_test: int = 5_000,
    least_std: float = 0.0,
    seed: int = 0,
) -> Score:
    r"""Return how often the code that varies least tells which factor is fixed, the FactorVAE score.

    A point is made of ``batch_size`` data that agree on one factor, chosen at random: the code with the least
    variance in them over that in all data. Each code votes for the factor that it came with most often in
    ``num_train`` points, and the score is the share of ``num_test`` others whose vote is right: 1 at best,
    about one over the number of factors by chance. As in disentanglement_lib, which draws new images; here
    data are drawn, with replacement, from those given. The standard error is that of drawing the test points.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``, two factors or more; each value in two data or more, better
            in dozens.
        batch_size: data of a point, two or more.
        num_train: points to train on.
        num_test: points to test on.
        least_std: codes whose standard deviation is not above it are left out, as Kim and Mnih do with codes
            collapsed to the prior. The score is 0 if all are.
        seed: of the draws.

    Raises:
        ValueError: if a shape is wrong, values are not finite, a factor does not vary, or a value is that of
            one datum only.

    References:
        Disentangling by Factorising (Kim and Mnih, 2018), arXiv:1802.05983

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        >>> float(factor_vae_score(factors.float(), factors, num_train=500, num_test=200))
        1.0
    """
    table, settings = _check(codes, factors, batch_size, num_train, num_test, seed)
    if batch_size < 2:
        raise ValueError(f"batch_size: expected at least 2, to have a variance, got {batch_size}")
    settings["least_std"] = check_at_least("least_std", least_std)
    groups = Groups(table)
    variances = table.codes.var(0)
    # what a mean leaves of the digits of a constant is no variance
    rounding = 1e-12 * table.codes.abs().amax(0)
    active = variances.sqrt() > rounding.clamp(min=least_std)
    if not active.any():
        return Score(0.0, math.nan, settings)
    z = table.codes[:, active] / variances[active].sqrt()

    def points(fixed: Tensor, generator: torch.Generator) -> Tensor:
        values = torch.randint(len(table), (len(fixed),), generator=generator)
        rows = groups.alike(values, fixed, batch_size, generator)
        return z[rows].var(1).argmin(1)

    draw = _drawer(table, batch_size, points)
    num_factors = len(table.sizes)
    codes_of, fixed = draw(num_train, generator_of(seed, 3))
    votes = torch.bincount(codes_of * num_factors + fixed, minlength=z.shape[1] * num_factors)
    choice = votes.view(-1, num_factors).argmax(1)
    codes_of, fixed = draw(num_test, generator_of(seed, 4))
    return _accuracy(choice[codes_of] == fixed, settings)


def _check(
    codes: Tensor, factors: Tensor, batch_size: int, num_train: int, num_test: int, seed: int
) -> tuple[Table, dict[str, Any]]:
    settings = {
        "batch_size": check_positive_int("batch_size", batch_size),
        "num_train": check_positive_int("num_train", num_train),
        "num_test": check_positive_int("num_test", num_test),
        "seed": check_seed(seed),
    }
    return check_table(codes, factors, least_factors=2), settings


def _accuracy(hits: Tensor, settings: dict[str, Any]) -> Score:
    share = float(hits.double().mean())
    return Score(share, math.sqrt(share * (1 - share) / len(hits)), settings)


def _drawer(
    table: Table, batch_size: int, points: Callable[[Tensor, torch.Generator], Tensor]
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Return what draws points and which factor is fixed in each, in passes that fit memory."""
    size = max(1, _PASS // (batch_size * table.codes.shape[1]))

    def passes(number: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        for fixed in torch.randint(len(table.sizes), (number,), generator=generator).split(size):
            yield points(fixed, generator), fixed

    def draw(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        made, fixed = zip(*passes(number, generator), strict=True)
        return torch.cat(made), torch.cat(fixed)

    return draw


class Groups:
    """The data that agree on a factor, to draw from.

    Raises:
        ValueError: if a value is that of one datum only.
    """

    def __init__(self, table: Table) -> None:
        levels = table.levels.T.contiguous()  # [factors, n]
        self.order = levels.argsort(1)
        self.position = self.order.argsort(1)  # of each datum in it
        counts = torch.stack([level.bincount(minlength=max(table.sizes)) for level in levels])
        starts = counts.cumsum(1) - counts
        self.count, self.start = counts.gather(1, levels), starts.gather(1, levels)
        if (self.count < 2).any():
            f, row = (self.count < 2).nonzero()[0].tolist()
            raise ValueError(
                f"factors: expected each value in two data or more, to draw pairs from, got value "
                f"{int(table.factors[row, f])} of column {f} in one datum only"
            )

    def another(self, rows: Tensor, fixed: Tensor, generator: torch.Generator) -> Tensor:
        """Return other data that agree with ``rows`` ``[points, batch]`` on ``fixed`` ``[points]``."""
        f = fixed[:, None]
        count, start = self.count[f, rows], self.start[f, rows]
        step = 1 + _below(count - 1, generator)
        return self.order[f, start + (self.position[f, rows] - start + step) % count]

    def alike(self, rows: Tensor, fixed: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
        """Return ``[points, batch]`` data that agree with ``rows`` ``[points]`` on ``fixed`` ``[points]``."""
        count, start = self.count[fixed, rows], self.start[fixed, rows]
        drawn = _below(count[:, None].expand(-1, batch_size), generator)
        return self.order[fixed[:, None], start[:, None] + drawn]


def _below(count: Tensor, generator: torch.Generator) -> Tensor:
    """Return a whole number from 0 below each count."""
    uniform = torch.rand(count.shape, generator=generator, dtype=torch.float64)
    return (uniform * count).long().minimum(count - 1)
