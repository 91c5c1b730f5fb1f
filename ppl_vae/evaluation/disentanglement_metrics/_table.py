"""What the scores share: checks of codes and factors, bins, joint counts, resamples and splits."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppl_vae._checks import check_positive_int, check_seed

_NO_INFORMATION = 1e-12  # nats: below it a mutual information is rounding


@dataclass(frozen=True, eq=False)
class Table:
    """Codes and factors of the same data, on the CPU.

    Attributes:
        codes: ``[n, latent]``, float64.
        factors: ``[n, factors]``, whole numbers as they came.
        levels: ``[n, factors]``, each factor's values numbered from 0.
        sizes: how many values each factor has.
    """

    codes: Tensor
    factors: Tensor
    levels: Tensor
    sizes: list[int]

    def __len__(self) -> int:
        return len(self.codes)


def check_factors(factors: object, name: str = "factors") -> Tensor:
    """Return factors ``[n, factors]`` as int64 on the CPU, or raise."""
    values = torch.from_numpy(factors) if isinstance(factors, np.ndarray) else factors
    if not isinstance(values, Tensor) or values.ndim != 2 or 0 in values.shape:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(factors).__name__
        raise ValueError(f"{name}: expected a tensor [n, factors] of whole numbers, got {got}")
    values = values.detach().cpu()
    whole = values.long()
    if values.is_complex() or not torch.equal(whole.to(values.dtype), values):
        raise ValueError(f"{name}: expected whole numbers, got {values.dtype} with others")
    return whole


def check_table(codes: object, factors: object, *, least_factors: int = 1) -> Table:
    """Return codes and factors that a score can be computed of, or raise.

    Raises:
        ValueError: naming the argument: a shape is wrong, there are fewer than two codes or
            ``least_factors`` factors, values are not finite or not whole, or a factor does not vary.
    """
    values = torch.from_numpy(codes) if isinstance(codes, np.ndarray) else codes
    if not isinstance(values, Tensor) or values.ndim != 2 or 0 in values.shape:
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(codes).__name__
        raise ValueError(f"codes: expected a tensor [n, latent], got {got}")
    if values.shape[1] < 2:
        raise ValueError("codes: expected two latent dimensions or more, to compare, got one")
    z = values.detach().cpu().double()
    if not bool(z.isfinite().all()):
        row = int((~z.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"codes: expected finite values, got NaN or infinite ones, first in row {row}")
    whole = check_factors(factors)
    if len(whole) != len(z):
        raise ValueError(f"factors: expected one row for each of {len(z)} codes, got {len(whole)}")
    if whole.shape[1] < least_factors:
        raise ValueError(f"factors: expected {least_factors} or more, to compare, got {whole.shape[1]}")
    levels, sizes = [], []
    for i, column in enumerate(whole.unbind(1)):
        found, level = column.unique(return_inverse=True)
        if len(found) < 2:
            raise ValueError(
                f"factors: expected factors that vary, got one value in column {i}: leave it out"
            )
        levels.append(level)
        sizes.append(len(found))
    return Table(z, whole, torch.stack(levels, 1), sizes)


def bins_of(codes: Tensor, bins: int) -> Tensor:
    """Return the bin of each code, ``[n, latent]`` from 0: of equal width over each dimension's range."""
    bins = check_positive_int("bins", bins)
    low, high = codes.amin(0), codes.amax(0)
    edges = torch.arange(bins, dtype=codes.dtype) * ((high - low) / bins)[:, None] + low[:, None]
    return torch.searchsorted(edges, codes.T.contiguous(), right=True).T - 1


class JointCounts:
    """Counts of each code's bins with each factor's values, of the data or of resamples.

    Args:
        table: codes and factors.
        bins: the number of bins.
    """

    def __init__(self, table: Table, bins: int) -> None:
        latent, factors = table.codes.shape[1], table.levels.shape[1]
        self.shape = (latent, factors, check_positive_int("bins", bins), max(table.sizes))
        pair = torch.arange(latent * factors).view(latent, factors)
        cells = (pair * bins + bins_of(table.codes, bins)[:, :, None]) * self.shape[3]
        self.cells = (cells + table.levels[:, None, :]).flatten(1)

    def __call__(self, weights: Tensor | None = None) -> Tensor:
        """Return ``[latent, factors, bins, values]``, with ``weights`` ``[n]`` of the data, 1 by default."""
        if weights is not None:
            weights = weights.double()[:, None].expand_as(self.cells).reshape(-1)
        length = self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]
        return torch.bincount(self.cells.reshape(-1), weights, minlength=length).double().view(self.shape)


def information(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mutual information ``[latent, factors]`` and the factors' entropies ``[factors]``, nats."""
    p = counts / counts.sum((-2, -1), keepdim=True)
    of_bins, of_values, of_both = _entropy(p.sum(-1)), _entropy(p.sum(-2)), _entropy(p.flatten(-2))
    mutual = of_bins + of_values - of_both
    return mutual.where(mutual > _NO_INFORMATION, 0.0), of_values[0]


def _entropy(p: Tensor) -> Tensor:
    return -p.xlogy(p).sum(-1)


def gap(matrix: Tensor) -> Tensor:
    """Return the difference of the highest and the second in each column of ``[..., latent, factors]``."""
    first, second = matrix.topk(2, dim=-2).values.unbind(-2)
    return first - second


def check_bootstrap(bootstrap: object) -> int:
    """Return the number of resamples, 0 or at least 2."""
    if isinstance(bootstrap, int) and not isinstance(bootstrap, bool) and bootstrap == 0:
        return 0
    if check_positive_int("bootstrap", bootstrap) < 2:
        raise ValueError(f"bootstrap: expected 0 or at least 2 resamples, got {bootstrap!r}")
    return int(bootstrap)  # type: ignore[call-overload]


def resamples(n: int, bootstrap: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each of ``n`` data is in each of ``bootstrap`` resamples, ``[n]``."""
    generator = generator_of(seed, 1)
    for _ in range(bootstrap):
        yield torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n)


def generator_of(seed: int, *key: int) -> torch.Generator:
    """Return a generator of its own stream."""
    return torch.Generator().manual_seed(number_of(seed, *key))


def number_of(seed: int, *key: int) -> int:
    """Return a seed that scikit-learn takes."""
    return int(np.random.SeedSequence((check_seed(seed), *key)).generate_state(1)[0])


def train_and_test(table: Table, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows of the training data, two thirds at random, and of the others."""
    n = len(table)
    order = torch.randperm(n, generator=generator_of(seed, 0))
    train, test = order[: n - n // 3], order[n - n // 3 :]
    if not len(test) or any(len(column.unique()) < 2 for column in table.levels[train].unbind(1)):
        raise ValueError(f"codes: expected more data, to train and test on, got {n}")
    return train, test
