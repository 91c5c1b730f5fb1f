"""What likelihoods share: running the decoder, taking its outputs apart, starting its bias at the data."""

from torch import Tensor, nn

from ppl_vae._checks import check_positive_int

LOG_MEAN = 15.0  # the log of a mean of counts is clamped to plus and minus this


def decode(decoder: nn.Module, z: Tensor, context: Tensor | None) -> Tensor:
    """Return the decoder's output for ``z``, and for the context if there is one."""
    output: Tensor = decoder(z) if context is None else decoder(z, context)
    return output


def event_dims(output: Tensor, z: Tensor) -> int:
    """Return how many dimensions of a decoder's output are right of the batch dimensions of ``z``."""
    return output.dim() - z.dim() + 1


def split_output(output: Tensor, z: Tensor, count: int, names: str) -> Tensor:
    """Take apart the first event dimension, ``[*batch, count * C, ...]`` to ``[count, *batch, C, ...]``.

    Raises:
        ValueError: if its size is no multiple of ``count``.
    """
    dims = event_dims(output, z)
    if output.shape[-dims] % count:
        raise ValueError(
            f"decoder: expected a multiple of {count} in the first event dimension ({names}), "
            f"got output shape {tuple(output.shape[-dims:])}"
        )
    return output.unflatten(-dims, (count, -1)).movedim(-dims - 1, 0)


def out_shape(decoder: nn.Module, name: str) -> tuple[int, ...]:
    """Return the shape of the decoder's output, as its ``out_shape`` says, or raise naming an argument."""
    shape = getattr(decoder, "out_shape", None)
    if shape is None:
        raise TypeError(
            f"{name}: needs a decoder with an `out_shape`, the shape of x, got {type(decoder).__name__}"
        )
    return (shape,) if isinstance(shape, int) else tuple(shape)


def bias_and_data(decoder: nn.Module, x: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Return the decoder's output bias, ``[count, size]``, and the data as ``[n, size]``.

    A convolution has one bias per channel: all pixels are its data.

    Args:
        decoder: a network with an ``output_bias``; the bias that is returned is a view of it.
        x: the training data, ``[n, *event]``.
        count: the number of outputs for each value of x.

    Raises:
        TypeError: if the decoder has no ``output_bias``.
        ValueError: if the data have another size than the decoder's output.
    """
    bias = getattr(decoder, "output_bias", None)
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"decoder: expected a network with an `output_bias` parameter to start at the data mean, "
            f"got {type(decoder).__name__}"
        )
    if bias.numel() == count * x[0].numel():
        data = x.flatten(1)
    elif x.dim() > 1 and bias.numel() == count * x.shape[1]:
        data = x.movedim(1, -1).flatten(0, -2)
    else:
        each = f", {count} for each value" if count > 1 else ""
        raise ValueError(
            f"x: expected data of the decoder's {bias.numel()} outputs{each}, got shape {tuple(x.shape)}"
        )
    return bias.detach().view(count, -1), data.to(bias)


def init_logit_bias(decoder: nn.Module, x: Tensor) -> None:
    """Set the decoder's output bias to the logit of the mean of ``x``, clipped to [0.001, 0.999]."""
    bias, data = bias_and_data(decoder, x)
    bias.copy_(data.mean(0).clamp(1e-3, 1 - 1e-3).logit())


def init_log_bias(decoder: nn.Module, x: Tensor, outputs: int = 1) -> None:
    """Set the first of the decoder's output biases to the log of the mean of ``x``, clipped from 0.001."""
    bias, data = bias_and_data(decoder, x, outputs)
    bias[0] = data.mean(0).clamp(min=1e-3).log()


def check_levels(levels: int) -> int:
    """Return ``levels``, or raise if it is not a whole number from 2."""
    if check_positive_int("levels", levels) < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    return levels
