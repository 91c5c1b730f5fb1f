"""The residual top-down model of many layers of latent images."""

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int, check_sizes
from ppl_vae._scales import bounded_scale
from ppl_vae.networks.residual import ResidualConv
from ppl_vae.program import Program, batch_size, check_event


class _TopDownBlock(nn.Module):
    """A block of the model: the prior of a latent image given the state, and the state after it.

    Args:
        channels: those of the state.
        latent_channels: those of the latent image.
        depth: the number of blocks; what each adds to the state starts smaller by its square root.
    """

    def __init__(self, channels: int, latent_channels: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.latent_channels = latent_channels
        self.depth = depth
        scale = 1 / math.sqrt(depth)
        self.prior = ResidualConv(channels, channels + 2 * latent_channels, channels, last_scale=0.01)
        self.project = nn.Conv2d(latent_channels, channels, 1)
        self.residual = ResidualConv(channels, channels, channels, last_scale=scale)
        with torch.no_grad():
            self.project.weight.mul_(scale)

    def forward(self, state: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
        """Return p(z | state), event shape ``[latent_channels, H, W]``, and what it adds to the state."""
        added, outputs = self.prior(state).tensor_split([self.channels], -3)
        return normal_image(outputs), added

    def update(self, state: Tensor, added: Tensor, z: Tensor) -> Tensor:
        """Return the state after z was drawn, ``[*batch, channels, H, W]``."""
        projected = self.project(z.reshape((math.prod(z.shape[:-3]), *z.shape[-3:])))
        state = state + added + projected.reshape((*z.shape[:-3], *projected.shape[1:]))
        after: Tensor = self.residual(state)
        return after


class VeryDeepVAE(Program):
    r"""The residual top-down model :math:`\prod_l p(z_l \mid z_{l+1}, \dots, z_L) \; p(x \mid z_1, \dots)`.

    A state, an image of ``channels``, starts as a learned constant and grows from the smallest to the largest
    side. Each block draws a latent image given the state, and adds what it says to the state; the likelihood
    takes the last state, flat. Priors start near standard normals, and what a block adds starts smaller by
    the square root of their number, so that deep models train from the start. ``clip_norm`` of ``fit`` bounds
    the rare large gradient. The guide is :class:`ppl_vae.guides.VeryDeepGuide`.

    References:
        Very Deep VAEs Generalize Autoregressive Models (Child, 2021), arXiv:2011.10650

    Args:
        sizes: the side of each block's images, the top one first, never falling, such as ``(1, 7, 7, 14)``.
        channels: those of the state.
        latent_channels: those of each latent image.
        likelihood: module whose ``forward(state)`` returns a Distribution over ``x``, for states
            ``[*batch, channels * side * side]``; its decoder can be a ``PixelHead``.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``sizes`` fall.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks.pixel_head import PixelHead
        >>> model = VeryDeepVAE((1, 4, 8), 6, 2, Bernoulli(PixelHead((6, 8, 8), 1)))
        >>> model(None, size=3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self, sizes: Sequence[int], channels: int, latent_channels: int, likelihood: nn.Module
    ) -> None:
        super().__init__()
        sides = check_sizes("sizes", sizes)
        if not sides or list(sides) != sorted(sides):
            raise ValueError(f"sizes: expected sides of images that never fall, at least one, got {sizes!r}")
        self.sizes = sides
        self.channels = check_positive_int("channels", channels)
        self.latent_channels = check_positive_int("latent_channels", latent_channels)
        self.likelihood = likelihood
        self.start = nn.Parameter(torch.randn(channels, sides[0], sides[0]))
        self.blocks = nn.ModuleList(_TopDownBlock(channels, latent_channels, len(sides)) for _ in sides)

    def grown(self, state: Tensor, side: int) -> Tensor:
        """Return the state at a side, by nearest neighbours."""
        if state.shape[-1] == side:
            return state
        images = F.interpolate(state.reshape((math.prod(state.shape[:-3]), *state.shape[-3:])), (side, side))
        return images.reshape((*state.shape[:-2], side, side))

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``zL`` to ``z1`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw from the prior.
            size: the number of data to draw when ``x`` is None.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or both are None.
        """
        with pyro.plate("data", batch_size(x, size), dim=-1):
            state: Tensor = self.start
            block: Any
            for i, (block, side) in enumerate(zip(self.blocks, self.sizes, strict=True)):
                state = self.grown(state, side)
                prior, added = block(state)
                z = pyro.sample(f"z{len(self.blocks) - i}", prior)
                state = block.update(state, added, z)
            x_given_z = self.likelihood(state.flatten(-3))
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)


def normal_image(outputs: Tensor) -> dist.TorchDistribution:
    """Return the normal of independent pixels with these means and, clamped, log standard deviations."""
    loc, log_scale = outputs.chunk(2, -3)
    return dist.Normal(loc, bounded_scale(log_scale)).to_event(3)
