"""The multilayer perceptron."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ppl_vae._checks import check_sizes
from ppl_vae.networks._layers import batch_shape, check_options, finish, initialize


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

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a value that is not allowed, or ``x`` has another event shape.

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
    ) -> None:
        super().__init__()
        self._in_event = check_sizes("in_shape", in_shape)
        widths = (math.prod(self._in_event), *check_sizes("hidden", hidden))
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
        self.out_features = math.prod(self._out_event)

        layers: list[nn.Module] = []
        for width_in, width in pairwise(widths):
            # Batch normalisation subtracts the mean, so a bias before it would have no effect.
            layers.append(nn.Linear(width_in, width, bias=normalization != "batch"))
            layers += finish(width, activation, normalization, dropout)
        if out_shape is not None:
            layers.append(nn.Linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)
        initialize(self, init)

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the output layer, ``[prod(out_shape)]``; absent if ``out_shape`` is None."""
        if self.out_shape is None:
            raise AttributeError("output_bias: an MLP with out_shape=None has no output layer")
        return cast(nn.Parameter, self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*batch, *in_shape]`` to ``[*batch, *out_shape]``."""
        batch = batch_shape(x, self._in_event)
        if self.normalization == "batch":  # BatchNorm1d reads dim 1 as the features: two dims only
            x = x.reshape((math.prod(batch), math.prod(self._in_event)))
        elif len(self._in_event) != 1:
            x = x.reshape((*batch, math.prod(self._in_event)))
        y: Tensor = self.layers(x)
        if self.normalization == "batch" or len(self._out_event) != 1:
            y = y.reshape((*batch, *self._out_event))
        return y
