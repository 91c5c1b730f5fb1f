"""The guide on a sphere."""

import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae.distributions import VonMisesFisher
from ppl_vae.distributions.hyperspherical_uniform import check_sphere
from ppl_vae.guides.amortized import AmortizedGuide

CONCENTRATION = 1e4  # the concentration is clamped to this


class HypersphericalGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(z \mid x) = \mathrm{vMF}(z; \mu(x), \kappa(x))` on a unit sphere.

    A linear head on the encoder's features gives a vector, which is divided by its length, and a number
    :math:`a`; the concentration is :math:`1 + \mathrm{softplus}(a)`, clamped to 1e4. Its prior is
    ``UniformSphere``, or another one on the sphere.

    References:
        Hyperspherical Variational Auto-Encoders (Davidson et al., 2018), arXiv:1804.00891

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        latent_dim: d, the length of the unit vectors z, at least 2.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if ``latent_dim`` is not a whole number above 1, or ``features`` above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = HypersphericalGuide(MLP((1, 8, 8)), 3)
        >>> guide.posterior(torch.zeros(5, 1, 8, 8)).sample().norm(dim=-1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, *, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, check_sphere("latent_dim", latent_dim) + 1, features)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x): batch shape ``[n]``, event shape ``[latent]``, for ``x`` of ``[n, *event]``."""
        outputs = self.encode(x, y)
        loc = F.normalize(outputs[..., :-1], dim=-1)
        return VonMisesFisher(loc, (1 + F.softplus(outputs[..., -1])).clamp(max=CONCENTRATION))
