"""DIP-VAE."""

from typing import Any, Literal

from torch import Tensor

from ppl_vae._checks import check_at_least, check_choice
from ppl_vae.infer.aggregate import guide_site, marginals
from ppl_vae.infer.divergence import factorises
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.scoring import Scores


class DIP_ELBO(Estimator):
    r"""DIP-VAE: the ELBO and a penalty that draws the aggregate posterior's covariance to the identity.

    .. math:: \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    per datum, where C is the covariance over the batch of the posterior means (``kind="I"``) or that of the
    draws, which adds the mean posterior covariance (``"II"``).

    References:
        Variational Inference of Disentangled Latent Concepts (Kumar et al., 2018), arXiv:1711.00848

    Args:
        off_diagonal: :math:`\lambda_{od}`.
        diagonal: :math:`\lambda_d`; by default ten times (I) or once (II) ``off_diagonal``.
        kind: ``"I"`` or ``"II"``.
        site: the latent site.
        num_particles: the number of draws per datum.

    Raises:
        ValueError: on a run, if there is no such site, it is masked, its distribution in the guide has no
            known mean and covariance, or the batch has less than two data.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=100)
        >>> run = fit(model, guide, x, elbo=DIP_ELBO(10.0), epochs=1, progress=False)
        >>> len(run.history)
        1
    """

    def __init__(
        self,
        off_diagonal: float = 10.0,
        diagonal: float | None = None,
        *,
        kind: Literal["I", "II"] = "I",
        site: str = "z",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        check_choice("kind", kind, ("I", "II"))
        self.off_diagonal = check_at_least("off_diagonal", off_diagonal)
        default = 10 * off_diagonal if kind == "I" else off_diagonal
        self.diagonal = default if diagonal is None else check_at_least("diagonal", diagonal)
        self.kind = kind
        self.site = site

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the log weights' mean minus the penalty, ``[n]``."""
        covariance = self.covariance(scores)
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        penalty = self.off_diagonal * off + self.diagonal * (diagonal - 1).square().sum()
        return scores.log_weights().mean(0) - penalty

    def covariance(self, scores: Scores) -> Tensor:
        """Return the aggregate posterior's covariance, ``[latent, latent]``."""
        fn = guide_site(self.site, scores)["fn"]
        dimensions = marginals(self.site, fn)
        n = fn.batch_shape[-1]
        if n < 2:
            raise ValueError(f"data: expected a batch of at least 2 data for a covariance, got {n}")
        deviation = dimensions.mean - dimensions.mean.mean(-2, keepdim=True)
        covariance = deviation.mT @ deviation / n  # [*K, latent, latent]
        if self.kind == "II":
            within = dimensions.variance.diag_embed() if factorises(fn) else fn.covariance_matrix
            covariance = covariance + within.mean(-3)
        return covariance.reshape(-1, *covariance.shape[-2:]).mean(0)
