"""The thermodynamic variational objective."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_number, check_positive_int
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.gradients import with_score_function
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class TVO(Estimator):
    r"""The thermodynamic variational objective, a left Riemann sum of the integral that is log p(x).

    .. math:: \sum_s (\beta_{s+1} - \beta_s) \, E_{\pi_{\beta_s}}[\log w], \quad \pi_\beta \propto q w^\beta

    with self-normalised weights; its first term is a share of the ELBO, so that one draw of weight zero makes
    the value -inf. With the same draws it lies between the ELBO, which is one partition, and
    the IWAE. The gradient is that of this K-sample objective; sites that are not reparameterised
    have the score function with leave-one-out baselines.

    References:
        The Thermodynamic Variational Objective (Masrani et al., 2019), arXiv:1907.00031

    Args:
        num_particles: K, the number of draws per datum.
        num_partitions: the number of intervals: [0, ``smallest``], then to 1 in equal ratios.
        smallest: the end of the first interval, in (0, 1).
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``smallest`` is not in (0, 1), or ``num_particles`` is 1 and a site is not
            reparameterised.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> TVO(num_particles=20, num_partitions=5).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    score_function = True
    weighs_draws = True

    def __init__(
        self,
        num_particles: int = 50,
        *,
        num_partitions: int = 5,
        smallest: float = 0.1,
        kl_weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.num_partitions = check_positive_int("num_partitions", num_partitions)
        if not 0 < check_number("smallest", smallest) < 1:
            raise ValueError(f"smallest: expected a number in (0, 1), got {smallest!r}")
        self.smallest = smallest

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the sum, ``[n]``."""
        return with_score_function(scores, scores.log_weights(kl_weight), self._bound)

    def _bound(self, log_weights: Tensor) -> Tensor:
        """Return the sum for log weights ``[K, ...]``."""
        inner = torch.logspace(
            math.log10(self.smallest),
            0.0,
            self.num_partitions,
            dtype=log_weights.dtype,
            device=log_weights.device,
        )
        ends = inner if self.num_partitions > 1 else torch.ones_like(inner)
        column = (-1,) + (1,) * log_weights.dim()
        bound = ends[0] * log_weights.mean(0)  # at beta = 0 all draws have the same share
        # draws of weight zero have none at beta > 0
        possible = torch.where(log_weights.isneginf(), 0.0, log_weights)
        logits = ends[:-1].view(column) * log_weights.clamp(min=-1e30)
        terms = (logits.softmax(1) * possible).sum(1)
        return bound + (ends.diff().view(column[:-1]) * terms).sum(0)
