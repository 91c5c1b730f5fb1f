"""The Householder flow."""

import torch
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor

from ppl_vae.flows.flow import Flow, Parameters


class Householder(Flow):
    r"""Reflections :math:`z' = (I - 2 v v^\top / \lVert v \rVert^2) z`, with :math:`v` linear in the context.

    They turn a Gaussian with a diagonal covariance into one with a full one, of which ``depth`` reflections
    span a part; the result is Gaussian. Pairs of reflections start near each other, so that an even depth
    starts near the identity.

    References:
        Improving Variational Auto-Encoders using Householder Flow (Tomczak & Welling, 2016), arXiv:1611.09630
        Pyro's ``ConditionedHouseholder`` is used.

    Args:
        latent_dim: the number of latent dimensions, at least 2.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of reflections.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``latent_dim`` is 1.

    Example:
        >>> import torch
        >>> z = Householder(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    _least = 2

    def __init__(self, latent_dim: int, context_dim: int | None = None, depth: int = 4) -> None:
        super().__init__(latent_dim, context_dim, depth)
        self.vectors = Parameters(paired(depth, latent_dim), context_dim)

    def parts(self, context: Tensor | None) -> list[ConditionedHouseholder]:
        """Return all reflections as one part."""
        return [ConditionedHouseholder(self.vectors(context))]


def paired(number: int, latent_dim: int) -> Tensor:
    """Return unit vectors whose reflections nearly cancel in pairs."""
    vectors = torch.randn((number + 1) // 2, latent_dim).repeat_interleave(2, 0)[:number]
    return torch.nn.functional.normalize(vectors, dim=-1) + 0.01 * torch.randn(number, latent_dim)
