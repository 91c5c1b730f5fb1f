"""The mean-field guide."""

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.guides.amortized import AmortizedGuide


class MeanFieldGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(z \mid x) = N(z; \mu(x), \mathrm{diag}\, \sigma^2(x))`.

    A linear head on the encoder's features gives :math:`\mu` and :math:`\log \sigma`; the latter
    is clamped to [-7, 7].

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

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
        >>> guide = MeanFieldGuide(MLP((1, 8, 8)), 2)
        >>> guide.posterior(torch.zeros(5, 1, 8, 8)).mean.shape
        torch.Size([5, 2])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, *, features: int | None = None) -> None:
        super().__init__(encoder, latent_dim, 2 * check_positive_int("latent_dim", latent_dim), features)

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the normal whose mean and log standard deviation are the outputs ``[n, 2 * latent]``."""
        return mean_field(outputs)


def mean_field(outputs: Tensor) -> dist.TorchDistribution:
    """Return the normal of independent dimensions with these means and, clamped, log standard deviations."""
    loc, log_scale = outputs.chunk(2, -1)
    return dist.Normal(loc, bounded_scale(log_scale)).to_event(1)
