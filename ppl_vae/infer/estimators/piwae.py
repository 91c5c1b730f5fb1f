"""One importance-weighted bound for the model, several for the guide."""

from typing import Any

from torch import Tensor

from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.estimators.miwae import check_groups
from ppl_vae.infer.gradients import (
    two_objectives,
    with_gradient_of,
)
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class PIWAE(Estimator):
    """The model trained by the IWAE of all K draws, the guide by the MIWAE of M groups of them.

    Its value is the IWAE's bound. The ends of ``num_groups`` are those of ``MIWAE``, for the guide alone.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum, all groups together.
        num_groups: M, which divides K.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if M does not divide K. On a run, if a site of the guide is not
            reparameterised, the model runs batch norm in training mode.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=100)
        >>> run = fit(model, guide, x, elbo=PIWAE(16, num_groups=4), epochs=1, progress=False)
        >>> len(run.history)
        1
    """

    weighs_draws = True

    def __init__(
        self, num_particles: int = 16, *, num_groups: int = 4, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.num_groups = check_groups(num_groups, num_particles)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the IWAE's bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        constant = log_weights.detach()
        groups = constant.unflatten(0, (self.num_groups, -1))
        in_groups = groups.softmax(1).flatten(0, 1) / self.num_groups
        surrogate = two_objectives(scores, kl_weight, constant.softmax(0), in_groups)
        return with_gradient_of(log_mean_exp(log_weights), surrogate)
