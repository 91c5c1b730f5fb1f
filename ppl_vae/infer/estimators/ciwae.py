"""A combination of the ELBO and the importance-weighted bound."""

from typing import Any

from torch import Tensor

from ppl_vae._checks import check_at_least
from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class CIWAE(Estimator):
    r"""The combination :math:`\beta \, \mathrm{ELBO} + (1 - \beta) \, \mathrm{IWAE}`.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum.
        beta: the ELBO's share, in [0, 1].
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``beta`` is not in [0, 1]. On a run, if a site of the guide is not reparameterised.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> CIWAE(num_particles=16, beta=0.2).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    def __init__(
        self, num_particles: int = 5, *, beta: float = 0.5, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if not 0 <= check_at_least("beta", beta) <= 1:
            raise ValueError(f"beta: expected a share in [0, 1], got {beta!r}")
        self.beta = beta

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the combination, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        return self.beta * log_weights.mean(0) + (1 - self.beta) * log_mean_exp(log_weights)
