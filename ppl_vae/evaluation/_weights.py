"""What is made of the log weights of each datum."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppl_vae.evaluation.evaluate import Estimate


def log_mean_weight(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log of the mean weight, and its variance by the delta method, ``[n]`` each, float64.

    Args:
        log_weights: ``[K, n]``.

    Raises:
        ValueError: if one is NaN or plus infinity.
    """
    wrong = (log_weights.isnan() | (log_weights == math.inf)).any(0)
    if bool(wrong.any()):
        raise ValueError(
            "model: expected log weights that are numbers, got NaN or plus infinity for "
            f"{int(wrong.sum())} of {len(wrong)} data"
        )
    draws = len(log_weights)
    values = log_weights.double().logsumexp(0) - math.log(draws)
    # the variance of log(mean w) is that of mean w over its square
    relative = draws / effective_sample_size(log_weights) - 1
    return values, relative.clamp(min=0) / (draws - 1 or math.nan)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return (sum w)^2 / sum w^2 of log weights ``[K, n]``, ``[n]``: between 1 and K; 0 if all are zero."""
    normalised = log_weights.double().log_softmax(0)
    some = log_weights.max(0).values > -math.inf
    return torch.where(some, 1 / normalised.exp().square().sum(0), 0.0)


def estimate_of(values: Sequence[Tensor], variances: Sequence[Tensor], draws: int) -> Estimate:
    """Return the estimate of all passes, from the values and variances ``[n]`` of each."""
    joined = torch.cat(list(values)).cpu()
    variance = torch.cat(list(variances)).sum()
    return Estimate(joined, draws, float(variance.sqrt() / len(joined)))
