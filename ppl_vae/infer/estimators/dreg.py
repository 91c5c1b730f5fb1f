"""The Renyi bound with the doubly reparameterised gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_number
from ppl_vae.infer.bounds import renyi_bound
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.gradients import (
    scale_gradients,
    weighted_sum,
    with_gradient_of,
)
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Gradient, Scores


class DReG(Estimator):
    r"""The Renyi bound, the IWAE's by default, with the doubly reparameterised gradient of the guide.

    Unbiased, as the plain gradient is, but its signal-to-noise ratio doesn't fall with K. A guide of several
    sites, or one that holds networks in its distributions (a flow), is run twice.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker et al., 2019),
        arXiv:1810.04152

    Args:
        num_particles: K, the number of draws per datum.
        alpha: the order of the Renyi bound; 0 is the IWAE's, 1 is ``STL_ELBO``.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``alpha`` is not finite. On a run, if a site of the guide is not
            reparameterised, the model runs batch norm in training mode, or the programs weigh sites
            differently.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=100)
        >>> run = fit(model, guide, x, elbo=DReG(16), epochs=1, progress=False)
        >>> len(run.history)
        1
    """

    gradient: Gradient = "path"
    weighs_draws = True

    def __init__(
        self, num_particles: int = 5, *, alpha: float = 0.0, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.alpha = check_number("alpha", alpha)
        if math.isinf(self.alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha!r}")

    def check(self, scores: Scores) -> None:
        """Raise if a site is weighted apart from the others: the identity behind the gradient fails."""
        super().check(scores)
        weights = list(scores.weights.values())
        for name, weight in scores.weights.items():
            if not torch.equal(torch.as_tensor(weight), torch.as_tensor(weights[0])):
                raise ValueError(
                    f"site {name!r}: expected one KL weight for all sites, got {weight} beside {weights[0]}; "
                    "use IWAE or Renyi"
                )

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        order = 1 - self.alpha
        shares = (order * log_weights.detach()).softmax(0)
        own = next(iter(scores.weights.values()), 1.0)
        scale_gradients(scores, 1 - order * kl_weight * own * (1 - shares))
        return with_gradient_of(renyi_bound(log_weights, self.alpha), weighted_sum(shares, log_weights))
