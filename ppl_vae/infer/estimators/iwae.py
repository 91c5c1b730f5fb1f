"""The importance-weighted bound."""

from typing import Any

from torch import Tensor

from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class IWAE(Estimator):
    r"""The importance-weighted bound :math:`\log \frac{1}{K} \sum_k w_k`.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519; sticking the landing for
        it: Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194

    Args:
        num_particles: K, the number of draws per datum.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.
        stick_the_landing: let the guide's gradient go through the draws alone. For K > 1 the gradient
            is then biased (Tucker et al., 2019, arXiv:1810.04152); ``DReG`` isn't.

    Raises:
        ValueError: on a run, if a site of the guide is not reparameterised; ``VIMCO`` takes any.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> IWAE(num_particles=50).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 5,
        *,
        kl_weight: float | Schedule = 1.0,
        stick_the_landing: bool = False,
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.stick_the_landing = stick_the_landing
        self.gradient = "path" if stick_the_landing else "full"

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the logarithm of the mean weight, ``[n]``."""
        return log_mean_exp(scores.log_weights(kl_weight))
