"""The normal likelihood with fixed, learned or predicted noise."""

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive
from ppl_vae.likelihoods._logits import event_dims


class Normal(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j N(x_j; f_j(z), \sigma_j^2)`.

    Args:
        decoder: network from ``[*batch, latent]`` to the mean, ``[*batch, *event]``. With
            ``scale="network"`` its output has twice the size in the first event dimension: the
            first half is the mean, the second half :math:`\log \sigma`, clamped to [-7, 7].
        scale: the noise :math:`\sigma`: a number (fixed), ``"learned"`` (one number, trained, from 1)
            or ``"network"`` (the decoder's second half).

    Raises:
        ValueError: if ``scale`` is none of these, or not above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> Normal(MLP(2, 6), scale="network")(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    def __init__(self, decoder: nn.Module, scale: float | Literal["learned", "network"] = 1.0) -> None:
        super().__init__()
        if isinstance(scale, str):
            check_choice("scale", scale, ["learned", "network"])
        else:
            check_positive("scale", scale)
        self.decoder = decoder
        self.scale = scale
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``."""
        loc = self.decoder(z)
        dims = event_dims(loc, z)
        if self.scale == "network":
            if loc.shape[-dims] % 2:
                raise ValueError(
                    "decoder: expected an even size in the first event dimension (mean and log-scale), "
                    f"got output shape {tuple(loc.shape[-dims:])}"
                )
            loc, log_scale = loc.chunk(2, -dims)
            scale = log_scale.clamp(-7.0, 7.0).exp()
        elif self.scale == "learned":
            scale = self.log_scale.exp().expand_as(loc)
        else:
            scale = torch.full_like(loc, self.scale)
        return dist.Normal(loc, scale).to_event(dims)
