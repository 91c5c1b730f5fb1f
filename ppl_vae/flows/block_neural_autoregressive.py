"""The block neural autoregressive flow."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ppl_vae._checks import check_sizes
from ppl_vae.flows import _zuko
from ppl_vae.flows._bisection import Bisected
from ppl_vae.flows.flow import Flow, Parameters


class BlockNeuralAutoregressive(Flow):
    r"""Layers :math:`z' = g z + (1 - g) f(z)`, :math:`f` one autoregressive network that is monotonic.

    .. math:: f(z) = W_L \tanh(\dots \tanh(W_1 z + b_1(c)) \dots) + b_L(c)

    The :math:`W_l` are lower triangular in blocks of units, of which each dimension has its own; blocks on
    the diagonal are positive, so that :math:`z_i'` increases in :math:`z_i`. The biases, and the
    gates :math:`g` in (0, 1) of each dimension, are linear in the context. The diagonal of the Jacobian is
    multiplied up on the log scale. Up to some hundred dimensions it takes fewer parameters than
    :class:`NeuralAutoregressive`, whose networks give the parameters of another one.

    Sampling takes one pass; scoring another's draw takes ``latent_dim`` passes per layer, in each of which
    bisection inverts the maps. The inverse has first and second derivatives, no third. Every second layer is
    in the reverse order. Starts near the identity.

    References:
        Block Neural Autoregressive Flow (De Cao et al., 2019), arXiv:1904.04676; with gates, without the
        normalisation of weights.
        Zuko's ``AutoregressiveTransform`` is used.

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: for each hidden layer of a network the number of units per dimension.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if there is no hidden layer.

    Example:
        >>> import torch
        >>> z = BlockNeuralAutoregressive(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        depth: int = 4,
        *,
        hidden: int | Sequence[int] = (8,),
    ) -> None:
        super().__init__(latent_dim, context_dim, depth)
        self.hidden = hidden
        units = check_sizes("hidden", hidden)
        if not units:
            raise ValueError(f"hidden: expected at least one hidden layer, got {hidden!r}")
        self.layers = nn.ModuleList(_Blocks(latent_dim, context_dim, units) for _ in range(depth))

    def parts(self, context: Tensor | None) -> list[Any]:
        """Return the layers."""
        return [
            _zuko.AutoregressiveTransform(partial(_maps, layer, context, bool(i % 2)), self.latent_dim)
            for i, layer in enumerate(self.layers)
        ]


def _maps(layer: nn.Module, context: Tensor | None, reverse: bool, z: Tensor) -> Any:
    """Return the maps of each dimension, given those before it: one transform of vectors."""
    shifts, logs, gate = layer(z.flip(-1) if reverse else z, context)
    if reverse:
        shifts, logs, gate = [s.flip(-1) for s in shifts], [w.flip(-1) for w in logs], gate.flip(-1)
    return _zuko.DependentTransform(_Network(shifts, logs, gate), 1)


class _Blocks(nn.Module):
    """The network: weights ``[out, in, d, d]`` in blocks, units ``[*batch, units, d]``."""

    def __init__(self, latent_dim: int, context_dim: int | None, units: Sequence[int]) -> None:
        super().__init__()
        self.logs, self.below, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        sizes = [1, *units, 1]
        for i, (m, n) in enumerate(pairwise(sizes)):
            last = i == len(units)
            # slopes of 1/2 where tanh is nearly linear, made up for at the end: f starts near the identity
            slope = (2 * 1.25 ** len(units) if last else 0.5 if i == 0 else 1.0) / m
            self.logs.append(nn.Parameter(math.log(slope) + 0.1 * torch.randn(n, m, latent_dim)))
            if latent_dim > 1:
                scale = 0.1 / math.sqrt(m * latent_dim)
                self.below.append(nn.Parameter(scale * torch.randn(n, m, latent_dim, latent_dim)))
            start = torch.linspace(-1, 1, n).unsqueeze(-1) if n > 1 else torch.zeros(1, 1)
            self.biases.append(Parameters(start.repeat(1, latent_dim), context_dim))
        self.gate = Parameters(torch.full((latent_dim,), 2.0), context_dim)

    def forward(self, z: Tensor, context: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return what each dimension's units get from those before it, the logs of diagonals, the gates."""
        shifts: list[Tensor] = []
        h = z.unsqueeze(-2)
        for i, (log, bias) in enumerate(zip(self.logs, self.biases, strict=True)):
            shift = bias(context)
            if len(self.below):
                n, m, d, _ = self.below[i].shape
                matrix = self.below[i].tril(-1).transpose(1, 2).reshape(n * d, m * d)
                shift = shift + nn.functional.linear(h.flatten(-2), matrix).unflatten(-1, (n, d))
            shifts.append(shift)
            if i < len(self.logs) - 1:
                h = (shift + _own(log, h)).tanh()
        return shifts, list(self.logs), self.gate(context)


def _own(log: Tensor, h: Tensor) -> Tensor:
    """Return what a dimension's units get from its own: ``[*batch, in, d]`` to ``[*batch, out, d]``."""
    return (log.exp() * h.unsqueeze(-3)).sum(-2)


class _Network(Bisected):
    """The map of each dimension ``[*batch, d]``."""

    def __init__(self, shifts: Sequence[Tensor], logs: Sequence[Tensor], gate: Tensor) -> None:
        super().__init__()
        self.shifts, self.logs, self.gate = shifts, logs, gate

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the logarithm of its derivative."""
        h, slope = x.unsqueeze(-2), torch.zeros_like(x).unsqueeze(-2)
        for i, (shift, log) in enumerate(zip(self.shifts, self.logs, strict=True)):
            h, slope = shift + _own(log, h), (log + slope.unsqueeze(-3)).logsumexp(-2)
            if i < len(self.logs) - 1:
                slope = slope + 2 * (math.log(2) - h + logsigmoid(2 * h))
                h = h.tanh()
        kept, rest = logsigmoid(self.gate), logsigmoid(-self.gate)
        y = kept.exp() * x + rest.exp() * h.squeeze(-2)
        return y, torch.logaddexp(kept, rest + slope.squeeze(-2))

    def _call(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(-2)
        for shift, log in zip(self.shifts[:-1], self.logs[:-1], strict=True):
            h = (shift + _own(log, h)).tanh()
        h = self.shifts[-1] + _own(self.logs[-1], h)
        return self.gate.sigmoid() * x + self.gate.neg().sigmoid() * h.squeeze(-2)

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the inverse lies, since tanh does between -1 and 1."""
        gate, rest = self.gate.sigmoid(), self.gate.neg().sigmoid()
        middle = y - rest * self.shifts[-1].squeeze(-2)
        reach = rest * self.logs[-1].exp().sum(-2).squeeze(-2)
        return (middle - reach) / gate, (middle + reach) / gate
