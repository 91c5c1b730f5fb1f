"""What the networks share: option checks, the end of a hidden layer, initialisation, batch shapes."""

import math
from numbers import Real

from torch import Tensor, nn

from ppl_vae._checks import check_choice

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
