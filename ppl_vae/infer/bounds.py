"""Bounds of K log weights."""

import math

import torch
from torch import Tensor


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Return the logarithm of the mean weight."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


def renyi_bound(log_weights: Tensor, alpha: float) -> Tensor:
    """Return the Renyi bound of K log weights along the first dimension."""
    if alpha == 1:
        return log_weights.mean(0)
    if math.isinf(alpha):
        return log_weights.amin(0) if alpha > 0 else log_weights.amax(0)
    order = 1 - alpha
    if abs(order) < 0.01:  # where the logarithm of the mean is the small difference of large numbers
        mean = log_weights.mean(0)
        return mean + torch.expm1(order * (log_weights - mean)).mean(0).log1p() / order
    return log_mean_exp(order * log_weights) / order
