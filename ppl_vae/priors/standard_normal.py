"""The standard normal prior."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int


class StandardNormal(nn.Module):
    r"""The prior :math:`p(z) = N(z; 0, I)`.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

    Args:
        latent_dim: the number of latent dimensions.

    Raises:
        TypeError, ValueError: if ``latent_dim`` is not a whole number above 0.

    Example:
        >>> StandardNormal(2)().event_shape
        torch.Size([2])
    """

    loc: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]`` and event shape ``[latent]``.

        Args:
            context: what the model is conditioned on, if anything; the prior is independent of it.
        """
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)
