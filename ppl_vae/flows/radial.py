"""The radial flow."""

import math

import torch
from pyro.distributions.transforms.radial import ConditionedRadial
from torch import Tensor

from ppl_vae.flows.flow import Flow, Parameters


class Radial(Flow):
    r"""Layers :math:`z' = z + \beta (z - z_0) / (\alpha + \lVert z - z_0 \rVert)`, linear in the context.

    Each layer draws space towards a point :math:`z_0`, or away from it. A distribution scores the values that
    it drew, others raise. Starts near the identity.

    References:
        Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), arXiv:1505.05770
        Pyro's ``ConditionedRadial`` is used.

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> z = Radial(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    invertible = False

    def __init__(self, latent_dim: int, context_dim: int | None = None, depth: int = 4) -> None:
        super().__init__(latent_dim, context_dim, depth)
        # α = softplus(a), β = softplus(b) - α
        a = torch.full((depth, 1), math.log(math.e - 1))
        b = a + 0.01 * torch.randn(depth, 1)
        self.layers = Parameters(torch.cat([torch.randn(depth, latent_dim), a, b], -1), context_dim)

    def parts(self, context: Tensor | None) -> list[ConditionedRadial]:
        """Return the layers."""
        sizes = (self.latent_dim, 1, 1)
        return [ConditionedRadial(layer.split(sizes, -1)) for layer in self.layers(context).unbind(-2)]
