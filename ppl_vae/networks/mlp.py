"""The multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import islice, pairwise
from typing import cast

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


class MLP(nn.Module):
    """Fully connected network, ``[*batch, *in_shape] -> [*batch, *out_shape]`` for any batch shape.

    A hidden layer is linear, normalisation, activation, dropout; the output layer is linear. With
    ``out_shape=None`` there is no output layer and the features ``[*batch, hidden[-1]]`` of the last hidden
    layer are returned: an encoder.

    Batch normalisation takes its moments over all batch dims together, particles included; in train mode
    the output for a datum then depends on the rest of its batch. Layer normalisation does not mix data.

    Args:
        in_shape: event shape of the input, a size or several.
        out_shape: event shape of the output, or None for the features of the last hidden layer.
        hidden: widths of the hidden layers; may be empty if ``out_shape`` is given.
        activation: "relu", "elu", "gelu", "silu", "tanh", "softplus" or "leaky_relu".
        normalization: None, "batch" or "layer".
        dropout: probability that a hidden unit is dropped, in [0, 1).
        init: None (PyTorch's default), "xavier" or "he" (biases zero).
        context: None, or the size of a context that follows the input into the first layer: the number of
            classes of integer labels, which are one-hot encoded, or of other tensors' numbers per datum.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a value that is not allowed, ``x`` has another event shape, or a
            context is missing, unexpected, of another size or out of range.

    References:
        Batch normalization (Ioffe and Szegedy, 2015), arXiv:1502.03167.
        Layer normalization (Ba et al., 2016), arXiv:1607.06450.

    Example:
        >>> import torch
        >>> decoder = MLP(8, (1, 28, 28), hidden=(64, 64))
        >>> decoder(torch.zeros(5, 3, 8)).shape
        torch.Size([5, 3, 1, 28, 28])
        >>> encoder = MLP((1, 28, 28), hidden=64, activation="tanh")
        >>> encoder(torch.zeros(3, 1, 28, 28)).shape, encoder.out_features
        (torch.Size([3, 64]), 64)
        >>> conditional = MLP(8, (1, 28, 28), context=10)
        >>> conditional(torch.zeros(5, 3, 8), torch.tensor([2, 0, 9])).shape
        torch.Size([5, 3, 1, 28, 28])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int] | None = None,
        hidden: int | Sequence[int] = (256, 256),
        *,
        activation: str = "tanh",
        normalization: str | None = None,
        dropout: float = 0.0,
        init: str | None = "xavier",
        context: int | None = None,
    ) -> None:
        super().__init__()
        self._in_event = check_sizes("in_shape", in_shape)
        joint = 0 if context is None else check_positive_int("context", context)
        widths = (math.prod(self._in_event) + joint, *check_sizes("hidden", hidden))
        check_options(activation, normalization, dropout, init)
        if out_shape is None and len(widths) == 1:
            raise ValueError(f"hidden: expected at least one width when out_shape is None, got {hidden!r}")
        self._out_event = widths[-1:] if out_shape is None else check_sizes("out_shape", out_shape)
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.hidden = hidden
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        self.init = init
        self.context = context
        self.out_features = math.prod(self._out_event)

        layers: list[nn.Module] = []
        linear = JointLinear if joint else nn.Linear
        for width_in, width in pairwise(widths):
            # Batch normalisation subtracts the mean, so a bias before it would have no effect.
            layers.append(linear(width_in, width, bias=normalization != "batch"))
            layers += finish(width, activation, normalization, dropout)
            linear = nn.Linear
        if out_shape is not None:
            layers.append(linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)
        initialize(self, init)

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the output layer, ``[prod(out_shape)]``; absent if ``out_shape`` is None."""
        if self.out_shape is None:
            raise AttributeError("output_bias: an MLP with out_shape=None has no output layer")
        return cast(nn.Parameter, self.layers[-1].bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map ``[*batch, *in_shape]`` to ``[*batch, *out_shape]``.

        Args:
            x: the input.
            context: labels ``[*batch]`` or other tensors ``[n, *shape]``, if the network was made for them;
                batch shapes broadcast, so that n contexts serve all particles ``[K, n, *in_shape]``.
        """
        batch = batch_shape(x, self._in_event)
        if self.context is None:
            refuse_context(context)
        else:
            joint = encode_context(context, self.context, batch, x)
            y: Tensor = self.layers[0](x.reshape((*batch, math.prod(self._in_event))), joint)
            batch = y.shape[:-1]
            if self.normalization == "batch":
                y = y.reshape((math.prod(batch), y.shape[-1]))
            for layer in islice(self.layers, 1, None):
                y = layer(y)
            return y.reshape((*batch, *self._out_event))
        if self.normalization == "batch":  # BatchNorm1d reads dim 1 as the features: two dims only
            x = x.reshape((math.prod(batch), math.prod(self._in_event)))
        elif len(self._in_event) != 1:
            x = x.reshape((*batch, math.prod(self._in_event)))
        y = self.layers(x)
        if self.normalization == "batch" or len(self._out_event) != 1:
            y = y.reshape((*batch, *self._out_event))
        return y
