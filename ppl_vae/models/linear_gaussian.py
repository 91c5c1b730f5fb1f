"""The linear-Gaussian model, whose posterior and evidence are exact."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive, check_positive_int
from ppl_vae.program import Program, batch_size


class LinearGaussian(Program):
    r"""Probabilistic PCA: :math:`z \sim N(0, I)`, :math:`x \mid z \sim N(W z + b, \sigma^2 I)`.

    Its evidence :math:`N(x; b, W W^\top + \sigma^2 I)` and its posterior
    :math:`N(z; M^{-1} W^\top (x - b), \sigma^2 M^{-1})`, with :math:`M = W^\top W + \sigma^2 I`, are
    exact: the truth that estimators, guides and evaluations are tested against.

    References:
        Probabilistic Principal Component Analysis (Tipping & Bishop, 1999)

    Args:
        latent_dim: the number of latent dimensions.
        data_dim: the number of data dimensions.
        scale: the start of the noise :math:`\sigma`.

    Attributes:
        weight: :math:`W`, ``[data, latent]``, started at draws from N(0, 1 / latent).
        bias: :math:`b`, ``[data]``, started at 0.
        log_scale: :math:`\log \sigma`, ``[]``.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``scale`` not above 0.

    Example:
        >>> model = LinearGaussian(2, 5)
        >>> x = model(None, size=3)
        >>> model.log_prob(x).shape, model.posterior(x).mean.shape
        (torch.Size([3]), torch.Size([3, 2]))
    """

    def __init__(self, latent_dim: int, data_dim: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.data_dim = check_positive_int("data_dim", data_dim)
        self.scale = check_positive("scale", scale)
        self.weight = nn.Parameter(torch.randn(data_dim, latent_dim) / math.sqrt(latent_dim))
        self.bias = nn.Parameter(torch.zeros(data_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``z`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, data]``, or None to draw from the prior.
            size: the number of data to draw when ``x`` is None.

        Returns:
            x, given or drawn, ``[*particles, n, data]``.

        Raises:
            ValueError: if ``x`` and ``size`` are both None.
        """
        with pyro.plate("data", batch_size(x, size), dim=-1):
            loc = self.bias.new_zeros(self.latent_dim)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            mean = z @ self.weight.mT + self.bias
            return pyro.sample("x", dist.Normal(mean, self.log_scale.exp()).to_event(1), obs=x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log p(x), nats per datum, ``[*batch]`` for ``x`` of ``[*batch, data]``."""
        variance = (2 * self.log_scale).exp().expand(self.data_dim)
        return dist.LowRankMultivariateNormal(self.bias, self.weight, variance).log_prob(x)

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """Return the exact p(z | x): batch shape ``[*batch]``, event shape ``[latent]``."""
        variance = (2 * self.log_scale).exp()
        identity = torch.eye(self.latent_dim, dtype=x.dtype, device=x.device)
        precision = self.weight.mT @ self.weight / variance + identity
        loc = (x - self.bias) @ torch.linalg.solve(precision, self.weight.mT / variance).mT
        return dist.MultivariateNormal(loc, precision_matrix=precision)
