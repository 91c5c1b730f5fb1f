"""What likelihoods over pixels in [0, 1] share."""

import torch
from torch import Tensor, nn


def event_dims(output: Tensor, z: Tensor) -> int:
    """Return how many dimensions of a decoder's output are right of the batch dimensions of ``z``."""
    return output.dim() - z.dim() + 1


def init_logit_bias(decoder: nn.Module, x: Tensor) -> None:
    """Set the decoder's output bias to the logit of the mean of ``x``, clipped to [0.001, 0.999]."""
    bias = getattr(decoder, "output_bias", None)
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"decoder: expected a network with an `output_bias` parameter to start at the data mean, "
            f"got {type(decoder).__name__}"
        )
    mean = x.to(bias.dtype).mean(0)
    if mean.numel() != bias.numel():  # a convolution has one bias per channel
        mean = mean.mean(tuple(range(1, mean.dim())))
    if mean.numel() != bias.numel():
        raise ValueError(
            f"x: expected data of the decoder's {bias.numel()} outputs, got shape {tuple(x.shape)}"
        )
    with torch.no_grad():
        bias.copy_(mean.reshape(bias.shape).clamp(1e-3, 1 - 1e-3).logit())
