"""The autoregressive likelihood of tokens."""

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.distributions.autoregressive_sequence import AutoregressiveSequence
from ppl_vae.networks.recurrent import AutoregressiveDecoder, check_decoder


class AutoregressiveCategorical(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_t \mathrm{Categorical}(x_t; f(z, x_{<t}))` of tokens.

    The number of tokens is given, not modelled: to let it be, end each sequence with a token of its own.
    Tokens are whole numbers from 0, in a tensor of any dtype; draws have that of z.

    References:
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349

    Args:
        decoder: ``RecurrentDecoder(latent_dim, vocabulary=...)`` or ``TransformerDecoder``, from z and x to
            the logits.
        max_length: the number of tokens of draws, and the most of data.

    Raises:
        TypeError: if the decoder is not autoregressive.
        ValueError: if it is not one of tokens, with one output for each.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import RecurrentDecoder
        >>> likelihood = AutoregressiveCategorical(RecurrentDecoder(2, vocabulary=10), max_length=7)
        >>> likelihood(torch.zeros(3, 2), torch.tensor([7, 2, 4])).sample().shape
        torch.Size([3, 7])
    """

    def __init__(self, decoder: AutoregressiveDecoder, max_length: int) -> None:
        super().__init__()
        check_decoder(decoder)
        if decoder.vocabulary is None or decoder.out_features != decoder.vocabulary:
            raise ValueError(
                "decoder: expected one of tokens (`vocabulary`) with one output for each, "
                f"got vocabulary {decoder.vocabulary} and {decoder.out_features} outputs"
            )
        self.decoder = decoder
        self.max_length = check_positive_int("max_length", max_length)

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``.

        Args:
            z: latents.
            context: the lengths of the sequences, integers ``[n]``; None for ``max_length``.
        """
        tokens = constraints.integer_interval(0, int(self.decoder.out_features) - 1)
        return AutoregressiveSequence(self.decoder, _categorical, z, context, self.max_length, tokens)


def _categorical(logits: Tensor) -> dist.TorchDistribution:
    return dist.Categorical(logits=logits)
