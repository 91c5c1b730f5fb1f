"""The chi upper bound."""

from typing import Any

from torch import Tensor

from ppl_vae._checks import check_at_least
from ppl_vae.infer.bounds import renyi_bound
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.gradients import (
    two_objectives,
    with_gradient_of,
)
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class CUBO(Estimator):
    r"""The chi upper bound :math:`\frac{1}{n} \log E_q[w^n] \ge \log p(x)`, which the guide minimises.

    The loss is the bound itself. The model can't be trained by an upper bound: its gradient is that of the
    IWAE's bound of the same draws. With K draws the logarithm is biased downwards, so that the value is an
    upper bound for large K only, and a guide that is trained by it learns to make that bias large: train
    the guide by another estimator and look at this one.

    References:
        Variational Inference via chi Upper Bound Minimization (Dieng et al., 2017), arXiv:1611.00328

    Args:
        num_particles: K, the number of draws per datum.
        order: n, above 1.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``order`` is not above 1. On a run, if a site of the guide is not
            reparameterised, the model runs batch norm in training mode.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> CUBO(num_particles=100).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    weighs_draws = True

    def __init__(
        self, num_particles: int = 50, *, order: float = 2.0, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if check_at_least("order", order, 1.0) == 1:
            raise ValueError(f"order: expected a number above 1, got {order!r}")
        self.order = order

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return minus the bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        constant = log_weights.detach()
        surrogate = two_objectives(
            scores, kl_weight, constant.softmax(0), -(self.order * constant).softmax(0)
        )
        return with_gradient_of(-renyi_bound(log_weights, 1 - self.order), surrogate)
