"""The full-rank guide."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions import FullRankNormal
from ppl_vae.guides.amortized import AmortizedGuide


class FullRankGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(z \mid x) = N(z; \mu(x), L(x) L(x)^\top)`, :math:`L` lower triangular.

    :math:`L = \mathrm{diag}(\sigma) (I + A / \sqrt d)`, with :math:`A` strictly lower triangular. A linear
    head on the encoder's features gives :math:`\mu`, :math:`\log \sigma`, which is clamped to [-7, 7], and
    :math:`A`. Unlike entries of :math:`L` themselves, those of :math:`A` have no unit: as :math:`\sigma`
    shrinks in training, correlations stay. The head has :math:`d (d + 3) / 2` outputs; see
    :class:`LowRankGuide` for many dimensions.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114, appendix F
        An Introduction to Variational Autoencoders (Kingma & Welling, 2019), arXiv:1906.02691, section 2.5

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = FullRankGuide(MLP((1, 8, 8)), 3)
        >>> guide.posterior(torch.zeros(5, 1, 8, 8)).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, *, features: int | None = None) -> None:
        d = check_positive_int("latent_dim", latent_dim)
        super().__init__(encoder, latent_dim, 2 * d + d * (d - 1) // 2, features)

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the normal of these outputs: means, log scales and the entries of A row by row."""
        return full_rank(outputs, self.latent_dim)


def full_rank(outputs: Tensor, latent_dim: int) -> dist.TorchDistribution:
    """Return the normal of means, clamped log scales and the entries of A row by row."""
    d = latent_dim
    loc, log_scale, below = outputs.split([d, d, outputs.shape[-1] - 2 * d], -1)
    scale = bounded_scale(log_scale)
    rows, columns = torch.tril_indices(d, d, -1, device=outputs.device)
    factor = torch.diag_embed(torch.ones_like(scale))
    factor[..., rows, columns] = below / math.sqrt(d)
    return FullRankNormal(loc, scale_tril=scale.unsqueeze(-1) * factor)
