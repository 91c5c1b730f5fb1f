"""The ELBO with the gradient that sticks the landing."""

from typing import Any

from torch import Tensor

from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.scoring import Gradient, Scores


class STL_ELBO(Estimator):
    r"""The ELBO with the gradient that sticks the landing: through the draws alone.

    The guide's parameters are constants in :math:`\log q(z \mid x)`; what is left out has mean zero. At
    the exact posterior the gradient is zero, draw by draw, where that of ``Trace_ELBO`` has a standard
    deviation of about 1.4 per parameter. A guide of several sites, or one that holds networks in its
    distributions (a flow), is run twice.

    References:
        Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194

    Args:
        num_particles: the number of draws per datum.
        kl_weight: multiplies the KL: a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a site of the guide is not reparameterised.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=100)
        >>> run = fit(model, guide, x, elbo=STL_ELBO(), epochs=1, progress=False)
        >>> len(run.history)
        1
    """

    gradient: Gradient = "path"

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the mean of the log weights, ``[n]``."""
        return scores.log_weights(kl_weight).mean(0)
