"""What the networks share: options, the end of a hidden layer, initialisation, batch shapes, contexts."""

import math
from numbers import Real

import torch
import torch.nn.functional as F
from pyro.poutine.util import is_validation_enabled
from torch import Tensor, nn

from ppl_vae._checks import check_choice
from ppl_vae._one_hot import one_hot

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "leaky_relu": nn.LeakyReLU,
}


def check_options(activation: object, normalization: object, dropout: object, init: object) -> None:
    """Raise if one of the options that all networks share is not valid."""
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("normalization", normalization, (None, "batch", "layer"))
    check_choice("init", init, (None, "xavier", "he"))
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"dropout: expected a number in [0, 1), got {dropout!r}")
    if not 0 <= float(dropout) < 1:
        raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")


def finish(
    width: int, activation: str, normalization: str | None, dropout: float, *, image: bool = False
) -> list[nn.Module]:
    """Return what follows a hidden layer of ``width`` units: normalisation, activation, dropout.

    For images ``[n, width, H, W]`` layer normalisation is ``GroupNorm(1, width)``: the moments of a datum
    are taken over channels and pixels together, the learned scale and shift are per channel.
    """
    layers: list[nn.Module] = []
    if normalization == "batch":
        layers.append(nn.BatchNorm2d(width) if image else nn.BatchNorm1d(width))
    elif normalization == "layer":
        layers.append(nn.GroupNorm(1, width) if image else nn.LayerNorm(width))
    layers.append(ACTIVATIONS[activation]())
    if dropout > 0:
        layers.append(nn.Dropout(dropout))
    return layers


def initialize(module: nn.Module, init: str | None) -> None:
    """Draw the weights of all linear and convolutional layers anew and set their biases to zero.

    ``None`` leaves PyTorch's default, ``"xavier"`` is uniform with variance 2 / (fan in + fan out), ``"he"``
    is normal with variance 2 / fan in. The fan in of a transposed convolution is the mean number of inputs
    of an output pixel, in_channels * kernel area / stride area; PyTorch's own ``kaiming_normal_`` would
    take out_channels * kernel area.

    References:
        Understanding the difficulty of training deep feedforward neural networks (Glorot and Bengio, 2010).
        Delving deep into rectifiers (He et al., 2015), arXiv:1502.01852.
    """
    if init is None:
        return
    for layer in module.modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            continue
        if init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        else:
            out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            fan_in = layer.weight.numel() / out
            if isinstance(layer, nn.ConvTranspose2d):
                fan_in /= math.prod(layer.stride)
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_in))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def batch_shape(x: Tensor, event: tuple[int, ...]) -> tuple[int, ...]:
    """Return the dims of ``x`` left of its event dims, or raise if the event dims are not ``event``."""
    split = x.dim() - len(event)
    if split < 0 or x.shape[split:] != event:
        expected = ", ".join(map(str, ("*batch", *event)))
        raise ValueError(f"x: expected shape [{expected}], got {list(x.shape)}")
    return x.shape[:split]


class JointLinear(nn.Linear):
    """A linear layer of an input and a context that follow each other, whose batch shapes broadcast.

    The two halves are multiplied apart: an input ``[n, d]`` is multiplied once, however many contexts
    ``[classes, 1, c]`` it meets.
    """

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``[*batch, d]`` and ``[*batch, c]`` to ``[*batch, out_features]``."""
        d = x.shape[-1]
        return F.linear(x, self.weight[:, :d], self.bias) + F.linear(context, self.weight[:, d:])


def encode_context(context: Tensor | None, size: int, batch: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a context as numbers, ``[*batch, size]``: labels one-hot, other tensors flattened.

    Args:
        context: integer labels in [0, size), or a tensor ``[n, *shape]`` of ``size`` numbers per datum.
        size: what the network expects.
        batch: the input's batch shape, with which the context's is to broadcast.
        like: a tensor of the dtype wanted.

    Raises:
        ValueError: if there is no context, or one of another size, or a label out of range; labels are
            looked at while Pyro validates.
    """
    if context is None:
        raise ValueError(f"context: expected labels in [0, {size}) or {size} numbers per datum, got none")
    if context.is_floating_point() or context.dtype == torch.bool:
        if context.dim() == 0 or math.prod(context.shape[1:]) != size:
            raise ValueError(
                f"context: expected integer labels in [0, {size}), or {size} numbers per datum, "
                f"[n, {size}], got {list(context.shape)} of {context.dtype}"
            )
        encoded = context.reshape(len(context), size).to(like.dtype)
    else:
        if is_validation_enabled() and not context.is_meta:
            outside = (context < 0) | (context >= size)
            if outside.any():
                raise ValueError(f"context: expected labels in [0, {size}), got {int(context[outside][0])}")
        encoded = one_hot(context, size).to(like.dtype)
    try:
        torch.broadcast_shapes(batch, encoded.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"context: expected a batch shape like the input's {list(batch)}, got {list(encoded.shape[:-1])}"
        ) from None
    return encoded


def refuse_context(context: Tensor | None) -> None:
    """Raise if a network that was made without a context is given one."""
    if context is not None:
        raise ValueError(
            f"context: expected none, since the network was made with context=None, "
            f"got a tensor of shape {list(context.shape)}"
        )
