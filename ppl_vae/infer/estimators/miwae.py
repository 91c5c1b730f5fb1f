"""The mean of several importance-weighted bounds."""

from typing import Any

from torch import Tensor

from ppl_vae._checks import check_positive_int
from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class MIWAE(Estimator):
    r"""The mean of M importance-weighted bounds, each of K / M draws.

    ``num_groups=1`` is the IWAE of all K draws, ``num_groups=num_particles`` the ELBO.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum, all groups together.
        num_groups: M, which divides K.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if M does not divide K. On a run, if a site of the guide is not reparameterised.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> MIWAE(num_particles=16, num_groups=4).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    def __init__(
        self, num_particles: int = 16, *, num_groups: int = 4, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.num_groups = check_groups(num_groups, num_particles)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the mean of the groups' bounds, ``[n]``."""
        groups = scores.log_weights(kl_weight).unflatten(0, (self.num_groups, -1))
        return log_mean_exp(groups, 1).mean(0)


def check_groups(num_groups: int, num_particles: int) -> int:
    """Return M, or raise if it does not divide K."""
    if num_particles % check_positive_int("num_groups", num_groups):
        raise ValueError(f"num_groups: expected a divisor of num_particles={num_particles}, got {num_groups}")
    return num_groups
