"""The planar flow."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from ppl_vae.flows._transform import Part
from ppl_vae.flows.flow import Flow, Parameters


class Planar(Flow):
    r"""Layers :math:`z' = z + \hat u \tanh(w^\top z + b)`, whose :math:`u, w, b` are linear in the context.

    Each layer bends space along one direction. A layer is invertible, but its inverse has no closed form: a
    distribution scores the values that it drew, others raise. Starts near the identity.

    References:
        Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), arXiv:1505.05770

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> z = Planar(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    invertible = False

    def __init__(self, latent_dim: int, context_dim: int | None = None, depth: int = 4) -> None:
        super().__init__(latent_dim, context_dim, depth)
        w = normalize(torch.randn(depth, latent_dim), dim=-1)
        # w . u_hat = softplus(w . u) - 1 is zero here
        u = math.log(math.e - 1) * w + 0.01 * torch.randn(depth, latent_dim)
        self.layers = Parameters(torch.cat([torch.zeros(depth, 1), u, w], -1), context_dim)

    def parts(self, context: Tensor | None) -> list["_Planar"]:
        """Return the layers."""
        sizes = (1, self.latent_dim, self.latent_dim)
        return [_Planar(*layer.split(sizes, -1)) for layer in self.layers(context).unbind(-2)]


class _Planar(Part):
    """Pyro's ``ConditionedPlanar`` is the same, but its determinant cancels to 0 for steep layers."""

    def __init__(self, bias: Tensor, u: Tensor, w: Tensor) -> None:
        super().__init__()
        self.bias, self.w = bias, w
        inner = (w * u).sum(-1, keepdim=True)
        self.slope = softplus(inner)  # 1 + w . u_hat, the determinant at tanh = 0
        self.u = u + (self.slope - 1 - inner) * w / w.square().sum(-1, keepdim=True)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log |det J|, of a determinant that is a sum of positive terms."""
        h = ((self.w * x).sum(-1, keepdim=True) + self.bias).tanh()
        square = h.square()
        return x + self.u * h, (square + (1 - square) * self.slope).log().squeeze(-1)
