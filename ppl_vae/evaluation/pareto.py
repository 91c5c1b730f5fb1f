"""Pareto smoothing of importance weights, and how far they can be trusted."""

import math

import torch
from torch import Tensor

LEAST_TAIL = 5  # draws that a fit needs
_PRIOR_BS, _PRIOR_K = 3, 10
_MOST_ELEMENTS = 2**22  # of a pass
_TINY = torch.finfo(torch.float64).tiny
_EPS = torch.finfo(torch.float64).eps


def pareto_smooth(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Smooth the largest of K importance weights by a generalised Pareto distribution fitted to them.

    The fit's shape k-hat says how heavy the tail of the weights is: the mean of the weights has a finite
    variance for k < 1/2, and estimates are practical for k-hat up to 0.7. The fit is Zhang and Stephens'
    (2009), drawn to 1/2 as if by ten draws more. The tail are the largest
    :math:`\min(K / 5, 3 \sqrt{K})` weights; all columns are fitted at once. ``arviz.psislw`` gives the same.

    Args:
        log_weights: log importance weights, ``[K, *batch]``, independent draws along the first dimension.

    Returns:
        The smoothed log weights, ``[K, *batch]``, in the order of the draws, not normalised, none above the
        largest raw one; and k-hat, ``[*batch]``. Both are float64. k-hat is infinite where fewer than five
        draws are in the tail, so that it can't be told, and minus infinite where the weights have no tail,
        since the largest are equal. Weights without a fit stay as they are.

    Raises:
        ValueError: if there is no draw, or a log weight is NaN or plus infinity.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), arXiv:1507.02646

    Example:
        >>> smoothed, k_hat = pareto_smooth(torch.randn(1000, 3))
        >>> smoothed.shape, k_hat.shape
        (torch.Size([1000, 3]), torch.Size([3]))
    """
    if log_weights.dim() < 1 or not len(log_weights):
        raise ValueError(f"log_weights: expected shape [K, *batch], got {list(log_weights.shape)}")
    if bool((log_weights.isnan() | (log_weights == math.inf)).any()):
        raise ValueError("log_weights: expected no NaN and no plus infinity")
    draws, batch = len(log_weights), log_weights.shape[1:]
    columns = log_weights.detach().double().reshape(draws, -1)
    tail = tail_size(draws)
    k_hat = columns.new_full((columns.shape[1],), math.inf)
    if tail < LEAST_TAIL or not columns.numel():
        return columns.clone().reshape(log_weights.shape), k_hat.reshape(batch)
    smoothed = columns.clone()
    width = max(1, _MOST_ELEMENTS // (tail * (30 + math.isqrt(tail))))
    for part in torch.arange(columns.shape[1], device=columns.device).split(width):
        smoothed[:, part], k_hat[part] = _smooth(columns[:, part], tail)
    return smoothed.reshape(log_weights.shape), k_hat.reshape(batch)


def pareto_k_hat(log_weights: Tensor) -> Tensor:
    """Return the k-hat of ``pareto_smooth``, ``[*batch]``, for log weights ``[K, *batch]``.

    Example:
        >>> pareto_k_hat(torch.zeros(100, 3))
        tensor([-inf, -inf, -inf], dtype=torch.float64)
    """
    return pareto_smooth(log_weights)[1]


def tail_size(draws: int) -> int:
    """Return how many of the largest weights the fit takes."""
    return math.ceil(min(draws / 5, 3 * math.sqrt(draws)))


def _smooth(log_weights: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Return smoothed log weights ``[K, m]`` and k-hat ``[m]``."""
    top, index = log_weights.topk(tail + 1, 0)
    largest = top[0]
    top = (top - torch.where(largest.isfinite(), largest, 0.0)).T  # [m, tail + 1], from the largest
    cutoff = top[:, -1:].clamp(min=math.log(_TINY))
    in_tail = top[:, :-1] > cutoff
    excess = torch.where(in_tail, top[:, :-1].exp() - cutoff.exp(), 0.0)
    count = in_tail.sum(1)
    no_tail = excess[:, 0] <= 10 * _EPS  # the largest weights are equal, up to rounding
    fits = (count >= LEAST_TAIL) & ~no_tail
    k_hat, scale = _fit(excess, in_tail, torch.where(fits, count, 1))
    fits = fits & k_hat.isfinite()
    # the expected order statistics of the fit, from the largest
    place = (count.double()[:, None] - torch.arange(tail, device=top.device) - 0.5) / count.clamp(min=1)[
        :, None
    ]
    log_survival = torch.log1p(-place.clamp(min=0.0))
    shape = torch.where(k_hat.abs() < _EPS, 1.0, k_hat)[:, None]
    quantile = torch.where(
        k_hat.abs()[:, None] < _EPS, -log_survival, torch.expm1(-shape * log_survival) / shape
    )
    new = (scale[:, None] * quantile + cutoff.exp()).log().clamp(max=0.0) + largest[:, None]
    chosen = in_tail & (fits & (scale > 0))[:, None]
    values = torch.where(chosen, new, log_weights.gather(0, index[:-1]).T)
    smoothed = log_weights.scatter(0, index[:-1], values.T)
    none = torch.where(largest.isfinite() & no_tail, -math.inf, math.inf)
    return smoothed, torch.where(fits, k_hat, none)


def _fit(excess: Tensor, in_tail: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shape and the scale, ``[m]`` each, of generalised Pareto distributions.

    Args:
        excess: draws above the threshold, ``[m, tail]``, from the largest, 0 where there is none.
        in_tail: where there is one.
        count: how many there are, ``[m]``.
    """
    size = excess.shape[1]
    points = 30 + count.double().sqrt().floor().long()  # of the grid of each column
    grid = torch.arange(1, 31 + math.isqrt(size), dtype=torch.float64, device=excess.device)
    in_grid = grid <= points[:, None]
    quarter = (count / 4 + 0.5).long().clamp(min=1)  # the quartile's place from the smallest
    quartile = excess.gather(1, (count - quarter)[:, None])
    b = (1 - (points[:, None] / (grid - 0.5)).sqrt()) / (_PRIOR_BS * quartile) + 1 / excess[:, :1]

    def mean_log(b: Tensor) -> Tensor:
        terms = torch.log1p(-b[..., None] * excess[:, None, :])
        return torch.where(in_tail[:, None, :], terms, 0.0).sum(-1) / count[:, None]

    k = mean_log(b)
    log_likelihood = count[:, None] * ((-b / k).log() - k - 1)
    log_likelihood = torch.where(in_grid, log_likelihood, -math.inf)
    weights = log_likelihood.softmax(1)
    weights = torch.where(weights >= 10 * _EPS, weights, 0.0)
    mean = torch.where(weights > 0, b * weights, 0.0).sum(1) / weights.sum(1)
    shape = mean_log(mean[:, None])[:, 0]
    scale = -shape / mean
    return (count * shape + _PRIOR_K * 0.5) / (count + _PRIOR_K), scale
