"""Transformers over sequences."""

import math

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.networks._layers import check_options
from ppl_vae.networks.recurrent import AutoregressiveDecoder, SequenceInput, fill_padding


class TransformerEncoder(nn.Module):
    """Transformer from sequences to features; padding has no effect.

    The features are the output at a learned vector put before each sequence. Called with ``x`` alone or
    with ``x`` and ``lengths``, as ``RecurrentEncoder`` is. Layer normalisation comes first in each layer,
    positions are sines and cosines.

    References:
        Attention Is All You Need (Vaswani et al., 2017), arXiv:1706.03762
        BERT (Devlin et al., 2019), arXiv:1810.04805
        On Layer Normalization in the Transformer Architecture (Xiong et al., 2020), arXiv:2002.04745

    Args:
        vocabulary: the number of tokens; x is ``[*batch, T]``, whole numbers of any dtype from 0.
        data_dim: the number of reals per step, instead; x is ``[*batch, T, data_dim]``.
        width: the size of the vector of each step, a multiple of ``heads``.
        heads: the number of attention heads.
        layers: the number of layers.
        feedforward: the width of each layer's hidden layer; by default four times ``width``.
        dropout: probability that a unit is dropped in training, in [0, 1).
        every_step: give features of each step, ``[*batch, T, features]``, zero in the padding.

    Attributes:
        out_features: the number of features, ``width``.

    Raises:
        TypeError, ValueError: if an argument is not of these, or not exactly one of vocabulary and data_dim
            is given.

    Example:
        >>> encoder = TransformerEncoder(vocabulary=10, width=16)
        >>> encoder(torch.zeros(3, 7), torch.tensor([7, 2, 4])).shape, encoder.out_features
        (torch.Size([3, 16]), 16)
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        data_dim: int | None = None,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        feedforward: int | None = None,
        dropout: float = 0.0,
        every_step: bool = False,
    ) -> None:
        super().__init__()
        self.network = _make_network(width, heads, layers, feedforward, dropout)
        self.vocabulary = vocabulary
        self.data_dim = data_dim
        self.width = self.out_features = width
        self.heads = heads
        self.layers = layers
        self.feedforward = feedforward
        self.dropout = dropout
        self.every_step = every_step
        self.inputs = SequenceInput(vocabulary, data_dim, width)
        self.first = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map sequences ``[*batch, T]`` or ``[*batch, T, data_dim]`` to ``[*batch, features]``.

        Args:
            x: the sequences.
            lengths: the number of steps of each that are data, integers ``[*batch]``; None for all.
        """
        steps, mask, batch = self.inputs.flat(x, lengths)
        steps = torch.cat([self.first.expand((len(steps), 1, self.width)), steps], 1)
        steps = steps + _positions(steps)
        hidden = None
        if mask is not None:
            hidden = torch.cat([torch.zeros_like(mask[:, :1]), ~mask], 1)
        features: Tensor = self.network(steps, src_key_padding_mask=hidden)
        features = features[:, 1:] if self.every_step else features[:, 0]
        if self.every_step and mask is not None:
            features = fill_padding(features, mask, 1)
        return features.reshape((*batch, *features.shape[1:]))


class TransformerDecoder(AutoregressiveDecoder):
    """Causal transformer from z and the steps so far to the outputs of the next step.

    A linear map of z is added to each step's vector. Word dropout as in ``RecurrentDecoder``.

    References:
        Attention Is All You Need (Vaswani et al., 2017), arXiv:1706.03762
        Optimus: Organizing Sentences via Pre-trained Modeling of a Latent Space (Li et al., 2020),
        arXiv:2004.04092
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349 (word dropout)

    Args:
        latent_dim: the number of latent dimensions.
        vocabulary: the number of tokens; sequences are ``[*batch, T]``, whole numbers of any dtype from 0.
        data_dim: the number of reals per step, instead; sequences are ``[*batch, T, data_dim]``.
        width: the size of the vector of each step, a multiple of ``heads``.
        heads: the number of attention heads.
        layers: the number of layers.
        feedforward: the width of each layer's hidden layer; by default four times ``width``.
        dropout: probability that a unit is dropped in training, in [0, 1).
        out_features: the number of outputs per step; by default one per token or real.
        word_dropout: probability that a step before is replaced by a learned vector, in training, in [0, 1).

    Raises:
        TypeError, ValueError: if an argument is not of these, or not exactly one of vocabulary and data_dim
            is given.

    Example:
        >>> decoder = TransformerDecoder(2, vocabulary=10, width=16)
        >>> decoder(torch.zeros(5, 3, 2), torch.zeros(3, 7)).shape
        torch.Size([5, 3, 7, 10])
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        vocabulary: int | None = None,
        data_dim: int | None = None,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        feedforward: int | None = None,
        dropout: float = 0.0,
        out_features: int | None = None,
        word_dropout: float = 0.0,
    ) -> None:
        check_positive_int("width", width)
        super().__init__(latent_dim, vocabulary, data_dim, width, out_features, word_dropout)
        self.width = width
        self.heads = heads
        self.layers = layers
        self.feedforward = feedforward
        self.dropout = dropout
        self.network = _make_network(width, heads, layers, feedforward, dropout)
        self.from_z = nn.Linear(latent_dim, width)
        self.head = nn.Linear(width, self.out_features)

    def decode(self, z: Tensor, steps: Tensor) -> Tensor:
        """Map z and the vectors of what came before each step to the outputs, causally."""
        batch, size = z.shape[:-1], steps.shape[-2]
        steps = steps + self.from_z(z).unsqueeze(-2) + _positions(steps)
        later = torch.ones(size, size, dtype=torch.bool, device=z.device).triu(1)
        flat = steps.reshape((math.prod(batch), size, self.width))
        outputs: Tensor = self.head(self.network(flat, mask=later, is_causal=True))
        return outputs.reshape((*batch, size, self.out_features))


def _make_network(
    width: int, heads: int, layers: int, feedforward: int | None, dropout: float
) -> nn.TransformerEncoder:
    check_options("relu", None, dropout, None)
    if check_positive_int("width", width) % check_positive_int("heads", heads):
        raise ValueError(f"width: expected a multiple of the {heads} heads, got {width}")
    inner = 4 * width if feedforward is None else check_positive_int("feedforward", feedforward)
    layer = nn.TransformerEncoderLayer(
        width, heads, inner, dropout, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(
        layer, check_positive_int("layers", layers), norm=nn.LayerNorm(width), enable_nested_tensor=False
    )


def _positions(steps: Tensor) -> Tensor:
    """Return sines and cosines of the positions, ``[T, width]``, for ``steps`` ``[*batch, T, width]``."""
    size, width = steps.shape[-2:]
    half = (width + 1) // 2
    rates = torch.exp(-math.log(1e4) / half * torch.arange(half, dtype=steps.dtype, device=steps.device))
    angles = torch.arange(size, dtype=steps.dtype, device=steps.device).unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], -1)[:, :width]
