"""The Poisson likelihood for counts."""

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae.likelihoods._decoder import LOG_MEAN, decode, event_dims, init_log_bias


class Poisson(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j \mathrm{Poisson}(x_j; e^{f_j(z)})` of counts.

    Args:
        decoder: network from ``[*batch, latent]`` to the log of the mean, ``[*batch, *event]``, which is
            clamped to [-15, 15].

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> Poisson(MLP(2, 6))(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 6])
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        log_mean = decode(self.decoder, z, context)
        rate = log_mean.clamp(-LOG_MEAN, LOG_MEAN).exp()
        return dist.Poisson(rate).to_event(event_dims(log_mean, z))

    def init_bias(self, x: Tensor) -> None:
        """Start the decoder's output bias at the log of the data mean, clipped from 0.001.

        Args:
            x: the training data, ``[n, *event]``, counts.

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        init_log_bias(self.decoder, x)
