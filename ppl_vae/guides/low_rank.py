"""The low-rank guide."""

import math

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions.low_rank_normal import LowRankNormal
from ppl_vae.guides.amortized import AmortizedGuide


class LowRankGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(z \mid x) = N(z; \mu(x), D(x) + W(x) W(x)^\top)`, :math:`D` diagonal.

    :math:`D = \mathrm{diag}(\sigma^2)`, and :math:`W = \mathrm{diag}(\sigma) V / \sqrt r` has :math:`r`
    columns. A linear head on the encoder's features gives :math:`\mu`, :math:`\log \sigma`, which is clamped
    to [-7, 7], and :math:`V`. A draw and its density cost :math:`O(d r^2)` instead of the :math:`O(d^2)` of
    :class:`FullRankGuide`, and the head has :math:`d (r + 2)` outputs.

    References:
        Gaussian Variational Approximation with a Factor Covariance Structure (Ong, Nott & Smith, 2018),
        arXiv:1701.03208

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        rank: the number of columns of :math:`W`, at most ``latent_dim``.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``rank`` is above ``latent_dim``.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = LowRankGuide(MLP((1, 8, 8)), 30, rank=2)
        >>> guide.posterior(torch.zeros(5, 1, 8, 8)).cov_factor.shape
        torch.Size([5, 30, 2])
    """

    def __init__(
        self, encoder: nn.Module, latent_dim: int, rank: int, *, features: int | None = None
    ) -> None:
        d, r = check_positive_int("latent_dim", latent_dim), check_positive_int("rank", rank)
        if r > d:
            raise ValueError(f"rank: expected at most latent_dim, {d}, got {r}")
        super().__init__(encoder, latent_dim, d * (2 + r), features)
        self.rank = r

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the normal of these outputs: means, log scales and V row by row."""
        d, r = self.latent_dim, self.rank
        loc, log_scale, factor = outputs.split([d, d, d * r], -1)
        scale = bounded_scale(log_scale)
        columns = scale.unsqueeze(-1) * factor.unflatten(-1, (d, r)) / math.sqrt(r)
        return LowRankNormal(loc, columns, scale.square())
