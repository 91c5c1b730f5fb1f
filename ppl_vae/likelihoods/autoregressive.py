"""The autoregressive likelihood of images."""

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.distributions.autoregressive_pixels import AutoregressivePixels
from ppl_vae.likelihoods._decoder import check_levels, decode, event_dims, out_shape
from ppl_vae.networks.masked_conv import GatedPixelCNN


class Autoregressive(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j p(x_j \mid x_{<j}, z)` of images, by a gated PixelCNN.

    The decoder gives a feature map, which enters each layer of the PixelCNN. Values are ordered row by row,
    the channels of a pixel one after another. A log-likelihood is one pass; a draw takes a pass over part of
    a row for each value, so that ``CompiledSVI`` should not trace one (``WakeSleep`` does draw).

    A strong PixelCNN needs no z: few layers and a small kernel leave the structure at large to z. The mean of
    ``p(x | z)`` has no closed form; ``mean`` is an unbiased estimate from ``mean_draws`` draws, which
    ``reconstruct``, ``sample`` and their plots show.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016), arXiv:1606.05328
        PixelVAE: A Latent Variable Model for Natural Images (Gulrajani et al., 2017), arXiv:1611.05013

    Args:
        decoder: network from ``[*batch, latent]`` to a feature map ``[*batch, features, H, W]``.
        channels: channels of the images, whose event shape is ``[channels, H, W]``.
        levels: 2 for bits; otherwise values are the levels k / (levels - 1) in [0, 1], as in ``Categorical``.
        hidden: channels of the hidden layers.
        layers: the number of gated layers.
        kernel_size: side of the kernels, odd, from 3.
        mean_draws: the number of draws for the mean.
        features: the decoder's number of features; by default the first of ``decoder.out_shape``.

    Raises:
        TypeError: if ``features`` is None and the decoder has no ``out_shape``.
        TypeError, ValueError: if a number is no whole number above 0, ``levels`` is below 2, or
            ``kernel_size`` is even or below 3.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> likelihood = Autoregressive(MLP(2, (4, 8, 8)), hidden=8, layers=2)
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(
        self,
        decoder: nn.Module,
        channels: int = 1,
        levels: int = 2,
        *,
        hidden: int = 32,
        layers: int = 2,
        kernel_size: int = 5,
        mean_draws: int = 1,
        features: int | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.channels = check_positive_int("channels", channels)
        self.levels = check_levels(levels)
        self.hidden = check_positive_int("hidden", hidden)
        self.layers = check_positive_int("layers", layers)
        self.kernel_size = check_positive_int("kernel_size", kernel_size)
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number from 3, got {kernel_size}")
        self.mean_draws = check_positive_int("mean_draws", mean_draws)
        self.features = features
        width = out_shape(decoder, "features")[0] if features is None else features
        self.network = GatedPixelCNN(
            self.channels,
            1 if self.levels == 2 else self.levels,
            check_positive_int("features", width),
            self.hidden,
            self.layers,
            self.kernel_size,
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        features = decode(self.decoder, z, context)
        if event_dims(features, z) != 3:
            raise ValueError(
                "decoder: expected a feature map [features, H, W] as the output, "
                f"got shape {list(features.shape[z.dim() - 1 :])}"
            )
        return AutoregressivePixels(self.network, features, self.channels, self.levels, self.mean_draws)
