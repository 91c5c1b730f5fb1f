"""Convolutional encoder and decoder for images of any size."""

import math
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int, check_sizes
from ppl_vae.networks._layers import (
    JointLinear,
    batch_shape,
    check_options,
    encode_context,
    finish,
    initialize,
    refuse_context,
)


class ConvEncoder(nn.Module):
    """Convolutional features of an image, ``[*batch, C, H, W] -> [*batch, hidden]`` for any batch shape.

    Each of ``channels`` is a 3x3 convolution with stride 2, which halves H and W (rounded up); a linear
    layer follows. Every layer ends with normalisation, activation and dropout (of single units).

    Batch normalisation takes its moments over all batch dims together, particles included; in train mode
    the output for a datum then depends on the rest of its batch. Layer normalisation does not mix data; on
    images it is ``GroupNorm(1, C)``: moments over channels and pixels, scale and shift per channel.

    Args:
        in_shape: shape (C, H, W) of an image.
        hidden: number of features.
        channels: output channels of the convolutions.
        activation: "relu", "elu", "gelu", "silu", "tanh", "softplus" or "leaky_relu".
        normalization: None, "batch" or "layer".
        dropout: probability that a unit is dropped, in [0, 1).
        init: None (PyTorch's default), "xavier" or "he" (biases zero).
        context: None, or the size of a context that is appended to the image as constant channels: the number
            of classes of integer labels, which are one-hot encoded, or of other tensors' numbers per datum.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a value that is not allowed, ``x`` has another event shape, or a
            context is missing, unexpected, of another size or out of range.

    References:
        Group normalization (Wu and He, 2018), arXiv:1803.08494.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder((1, 28, 28), hidden=64, channels=(8, 16))
        >>> encoder(torch.zeros(5, 3, 1, 28, 28)).shape, encoder.out_features
        (torch.Size([5, 3, 64]), 64)
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        hidden: int = 256,
        channels: int | Sequence[int] = (32, 64),
        *,
        activation: str = "tanh",
        normalization: str | None = None,
        dropout: float = 0.0,
        init: str | None = "xavier",
        context: int | None = None,
    ) -> None:
        super().__init__()
        self._event = _check_image("in_shape", in_shape)
        more = 0 if context is None else check_positive_int("context", context)
        widths = (self._event[0] + more, *_check_channels(channels))
        self.out_features = check_positive_int("hidden", hidden)
        check_options(activation, normalization, dropout, init)
        self.in_shape = in_shape
        self.hidden = hidden
        self.channels = channels
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        self.init = init
        self.context = context

        bias = normalization != "batch"  # batch normalisation subtracts the mean: no bias before it
        layers: list[nn.Module] = []
        for width_in, width in pairwise(widths):
            layers.append(nn.Conv2d(width_in, width, 3, stride=2, padding=1, bias=bias))
            layers += finish(width, activation, normalization, dropout, image=True)
        height, width = _sizes(self._event, len(widths) - 1)[-1]
        layers += [nn.Flatten(), nn.Linear(widths[-1] * height * width, self.out_features, bias=bias)]
        layers += finish(self.out_features, activation, normalization, dropout)
        self.layers = nn.Sequential(*layers)
        initialize(self, init)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``[*batch, C, H, W]`` to ``[*batch, hidden]``.

        Args:
            x: the images.
            context: labels ``[*batch]`` or other tensors ``[n, *shape]``, if the network was made for them;
                batch shapes broadcast.
        """
        batch, event = batch_shape(x, self._event), self._event
        if self.context is None:
            refuse_context(context)
        else:
            joint = encode_context(context, self.context, batch, x)
            batch = torch.broadcast_shapes(batch, joint.shape[:-1])
            channels = joint[..., None, None].expand((*batch, self.context, *event[1:]))
            x = torch.cat([x.expand((*batch, *event)), channels], -3)
            event = (event[0] + self.context, *event[1:])
        y: Tensor = self.layers(x.reshape((math.prod(batch), *event)))
        return y.reshape((*batch, self.out_features))


