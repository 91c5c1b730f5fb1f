"""The last layer of a network whose state is an image."""

import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from ppl_vae._checks import check_positive_int, check_sizes
from ppl_vae.networks._layers import batch_shape


class PixelHead(nn.Module):
    """Image from a flat state, pixel by pixel: ``[*batch, C * H * W] -> [*batch, C', H, W]``.

    Args:
        state_shape: (C, H, W).
        out_channels: C', those of the image or of the likelihood's parameters.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``state_shape`` no three of them.

    Example:
        >>> import torch
        >>> PixelHead((4, 7, 7), 1)(torch.zeros(5, 3, 4 * 7 * 7)).shape
        torch.Size([5, 3, 1, 7, 7])
    """

    def __init__(self, state_shape: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self._state = check_sizes("state_shape", state_shape)
        if len(self._state) != 3:
            raise ValueError(f"state_shape: expected (C, H, W), got {state_shape!r}")
        self.state_shape = state_shape
        self.out_channels = check_positive_int("out_channels", out_channels)
        self.layer = nn.Conv2d(self._state[0], out_channels, 1)

    @property
    def output_bias(self) -> nn.Parameter:
        """Bias of the output, ``[C']``."""
        return cast(nn.Parameter, self.layer.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[*batch, C * H * W]`` to ``[*batch, C', H, W]``."""
        batch = batch_shape(z, (math.prod(self._state),))
        y: Tensor = self.layer(z.reshape((math.prod(batch), *self._state)))
        return y.reshape((*batch, *y.shape[1:]))
