"""Estimators of the ELBO itself: with the KL divergence under control, and sticking the landing."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal
from torch.distributions.kl import kl_divergence

from ppl_vae._checks import check_at_least, check_choice
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.running import Site
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Gradient, Scores

logger = logging.getLogger(__name__)


class KL_ELBO(Estimator):
    r"""The ELBO as reconstruction minus KL, where the KL can be weighted, capped or given for free.

    .. math:: E_q[\log p(x \mid z)] - \beta \sum_s KL(q(z_s \mid x) \,\|\, p(z_s))

    The KL of a site is a closed form where one is known, else estimated from the draws; which, is in
    ``analytic`` and, once, in the log. With a weight, a capacity or free bits the objective is no bound
    on log p(x): ``terms`` and the records of ``fit`` hold the true ELBO.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114;
        beta-VAE (Higgins et al., 2017); capacity: Understanding disentangling in beta-VAE (Burgess et
        al., 2018), arXiv:1804.03599; free bits: Improved Variational Inference with Inverse
        Autoregressive Flow (Kingma et al., 2016), arXiv:1606.04934

    Args:
        num_particles: the number of draws per datum.
        kl_weight: :math:`\beta`, a number from 0 or a schedule.
        analytic_kl: take a closed form where one is known; False for none.
        capacity: C in nats, a number or a schedule: the objective's KL is :math:`|KL - C|`, where KL is
            the batch's mean, all sites together.
        free_bits: the least KL in nats that the objective counts, of the batch's mean of each dimension or
            site.
        free_bits_per: ``"dimension"`` or ``"site"``.

    Attributes:
        analytic: whether the KL of a latent site was a closed form, by name, at the last call.

    Raises:
        ValueError: if both ``capacity`` and ``free_bits`` are set. On a run: if a site of the guide is not
            reparameterised, a closed form would be wrong, since the model draws a site given others that
            the guide draws later, or the dimensions of a site, each to have free bits, can't be told apart.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> elbo = KL_ELBO(kl_weight=4.0)
        >>> elbo.loss(model, guide, model(None, size=3)).shape, elbo.analytic
        (torch.Size([]), {'z': True})
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        kl_weight: float | Schedule = 1.0,
        analytic_kl: bool = True,
        capacity: float | Schedule | None = None,
        free_bits: float | None = None,
        free_bits_per: Literal["dimension", "site"] = "dimension",
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        check_choice("free_bits_per", free_bits_per, ("dimension", "site"))
        if capacity is not None and free_bits is not None:
            raise ValueError(f"free_bits: expected None beside a capacity, got {free_bits!r}")
        self.analytic_kl = analytic_kl
        self.capacity = (
            capacity if capacity is None or callable(capacity) else check_at_least("capacity", capacity)
        )
        self.free_bits = None if free_bits is None else check_at_least("free_bits", free_bits)
        self.free_bits_per = free_bits_per
        self.analytic: dict[str, bool] = {}

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return reconstruction minus the weighted KL, ``[n]``."""
        kls = {name: self._kl(name, scores) for name in scores.guide}
        if kls.keys() and self.analytic != (found := {name: known for name, (_, known) in kls.items()}):
            self.analytic = found
            for name, known in found.items():
                logger.info("KL of site %r: %s", name, "closed form" if known else "estimated from draws")
        reconstruction = scores.reconstruction.mean(0)
        if self.capacity is not None:
            total = sum(scores.weights[name] * kl.sum(-1).mean() for name, (kl, _) in kls.items())
            return reconstruction - kl_weight * (total - self.at_step(self.capacity)).abs()
        for name, (kl, _) in kls.items():
            if self.free_bits is None:
                kl = kl.sum(-1)
            elif self.free_bits_per == "site":
                kl = kl.sum(-1).mean(0).clamp(min=self.free_bits)
            else:
                kl = kl.mean(0).clamp(min=self.free_bits).sum(-1)
            reconstruction = reconstruction - kl_weight * scores.weights[name] * kl
        return reconstruction

    def _kl(self, name: str, scores: Scores) -> tuple[Tensor, bool]:
        """Return a site's KL, ``[n, dimensions or 1]``, and whether it is a closed form."""
        q, by_dimension = scores.guide_sites[name], self.free_bits is not None
        p = scores.model_sites.get(name)
        by_dimension &= self.free_bits_per == "dimension"
        if p is None:
            return scores.kl(name).mean(0).unsqueeze(-1), False
        if self.analytic_kl and q["mask"] is None and p["mask"] is None:
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


class STL_ELBO(Estimator):
    r"""The ELBO with the gradient that sticks the landing: through the draws alone.

    The guide's parameters are constants in :math:`\log q(z \mid x)`; what is left out has mean zero. At
    the exact posterior the gradient is zero, draw by draw, where that of ``Trace_ELBO`` has a standard
    deviation of about 1.4 per parameter. A guide of several sites, or one that holds networks in its
    distributions (a flow), is run twice.

    References:
        Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194

    Args:
        num_particles: the number of draws per datum.
        kl_weight: multiplies the KL: a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a site of the guide is not reparameterised.
    """

    gradient: Gradient = "path"

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the mean of the log weights, ``[n]``."""
        return scores.log_weights(kl_weight).mean(0)


def factorises(fn: Any) -> bool:
    """Return whether a distribution is one of independent dimensions: ``.to_event(1)``."""
    return isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape


def _closed_form(q: Any, p: Any, *, by_dimension: bool) -> Tensor | None:
    """Return KL(q || p), ``[*particles, n]`` or ``[*particles, n, dimensions]``, or None if not known."""
    if by_dimension:
        if not (factorises(q) and factorises(p)):
            return None
        q, p = q.base_dist, p.base_dist
    elif isinstance(q, (MultivariateNormal, LowRankMultivariateNormal)) and factorises(p):
        if isinstance(p.base_dist, Normal):
            p = MultivariateNormal(p.base_dist.loc, scale_tril=p.base_dist.scale.diag_embed())
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


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