class ConvDecoder(nn.Module):
    """Image from a vector, ``[*batch, *in_shape] -> [*batch, C, H, W]`` for any batch shape.

    The mirror of `ConvEncoder`: two linear layers (to ``hidden``, then to the smallest image), then one 3x3
    transposed convolution with stride 2 for each of ``channels``, the last of which gives the C channels of
    the image. Any H and W can be reached. Each layer but the last ends with normalisation, activation and
    dropout, as in `ConvEncoder`; the output is linear.

    Args:
        in_shape: event shape of the input, a size or several.
        out_shape: shape (C, H, W) of an image.
        hidden: width of the first linear layer.
        channels: input channels of the transposed convolutions.
        activation: "relu", "elu", "gelu", "silu", "tanh", "softplus" or "leaky_relu".
        normalization: None, "batch" or "layer".
        dropout: probability that a unit is dropped, in [0, 1).
        init: None (PyTorch's default), "xavier" or "he" (biases zero).
        context: None, or the size of a context that follows the input into the first layer: the number of
            classes of integer labels, which are one-hot encoded, or of other tensors' numbers per datum.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a value that is not allowed, ``x`` has another event shape, or a
            context is missing, unexpected, of another size or out of range.

    References:
        Group normalization (Wu and He, 2018), arXiv:1803.08494.

    Example:
        >>> import torch
        >>> decoder = ConvDecoder(8, (1, 7, 9), hidden=64, channels=(16, 8))
        >>> decoder(torch.zeros(5, 3, 8)).shape, decoder.output_bias.shape
        (torch.Size([5, 3, 1, 7, 9]), torch.Size([1]))
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: Sequence[int],
        hidden: int = 256,
        channels: int | Sequence[int] = (64, 32),
        *,
        activation: str = "tanh",
        normalization: str | None = None,
        dropout: float = 0.0,
        init: str | None = "xavier",
        context: int | None = None,
    ) -> None:
        super().__init__()
        self._in_event = check_sizes("in_shape", in_shape)
        self._out_event = _check_image("out_shape", out_shape)
        features = check_positive_int("hidden", hidden)
        widths = (*_check_channels(channels), self._out_event[0])
        check_options(activation, normalization, dropout, init)
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.hidden = hidden
        self.channels = channels
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        self.init = init
        self.context = context

        bias = normalization != "batch"  # batch normalisation subtracts the mean: no bias before it
        smallest, *sizes = reversed(_sizes(self._out_event, len(widths) - 1))
        size = math.prod(self._in_event)
        first = (
            nn.Linear(size, features, bias=bias)
            if context is None
            else JointLinear(size + check_positive_int("context", context), features, bias=bias)
        )
        layers: list[nn.Module] = [first]
        layers += finish(features, activation, normalization, dropout)
        layers.append(nn.Linear(features, widths[0] * math.prod(smallest)))
        layers.append(nn.Unflatten(1, (widths[0], *smallest)))
        for i, (h, w) in enumerate(sizes):
            width_in, width = widths[i : i + 2]
            layers += finish(width_in, activation, normalization, dropout, image=True)
            # From s pixels a transposed convolution makes 2 s - 1, or 2 s with output padding.
            padding = (1 - h % 2, 1 - w % 2)
            output = i == len(sizes) - 1
            layers.append(nn.ConvTranspose2d(width_in, width, 3, 2, 1, padding, bias=bias or output))
        self.layers = nn.Sequential(*layers)
        initialize(self, init)

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the last layer, ``[C]``."""
        return cast(nn.Parameter, self.layers[-1].bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``[*batch, *in_shape]`` to ``[*batch, C, H, W]``.

        Args:
            x: the input.
            context: labels ``[*batch]`` or other tensors ``[n, *shape]``, if the network was made for them;
                batch shapes broadcast.
        """
        batch, size = batch_shape(x, self._in_event), math.prod(self._in_event)
        if self.context is None:
            refuse_context(context)
            y: Tensor = self.layers(x.reshape((math.prod(batch), size)))
            return y.reshape((*batch, *self._out_event))
        joint = encode_context(context, self.context, batch, x)
        y = self.layers[0](x.reshape((*batch, size)), joint)
        batch = y.shape[:-1]
        y = y.reshape((math.prod(batch), y.shape[-1]))
        for layer in islice(self.layers, 1, None):
            y = layer(y)
        return y.reshape((*batch, *self._out_event))


def _check_image(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """Return ``value`` as a tuple (C, H, W), or raise."""
    sizes = check_sizes(name, value)
    if len(sizes) != 3:
        raise ValueError(f"{name}: expected the shape (C, H, W) of an image, got {value!r}")
    return sizes


def _check_channels(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``value`` as a tuple of one or more sizes, or raise."""
    sizes = check_sizes("channels", value)
    if not sizes:
        raise ValueError(f"channels: expected at least one size, got {value!r}")
    return sizes


def _sizes(event: tuple[int, ...], halvings: int) -> list[tuple[int, int]]:
    """Return (H, W) of an image and after each of ``halvings`` convolutions with stride 2."""
    sizes = [(event[1], event[2])]
    for _ in range(halvings):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes
