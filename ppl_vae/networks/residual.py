"""Networks of residual blocks."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_at_least, check_positive_int, check_sizes
from ppl_vae.networks._layers import ACTIVATIONS, batch_shape, check_options, finish, initialize


class ResidualMLP(nn.Module):
    """Fully connected network of residual blocks, ``[*batch, *in_shape] -> [*batch, *out_shape]``.

    A linear layer to ``hidden`` units; then blocks, each adding to its input what two layers make of it:
    twice normalisation, activation, dropout, linear. The second linear layer of a block starts at zero, so
    that a network of any depth starts as a linear one. Normalisation and activation come last, then the
    linear output layer; with ``out_shape=None`` there is none: an encoder.

    Batch normalisation takes its moments over all batch dims together, particles included; in train mode
    the output for a datum then depends on the rest of its batch. Layer normalisation does not mix data.

    Args:
        in_shape: event shape of the input, a size or several.
        out_shape: event shape of the output, or None for the ``hidden`` features.
        hidden: width of all layers.
        blocks: the number of blocks.
        activation: "relu", "elu", "gelu", "silu", "tanh", "softplus" or "leaky_relu".
        normalization: None, "batch" or "layer".
        dropout: probability that a hidden unit is dropped, in [0, 1).
        init: None (PyTorch's default), "xavier" or "he" (biases zero), of all but the zero layers.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument has a value that is not allowed, or ``x`` has another event shape.

    References:
        Identity Mappings in Deep Residual Networks (He et al., 2016), arXiv:1603.05027.

    Example:
        >>> import torch
        >>> decoder = ResidualMLP(8, (1, 28, 28), hidden=64, blocks=3)
        >>> decoder(torch.zeros(5, 3, 8)).shape
        torch.Size([5, 3, 1, 28, 28])
        >>> encoder = ResidualMLP((1, 28, 28), hidden=64, normalization="batch")
        >>> encoder(torch.zeros(3, 1, 28, 28)).shape, encoder.out_features
        (torch.Size([3, 64]), 64)
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int] | None = None,
        hidden: int = 256,
        blocks: int = 2,
        *,
        activation: str = "relu",
        normalization: str | None = None,
        dropout: float = 0.0,
        init: str | None = "he",
    ) -> None:
        super().__init__()
        self._in_event = check_sizes("in_shape", in_shape)
        width = check_positive_int("hidden", hidden)
        check_options(activation, normalization, dropout, init)
        self._out_event = (width,) if out_shape is None else check_sizes("out_shape", out_shape)
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.hidden = hidden
        self.blocks = check_positive_int("blocks", blocks)
        self.activation = activation
        self.normalization = normalization
        self.dropout = dropout
        self.init = init
        self.out_features = math.prod(self._out_event)

        options = activation, normalization, dropout
        layers: list[nn.Module] = [nn.Linear(math.prod(self._in_event), width)]
        layers += [_Block(width, *options) for _ in range(blocks)]
        layers += finish(width, *options)
        if out_shape is not None:
            layers.append(nn.Linear(width, self.out_features))
        self.layers = nn.Sequential(*layers)
        initialize(self, init)
        for block in self.layers.children():
            if isinstance(block, _Block):
                block.start_at_zero()

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the output layer, ``[prod(out_shape)]``; absent if ``out_shape`` is None."""
        if self.out_shape is None:
            raise AttributeError("output_bias: a network with out_shape=None has no output layer")
        return cast(nn.Parameter, self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*batch, *in_shape]`` to ``[*batch, *out_shape]``."""
        batch = batch_shape(x, self._in_event)
        y: Tensor = self.layers(x.reshape((math.prod(batch), math.prod(self._in_event))))
        return y.reshape((*batch, *self._out_event))


class _Block(nn.Module):
    """Adds to ``[n, width]`` what two layers make of it."""

    def __init__(self, width: int, activation: str, normalization: str | None, dropout: float) -> None:
        super().__init__()
        bias = normalization != "batch"  # batch normalisation subtracts the mean: no bias before it
        self.layers = nn.Sequential(
            *finish(width, activation, normalization, dropout),
            nn.Linear(width, width, bias=bias),
            *finish(width, activation, normalization, dropout),
            nn.Linear(width, width),
        )

    def start_at_zero(self) -> None:
        """Let the block start as the identity."""
        last = cast(nn.Linear, self.layers[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.layers(x))


class ResidualConv(nn.Module):
    r"""Two 3x3 convolutions, each after an activation: ``[*batch, C, H, W] -> [*batch, C', H, W]``.

    With as many channels out as in the result is added to the input.

    Args:
        in_channels: C.
        out_channels: C'.
        hidden: channels between the two.
        activation: "relu", "elu", "gelu", "silu", "tanh", "softplus" or "leaky_relu".
        last_scale: multiplies the second convolution's weights at the start: 0 lets a block start as the
            identity, :math:`1 / \sqrt N` keeps the scale of a sum of N blocks.

    Raises:
        TypeError, ValueError: if an argument has the wrong type or a value that is not allowed.

    References:
        Identity Mappings in Deep Residual Networks (He et al., 2016), arXiv:1603.05027.

    Example:
        >>> import torch
        >>> ResidualConv(4, 6, 8)(torch.zeros(5, 3, 4, 7, 7)).shape
        torch.Size([5, 3, 6, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int,
        *,
        activation: str = "gelu",
        last_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels = check_positive_int("in_channels", in_channels)
        self.out_channels = check_positive_int("out_channels", out_channels)
        self.hidden = check_positive_int("hidden", hidden)
        check_options(activation, None, 0.0, None)
        self.activation = activation
        self.last_scale = check_at_least("last_scale", last_scale)
        first = nn.Conv2d(in_channels, hidden, 3, padding=1)
        last = nn.Conv2d(hidden, out_channels, 3, padding=1)
        with torch.no_grad():
            last.weight.mul_(self.last_scale)
            nn.init.zeros_(cast(Tensor, last.bias))
        self.layers = nn.Sequential(ACTIVATIONS[activation](), first, ACTIVATIONS[activation](), last)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[*batch, C, H, W]`` to ``[*batch, C', H, W]``."""
        y: Tensor = self.layers(x.reshape((math.prod(x.shape[:-3]), *x.shape[-3:])))
        y = y.reshape((*x.shape[:-3], *y.shape[1:]))
        return x + y if self.in_channels == self.out_channels else y
