"""The variational Renyi bound."""

from typing import Any

from torch import Tensor

from ppl_vae._checks import check_number
from ppl_vae.infer.bounds import renyi_bound
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class Renyi(Estimator):
    r"""The variational Renyi bound :math:`\frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}`.

    ``alpha=0`` is the IWAE's bound, ``alpha=1`` the ELBO, ``alpha=-math.inf`` the largest log weight.
    A lower bound on log p(x) for ``alpha >= 0``; for ``alpha < 0`` neither, with K draws.

    References:
        Renyi Divergence Variational Inference (Li & Turner, 2016), arXiv:1602.02311

    Args:
        num_particles: K, the number of draws per datum.
        alpha: the order, any number, infinite ones too.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``alpha`` is NaN. On a run, if a site of the guide is not reparameterised.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> Renyi(num_particles=10, alpha=0.5).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    def __init__(
        self, num_particles: int = 5, *, alpha: float = 0.5, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.alpha = check_number("alpha", alpha)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the bound, ``[n]``."""
        return renyi_bound(scores.log_weights(kl_weight), self.alpha)
