"""Masked convolutions: images whose pixels depend on those before them, row by row."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VerticalConv2d(nn.Conv2d):
    """Convolution whose output at a row sees the rows above it, and its own unless ``strict``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        reach: how many rows above, and how many columns to either side.
        strict: leave out the row itself.
    """

    def __init__(self, in_channels: int, out_channels: int, reach: int, *, strict: bool = False) -> None:
        super().__init__(in_channels, out_channels, (reach + (not strict), 2 * reach + 1))
        self.reach = reach
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, in_channels, H, W]`` to ``[n, out_channels, H, W]``."""
        return super().forward(F.pad(x, (self.reach, self.reach, self.reach, -int(self.strict))))


class HorizontalConv2d(nn.Conv2d):
    """Convolution along rows whose output at a pixel sees pixels left of it, and channels before its own.

    Channel c belongs to group c modulo ``groups_of``, the number of the image's channels. An output sees, at
    its own pixel, the input channels of earlier groups, and of its own unless ``strict``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; twice a number of features, halves counted apart, if ``halves``.
        reach: how many pixels to the left.
        groups_of: the number of groups.
        strict: leave out the own group.
        halves: count the groups of the output's two halves apart.
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        reach: int,
        groups_of: int,
        *,
        strict: bool = False,
        halves: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, (1, reach + 1))
        self.reach = reach
        before = torch.arange(in_channels) % groups_of
        own = torch.arange(out_channels) % (out_channels // 2 if halves else out_channels) % groups_of
        mask = torch.ones_like(self.weight)
        mask[:, :, 0, -1] = (before < own[:, None]) if strict else (before <= own[:, None])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, in_channels, H, W]`` to ``[n, out_channels, H, W]``."""
        return F.conv2d(F.pad(x, (self.reach, 0)), self.weight * self.mask, self.bias)


class GatedPixelCNN(nn.Module):
    """Outputs for each pixel that depend on the pixels before it and on a feature map.

    Pixels are ordered row by row, the channels of a pixel one after another. A vertical stack of
    convolutions sees the rows above, a horizontal one the row itself; there is no blind spot.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016), arXiv:1606.05328

    Args:
        channels: channels of the images.
        outputs: the number of outputs for each of their values.
        features: channels of the feature map.
        hidden: channels of the hidden layers.
        layers: the number of gated layers.
        kernel_size: side of the vertical kernels, odd, from 3.

    Example:
        >>> network = GatedPixelCNN(3, 2, features=8, hidden=16)
        >>> network(torch.zeros(5, 3, 6, 7), torch.zeros(5, 8, 6, 7)).shape
        torch.Size([5, 6, 6, 7])
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        features: int,
        hidden: int = 32,
        layers: int = 4,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        reach, deep = kernel_size // 2, range(1, layers)
        self.reach = layers * reach
        self.vertical = nn.ModuleList([VerticalConv2d(channels, 2 * hidden, reach, strict=True)])
        self.vertical.extend(VerticalConv2d(hidden, 2 * hidden, reach) for _ in deep)
        first = HorizontalConv2d(channels, 2 * hidden, reach, channels, strict=True, halves=True)
        self.horizontal = nn.ModuleList([first])
        self.horizontal.extend(
            HorizontalConv2d(hidden, 2 * hidden, reach, channels, halves=True) for _ in deep
        )
        self.condition = nn.ModuleList(nn.Conv2d(features, 4 * hidden, 1) for _ in range(layers))
        self.link = nn.ModuleList(nn.Conv2d(2 * hidden, 2 * hidden, 1) for _ in range(layers))
        self.mix = nn.ModuleList(HorizontalConv2d(hidden, hidden, 0, channels) for _ in range(layers))
        self.head = HorizontalConv2d(hidden, hidden, 0, channels)
        self.last = HorizontalConv2d(hidden, outputs * channels, 0, channels)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Return the outputs ``[n, outputs * channels, H, W]``, as a likelihood's decoder orders them.

        Args:
            x: images ``[n, channels, H, W]``.
            features: what each pixel depends on besides, ``[n, features, H, W]``.
        """
        return self.along(x, self.above(x, features))

    def above(self, x: Tensor, features: Tensor) -> Tensor:
        """Return what the rows above and the features give each layer, ``[n, layers, 2 * hidden, H, W]``."""
        given = []
        for vertical, condition, link in zip(self.vertical, self.condition, self.link, strict=True):
            down, across = condition(features).chunk(2, 1)
            both = vertical(x) + down
            given.append(link(both) + across)
            x = _gate(both)
        return torch.stack(given, 1)

    def along(self, x: Tensor, above: Tensor) -> Tensor:
        """Return the outputs of rows ``x``, any of an image's, given ``above`` of the same rows."""
        for i, (horizontal, mix) in enumerate(zip(self.horizontal, self.mix, strict=True)):
            y = mix(_gate(horizontal(x) + above[:, i]))
            x = y if i == 0 else x + y
        outputs: Tensor = self.last(F.relu(self.head(F.relu(x))))
        return outputs


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)
