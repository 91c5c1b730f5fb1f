"""A normal distribution with a Cholesky factor that scores its own draws by their noise."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class FullRankNormal(dist.MultivariateNormal):
    """``MultivariateNormal`` of a location and a Cholesky factor, whose last draw is scored as it was made.

    Solving for the noise of a draw loses all digits in float32 where the factor's inverse is large, as in
    many dimensions of strong correlation; other values are scored so.

    Args:
        loc: ``[*batch, latent]``.
        scale_tril: lower-triangular factor of the covariance, ``[*batch, latent, latent]``.

    Example:
        >>> import torch
        >>> normal = FullRankNormal(torch.zeros(2), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
        >>> normal.log_prob(normal.rsample((3,))).shape
        torch.Size([3])
    """

    _drawn: Tensor | None = None
    _noise: Tensor | None = None

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch, latent]``."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        z = self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        self._drawn, self._noise = z, noise
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, ``[*batch]``."""
        own = value is self._drawn and not (torch.is_grad_enabled() and not value.requires_grad)
        if not own or self._noise is None:
            return super().log_prob(value)
        log_det = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (self._noise.square() + math.log(2 * math.pi)).sum(-1) - log_det
