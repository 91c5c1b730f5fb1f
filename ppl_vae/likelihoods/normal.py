"""The normal likelihood with fixed, learned or predicted noise."""

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive
from ppl_vae._scales import bounded_scale
from ppl_vae.likelihoods._decoder import decode, event_dims, out_shape, split_output


class Normal(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j N(x_j; f_j(z), \sigma_j^2)`.

    Args:
        decoder: network from ``[*batch, latent]`` to the mean, ``[*batch, *event]``. With
            ``scale="network"`` its output has twice the size in the first event dimension: the
            first half is the mean, the second half :math:`\log \sigma`, clamped to [-7, 7].
        scale: the noise :math:`\sigma`: a number (fixed), ``"learned"`` (one number, trained, from 1),
            ``"elementwise"`` (one for each element of x, trained, from 1; the decoder needs an
            ``out_shape``) or ``"network"`` (the decoder's second half).

    Raises:
        TypeError: if ``scale`` is ``"elementwise"`` and the decoder has no ``out_shape``.
        ValueError: if ``scale`` is none of these, or not above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> Normal(MLP(2, 6), scale="network")(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    def __init__(
        self, decoder: nn.Module, scale: float | Literal["learned", "elementwise", "network"] = 1.0
    ) -> None:
        super().__init__()
        if isinstance(scale, str):
            check_choice("scale", scale, ["learned", "elementwise", "network"])
        else:
            check_positive("scale", scale)
        self.decoder = decoder
        self.scale = scale
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif scale == "elementwise":
            self.log_scale = nn.Parameter(torch.zeros(out_shape(decoder, "scale")))

    @staticmethod
    def outputs(scale: float | str = 1.0) -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return 2 if scale == "network" else 1

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        loc = decode(self.decoder, z, context)
        dims = event_dims(loc, z)
        if self.scale == "network":
            loc, log_scale = split_output(loc, z, 2, "mean, log-scale").unbind()
            scale = bounded_scale(log_scale)
        elif isinstance(self.scale, str):
            scale = self.log_scale.exp().expand_as(loc)
        else:
            scale = torch.full_like(loc, self.scale)
        return dist.Normal(loc, scale).to_event(dims)
