"""Gradients of an estimator that are not those of its value."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppl_vae.infer.scoring import Scores


def with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``surrogate``."""
    return value.detach() + (surrogate - surrogate.detach())


def scale_gradients(scores: Scores, factors: Tensor) -> None:
    """Multiply the gradient that reaches each draw from the scores by ``factors``, ``[K, n]``."""
    for name, z in scores.draws.items():
        if z.requires_grad:
            events = (1,) * len(scores.guide_sites[name]["fn"].event_shape)
            by = factors.reshape(factors.shape + events)
            by = by[0] if z.dim() < by.dim() else by
            z.register_hook(functools.partial(torch.mul, by))


def two_objectives(scores: Scores, kl_weight: Any, model_shares: Tensor, guide_shares: Tensor) -> Tensor:
    """Return ``[n]`` whose gradient weighs draws by some shares for the model, by others for the guide.

    Args:
        scores: of a run with ``gradient="full"``.
        kl_weight: as in ``Scores.log_weights``.
        model_shares: ``[K, n]``, constants.
        guide_shares: ``[K, n]``, constants.
    """
    none = (model_shares == 0) & (guide_shares == 0)
    # one too small to be told from zero is raised, so that the guide's can be recovered from it
    model_shares = model_shares.clamp(min=torch.finfo(model_shares.dtype).eps ** 2)
    scale_gradients(scores, guide_shares / model_shares)
    log_q = sum(kl_weight * scores.weights[name] * log_prob for name, log_prob in scores.guide.items())
    return torch.where(none, 0.0, model_shares * scores.joint(kl_weight) - guide_shares * log_q).sum(0)


def weighted_sum(shares: Tensor, values: Tensor) -> Tensor:
    """Return the sum over draws of ``shares * values``, without those of share 0, infinite ones say."""
    return torch.where(shares > 0, shares * values, 0.0).sum(0)


def with_score_function(scores: Scores, log_weights: Tensor, bound: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``bound(log_weights)``, ``[n]``, with the score function for sites that are not reparameterised.

    Each draw's baseline is the bound without it: its log weight replaced by the mean of the others'.
    """
    value = bound(log_weights)
    discrete = [scores.guide[name] for name, site in scores.guide_sites.items() if not site["fn"].has_rsample]
    if not discrete or not torch.is_grad_enabled():
        return value
    constant = log_weights.detach().clamp(min=-1e30)  # of draws that the model rules out
    k = len(constant)
    others = (constant.sum(0) - constant) / (k - 1)
    own = torch.eye(k, dtype=torch.bool, device=constant.device).unsqueeze(-1)
    without = torch.where(own, others.unsqueeze(0), constant.unsqueeze(1))  # [K, without one of K, n]
    advantage = value.detach() - bound(without)
    return with_gradient_of(value, value + (advantage * sum(discrete)).sum(0))
