"""The ELBO with its KL divergence under control."""

import logging
from typing import Any, Literal

from torch import Tensor

from ppl_vae._checks import check_at_least, check_choice
from ppl_vae.infer.divergence import site_kl
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores, is_zero

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
        if self.free_bits is not None and (auxiliary := sorted(scores.guide.keys() - scores.prior.keys())):
            raise ValueError(
                f"free_bits: expected latent sites of model and guide, whose KL is not below 0, got the "
                f"auxiliary sites {auxiliary} of the guide"
            )
        by_dimension = self.free_bits is not None and self.free_bits_per == "dimension"
        kls = {
            name: site_kl(name, scores, closed_form=self.analytic_kl, by_dimension=by_dimension)
            for name in scores.guide
        }
        if kls.keys() and self.analytic != (found := {name: known for name, (_, known) in kls.items()}):
            self.analytic = found
            for name, known in found.items():
                logger.info("KL of site %r: %s", name, "closed form" if known else "estimated from draws")
        reconstruction = scores.reconstruction.mean(0)
        if is_zero(kl_weight):  # whatever the KL is
            return reconstruction
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
