"""A normal with a low-rank plus diagonal covariance."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor


class LowRankNormal(dist.LowRankMultivariateNormal):
    r"""``LowRankMultivariateNormal`` whose density keeps its digits in float32.

    Torch's subtracts two terms that are nearly equal where the diagonal :math:`D` is small beside
    :math:`W W^\top`. The Mahalanobis distance is also the least value of :math:`|D^{-1/2} (z - \mu - W
    w)|^2 + |w|^2`, a sum of squares.

    Args:
        loc: ``[*batch, latent]``.
        cov_factor: :math:`W`, ``[*batch, latent, rank]``.
        cov_diag: :math:`D`, ``[*batch, latent]``.

    Example:
        >>> normal = LowRankNormal(torch.zeros(3), torch.ones(3, 1), torch.full((3,), 0.5))
        >>> normal.covariance_matrix
        tensor([[1.5000, 1.0000, 1.0000],
                [1.0000, 1.5000, 1.0000],
                [1.0000, 1.0000, 1.5000]])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, ``[*batch]``."""
        if self._validate_args:
            self._validate_sample(value)
        scale = self._unbroadcasted_cov_diag.sqrt()
        factor = self._unbroadcasted_cov_factor / scale.unsqueeze(-1)
        y = ((value - self.loc) / scale).unsqueeze(-1)
        w = torch.cholesky_solve(factor.mT @ y, self._capacitance_tril)
        distance = (y - factor @ w).square().sum((-2, -1)) + w.square().sum((-2, -1))
        log_det = scale.log().sum(-1) + self._capacitance_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (distance + self.event_shape[0] * math.log(2 * math.pi)) - log_det
