"""The importance-weighted bound with the score function."""

from typing import Any

from torch import Tensor

from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.gradients import with_score_function
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class VIMCO(Estimator):
    """The importance-weighted bound with the score function and leave-one-out baselines.

    The baseline of a draw is the bound with its log weight replaced by the mean of the others'.
    Reparameterised sites have the reparameterised gradient.

    References:
        Variational inference for Monte Carlo objectives (Mnih & Rezende, 2016), arXiv:1602.06725

    Args:
        num_particles: K, the number of draws per datum, at least 2 for a discrete latent.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a site needs a baseline and K is 1.

    Example:
        >>> from ppl_vae.guides import GaussianMixtureGuide
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.models import GaussianMixtureVAE
        >>> from ppl_vae.networks import MLP
        >>> model = GaussianMixtureVAE(3, 2, Bernoulli(MLP(2, 8)))
        >>> guide = GaussianMixtureGuide(MLP(8), 2, components=3)
        >>> VIMCO(num_particles=8).loss(model, guide, model(None, size=4)).shape
        torch.Size([])
    """

    score_function = True
    weighs_draws = True

    def __init__(self, num_particles: int = 5, *, kl_weight: float | Schedule = 1.0) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the logarithm of the mean weight, ``[n]``."""
        return with_score_function(scores, scores.log_weights(kl_weight), log_mean_exp)
