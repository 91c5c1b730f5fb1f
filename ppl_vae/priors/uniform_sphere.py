"""The uniform prior on a sphere."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.distributions import HypersphericalUniform
from ppl_vae.distributions.hyperspherical_uniform import check_sphere


class UniformSphere(nn.Module):
    r"""The prior that is uniform on the unit sphere :math:`S^{d-1}`.

    Its guide is ``HypersphericalGuide``.

    References:
        Hyperspherical Variational Auto-Encoders (Davidson et al., 2018), arXiv:1804.00891

    Args:
        latent_dim: d, the length of the unit vectors, at least 2.

    Raises:
        TypeError, ValueError: if ``latent_dim`` is not a whole number above 1.

    Example:
        >>> UniformSphere(3)().event_shape
        torch.Size([3])
    """

    zero: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_sphere("latent_dim", latent_dim)
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]`` and event shape ``[latent]``.

        Args:
            context: what the model is conditioned on, if anything; the prior is independent of it.
        """
        return HypersphericalUniform(self.latent_dim, dtype=self.zero.dtype, device=self.zero.device)
