"""The guide of the residual top-down model."""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_sizes
from ppl_vae.models.very_deep import VeryDeepVAE, normal_image
from ppl_vae.networks.residual import ResidualConv
from ppl_vae.program import Program, Referring


class VeryDeepGuide(Referring, Program):
    r"""The top-down guide :math:`\prod_l q(z_l \mid z_{l+1}, \dots, z_L, x)` of :class:`VeryDeepVAE`.

    A pass upwards gives features of the data at each side, by convolutions and average pooling. The pass
    downwards is the model's own: at each block, q is a normal distribution whose parameters come from the
    features and the model's state. The gradient of q reaches the model's blocks too.

    The model is a reference, which ``parameters()`` and ``state_dict()`` leave out; another can be set as
    ``guide.model``. A pair that runs with another model than the guide's raises an error.

    References:
        Very Deep VAEs Generalize Autoregressive Models (Child, 2021), arXiv:2011.10650

    Args:
        in_shape: (C, H, W) of the data, H and W the model's last side.
        model: the model.

    Raises:
        TypeError: if the model is no ``VeryDeepVAE``.
        ValueError: if ``in_shape`` is no shape of an image of the model's last side.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks.pixel_head import PixelHead
        >>> model = VeryDeepVAE((1, 4, 8), 6, 2, Bernoulli(PixelHead((6, 8, 8), 1)))
        >>> guide = VeryDeepGuide((1, 8, 8), model)
        >>> [z.shape for z in guide(torch.zeros(5, 1, 8, 8))][-1]
        torch.Size([5, 2, 1, 1])
    """

    references = ("model",)
    model: VeryDeepVAE

    def __init__(self, in_shape: Sequence[int], model: VeryDeepVAE) -> None:
        super().__init__()
        if not isinstance(model, VeryDeepVAE):
            raise TypeError(f"model: expected a VeryDeepVAE, got {type(model).__name__}")
        shape, side = check_sizes("in_shape", in_shape), model.sizes[-1]
        if len(shape) != 3 or shape[1:] != (side, side):
            raise ValueError(
                f"in_shape: expected (C, {side}, {side}), the model's last side, got {in_shape!r}"
            )
        self.in_shape = in_shape
        self.model = model
        channels = model.channels
        sides = sorted(set(model.sizes), reverse=True)
        scale = len(sides) ** -0.5
        self.stem = nn.Conv2d(shape[0], channels, 3, padding=1)
        self.encoders = nn.ModuleList(
            ResidualConv(channels, channels, channels, last_scale=scale) for _ in sides
        )
        self.heads = nn.ModuleList(
            ResidualConv(2 * channels, 2 * model.latent_channels, channels) for _ in model.sizes
        )

    def encode(self, x: Tensor) -> dict[int, Tensor]:
        """Return features by side, ``[n, channels, side, side]``, of ``x`` ``[n, C, H, W]``."""
        found: dict[int, Tensor] = {}
        features = self.stem(x)
        for side, encoder in zip(sorted(set(self.model.sizes), reverse=True), self.encoders, strict=True):
            features = found[side] = encoder(F.adaptive_avg_pool2d(features, side))
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the program: sites ``zL`` to ``z1`` in the plate ``data``.

        Args:
            x: data ``[n, C, H, W]``.

        Returns:
            The latent images, ``[*particles, n, latent_channels, side, side]`` each, the lowest first.
        """
        features, model = self.encode(x), self.model
        drawn: list[Tensor] = []
        state: Tensor = model.start
        block: Any
        with pyro.plate("data", x.shape[0], dim=-1):
            for side, block, head in zip(model.sizes, model.blocks, self.heads, strict=True):
                state = model.grown(state, side)
                of_data = features[side]
                batch = torch.broadcast_shapes(state.shape[:-3], of_data.shape[:-3])
                both = [t.expand(*batch, *t.shape[-3:]) for t in (of_data, state)]
                posterior = normal_image(head(torch.cat(both, -3)))
                z = pyro.sample(f"z{len(model.blocks) - len(drawn)}", posterior)
                drawn.append(z)
                state = block.update(state, block(state)[1], z)
        return drawn[::-1]
