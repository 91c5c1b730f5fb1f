"""KL divergences of latent sites: closed forms where they are known, else from the draws."""

import math
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.distributions.kl import kl_divergence

from ppl_vae.infer.running import Site
from ppl_vae.infer.scoring import Scores


def site_kl(
    name: str, scores: Scores, *, closed_form: bool = True, by_dimension: bool = False
) -> tuple[Tensor, bool]:
    """Return a latent site's KL(q || p), and whether it is a closed form.

    Args:
        name: the site.
        scores: of a run.
        closed_form: take one if it is known; else the mean over the draws.
        by_dimension: of each dimension apart.

    Returns:
        Nats, ``[n, dimensions]``, or ``[n, 1]`` of all dimensions together.

    Raises:
        ValueError: if the closed form is wrong for the pair, or the dimensions can't be told apart.
    """
    q, p = scores.guide_sites[name], scores.model_sites.get(name)
    if p is None:
        return scores.kl(name).mean(0).unsqueeze(-1), False
    if closed_form and q["mask"] is None and p["mask"] is None:
        kl = _closed_form(q["fn"], p["fn"], by_dimension=by_dimension)
        if kl is not None:
            _check_order(name, scores)
            kl = kl if by_dimension else kl.unsqueeze(-1)
            return (kl.mean(0) if kl.dim() == 3 else kl).expand(scores.reconstruction.shape[1], -1), True
    if not by_dimension:
        return scores.kl(name).mean(0).unsqueeze(-1), False
    masked = q["mask"] is not None or p["mask"] is not None
    if masked or not (factorises(q["fn"]) and factorises(p["fn"])):
        raise ValueError(
            "free_bits: expected model and guide that factorise over the dimensions (`.to_event(1)`) and "
            f"have no mask at site {name!r}, or free_bits_per='site'"
        )
    z = q["value"]
    kl = q["fn"].base_dist.log_prob(z) - p["fn"].base_dist.log_prob(scores.draws[name])
    kl = kl.expand(*torch.broadcast_shapes(kl.shape[:-1], scores.reconstruction.shape), -1)
    return kl.mean(0), False


def factorises(fn: Any) -> bool:
    """Return whether a distribution is one of independent dimensions: ``.to_event(1)``."""
    return isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape


def _closed_form(q: Any, p: Any, *, by_dimension: bool) -> Tensor | None:
    """Return KL(q || p), ``[*particles, n]`` or ``[*particles, n, dimensions]``, or None if not known."""
    if any(isinstance(_base(fn), Delta) for fn in (q, p)):  # a density of its own, which Pyro leaves out
        return None
    if by_dimension:
        if not (factorises(q) and factorises(p)):
            return None
        q, p = q.base_dist, p.base_dist
    elif isinstance(q, (MultivariateNormal, LowRankMultivariateNormal)) and factorises(p):
        if isinstance(p.base_dist, Normal):
            loc, scale = p.base_dist.loc, p.base_dist.scale
            squares = (q.variance + (q.mean - loc).square()) / scale.square() + math.log(2 * math.pi)
            return 0.5 * squares.sum(-1) + scale.log().sum(-1) - q.entropy()
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def _base(fn: Any) -> Any:
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _check_order(name: str, scores: Scores) -> None:
    """Raise unless all that the model draws before a site, the guide draws before it too."""
    before = {}
    for program, sites in (("model", scores.model_sites), ("guide", scores.guide_sites)):
        names: list[Site] = list(sites)
        before[program] = set(names[: names.index(name)])
    if later := sorted(before["model"] - before["guide"]):
        raise ValueError(
            f"site {name!r}: the closed form of its KL is wrong here: the model draws it after {later}, "
            "the guide before; draw the sites in one order in both, or set analytic_kl=False"
        )
