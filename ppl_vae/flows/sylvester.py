"""The Sylvester flow."""

import math
from typing import Any

import torch
from pyro.distributions.transforms.householder import ConditionedHouseholder
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppl_vae._checks import check_choice, check_positive_int
from ppl_vae.flows._transform import Part
from ppl_vae.flows.flow import Flow, Parameters
from ppl_vae.flows.householder import paired


class Sylvester(Flow):
    r"""Layers :math:`z' = z + Q R_1 \tanh(R_2 Q^\top z + b)`: planar ones in several directions at a time.

    :math:`Q` has orthonormal columns, :math:`R_1, R_2` are upper triangular with diagonals in (-1, 1). All
    are linear in the context, but for what makes :math:`Q` orthonormal:

    - "orthogonal": ``vectors`` columns, by a QR decomposition (the paper iterates to the same end);
    - "householder": ``latent_dim`` columns, by a product of ``vectors`` reflections.

    A distribution scores the values that it drew, others raise. Starts near the identity.

    References:
        Sylvester Normalizing Flows for Variational Inference (van den Berg et al., 2018), arXiv:1803.05649

    Args:
        latent_dim: the number of latent dimensions, at least 2; in one, Planar is the same.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        kind: "orthogonal" or "householder".
        vectors: the number of columns or of reflections; by default ``latent_dim``, at most 8.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``latent_dim`` is 1.
        ValueError: if ``kind`` is not known, or there are more columns than dimensions.

    Example:
        >>> import torch
        >>> z = Sylvester(2, 8, kind="householder")(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    invertible = False
    _least = 2

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        depth: int = 4,
        *,
        kind: str = "orthogonal",
        vectors: int | None = None,
    ) -> None:
        super().__init__(latent_dim, context_dim, depth)
        check_choice("kind", kind, ("orthogonal", "householder"))
        self.kind = kind
        self.vectors = vectors
        number = min(latent_dim, 8) if vectors is None else check_positive_int("vectors", vectors)
        if kind == "orthogonal":
            if number > latent_dim:
                raise ValueError(f"vectors: expected at most latent_dim = {latent_dim}, got {vectors}")
            basis, width = torch.randn(depth, latent_dim, number), number
        else:
            basis = torch.stack([paired(number, latent_dim) for _ in range(depth)])
            width = latent_dim
        self.basis = Parameters(basis, context_dim)
        triangles = Parameters(0.01 * torch.randn(depth, width, width), context_dim)
        self.triangles = triangles if width > 1 else None
        # rows: diagonal of R1, diagonal of R2, b
        rows = torch.tensor([[0.0], [1.0], [0.0]]) + 0.01 * torch.randn(depth, 3, width)
        self.rows = Parameters(rows, context_dim)

    def parts(self, context: Tensor | None) -> list["_Sylvester"]:
        """Return the layers."""
        basis = self.basis(context)
        if self.kind == "orthogonal":
            basis = torch.linalg.qr(basis)[0]
        first, second, bias = self.rows(context).unbind(-2)
        r1, r2 = torch.diag_embed(first.tanh()), torch.diag_embed(second.tanh())
        if self.triangles is not None:
            triangles = self.triangles(context)
            r1, r2 = r1 + triangles.triu(1), r2 + triangles.tril(-1).mT
        # log(1 + tanh(a) tanh(b)) = log(cosh(a + b) / (cosh(a) cosh(b)))
        whole = [r1, r2, bias, _log_cosh(first + second) - _log_cosh(first) - _log_cosh(second)]
        layers = zip(
            basis.unbind(-3),
            *(t.unbind(-3) for t in whole[:2]),
            *(t.unbind(-2) for t in whole[2:]),
            strict=True,
        )
        turn = _Columns if self.kind == "orthogonal" else _Reflections
        return [_Sylvester(turn(q), *layer) for q, *layer in layers]


class _Columns:
    """Q with orthonormal columns."""

    def __init__(self, q: Tensor) -> None:
        self.q = q

    def apply(self, v: Tensor) -> Tensor:
        return _times(self.q, v)

    def transposed(self, x: Tensor) -> Tensor:
        return _times(self.q.mT, x)


class _Reflections:
    """Q as a product of reflections."""

    def __init__(self, vectors: Tensor) -> None:
        self.reflect = ConditionedHouseholder(vectors)

    def apply(self, v: Tensor) -> Tensor:
        return self.reflect._call(v)

    def transposed(self, x: Tensor) -> Tensor:
        return self.reflect._inverse(x)


class _Sylvester(Part):
    """A layer; ``log_steepest`` is log(1 + r1 r2) of the diagonals: log |det J| where tanh is steepest."""

    def __init__(self, q: Any, r1: Tensor, r2: Tensor, bias: Tensor, log_steepest: Tensor) -> None:
        super().__init__()
        self.q, self.r1, self.r2, self.bias, self.log_steepest = q, r1, r2, bias, log_steepest

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log |det J|, by Sylvester's determinant identity."""
        inner = _times(self.r2, self.q.transposed(x)) + self.bias
        h = inner.tanh()
        # 1 + (1 - h^2) r1 r2 = h^2 + (1 - h^2) (1 + r1 r2), a sum of positive terms, from their logarithms
        zero = h == 0
        flat = torch.where(zero, -math.inf, 2 * torch.where(zero, 1.0, h).abs().log())
        steep = self.log_steepest - 2 * _log_cosh(inner)
        return x + self.q.apply(_times(self.r1, h)), (steep - logsigmoid(steep - flat)).sum(-1)


def _log_cosh(x: Tensor) -> Tensor:
    return x - logsigmoid(2 * x) - math.log(2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
