"""The autoregressive likelihood of real sequences."""

from typing import Literal

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.distributions.autoregressive_sequence import AutoregressiveSequence
from ppl_vae.likelihoods.normal import Normal
from ppl_vae.networks.recurrent import AutoregressiveDecoder, check_decoder


class AutoregressiveNormal(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_t N(x_t; f(z, x_{<t}), \mathrm{diag}\, \sigma^2)` of reals.

    References:
        A Recurrent Latent Variable Model for Sequential Data (Chung et al., 2015), arXiv:1506.02216

    Args:
        decoder: ``RecurrentDecoder(latent_dim, data_dim=...)`` or ``TransformerDecoder``, from z and x to
            the means; with ``scale="network"`` it has ``out_features=2 * data_dim``.
        max_length: the number of steps of draws, and the most of data.
        scale: the noise, as in ``Normal``: a number, ``"learned"`` or ``"network"``.

    Raises:
        TypeError: if the decoder is not autoregressive.
        ValueError: if it is not one of reals, or has another number of outputs.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import RecurrentDecoder
        >>> likelihood = AutoregressiveNormal(RecurrentDecoder(2, data_dim=4), max_length=7)
        >>> likelihood(torch.zeros(3, 2)).event_shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        decoder: AutoregressiveDecoder,
        max_length: int,
        scale: float | Literal["learned", "network"] = 1.0,
    ) -> None:
        super().__init__()
        check_decoder(decoder)
        self.noise = Normal(nn.Identity(), scale)
        outputs = (decoder.data_dim or 0) * (2 if scale == "network" else 1)
        if decoder.out_features != outputs or not outputs:
            raise ValueError(
                f"decoder: expected one of reals (`data_dim`) with {outputs} outputs for scale={scale!r}, "
                f"got data_dim {decoder.data_dim} and {decoder.out_features} outputs"
            )
        self.decoder = decoder
        self.max_length = check_positive_int("max_length", max_length)
        self.scale = scale

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``.

        Args:
            z: latents.
            context: the lengths of the sequences, integers ``[n]``; None for ``max_length``.
        """
        reals = constraints.real_vector
        return AutoregressiveSequence(self.decoder, self.noise, z, context, self.max_length, reals)
