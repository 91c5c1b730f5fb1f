"""Flows of univariate maps whose parameters a network gives: autoregressive flows and couplings."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive, check_positive_int, check_sizes
from ppl_vae.flows import _zuko
from ppl_vae.flows._transform import Part
from ppl_vae.flows.flow import Flow, Parameters
from ppl_vae.networks._layers import ACTIVATIONS


class Univariate:
    """A family of monotonic maps of the real line.

    Args:
        make: gives a transform of parameters ``[*batch, size]``, or ``[*batch]`` where the size is None.
        sizes: sizes of the parameters.
        start: values of all parameters, one after the other, for which the map is near the identity.
    """

    def __init__(
        self, make: Callable[..., Any], sizes: Sequence[int | None], start: Sequence[float] | None = None
    ) -> None:
        self.make = make
        self.sizes = sizes
        self.total = sum(size or 1 for size in sizes)
        self.start = (0.0,) * self.total if start is None else tuple(start)

    def __call__(self, flat: Tensor) -> Any:
        """Return the maps of parameters ``[*batch, d * total]``, as one transform of vectors of ``d``."""
        split = flat.unflatten(-1, (-1, self.total)).split([size or 1 for size in self.sizes], -1)
        parameters = [p.squeeze(-1) if size is None else p for p, size in zip(split, self.sizes, strict=True)]
        return _zuko.DependentTransform(self.make(*parameters), 1)


AFFINE = Univariate(_zuko.MonotonicAffineTransform, (None, None))


def spline(bins: int, bound: float) -> Univariate:
    """Return rational-quadratic splines on [-bound, bound], the identity outside."""
    if check_positive_int("bins", bins) < 2:
        raise ValueError(f"bins: expected at least 2, got {bins}")
    check_positive("bound", bound)
    return Univariate(partial(_zuko.MonotonicRQSTransform, bound=bound), (bins, bins, bins - 1))


class ConditionedFlow(Flow):
    """A flow whose layers are univariate maps with parameters by a network.

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: widths of the networks' hidden layers.
        activation: name of the networks' activation, as of :class:`ppl_vae.networks.MLP`.
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None,
        depth: int,
        hidden: int | Sequence[int],
        activation: str,
        univariate: Univariate,
    ) -> None:
        super().__init__(latent_dim, context_dim, depth)
        check_choice("activation", activation, ACTIVATIONS)
        self.hidden = hidden
        self.activation = activation
        self.univariate = univariate
        self._network: dict[str, Any] = {
            "hidden_features": check_sizes("hidden", hidden),
            "activation": ACTIVATIONS[activation],
        }
        self.layers = nn.ModuleList(self._layer(bool(i % 2)) for i in range(depth))

    def _layer(self, reverse: bool) -> nn.Module:
        raise NotImplementedError

    def _near_identity(self, network: nn.Module) -> nn.Module:
        """Let the last layer of a network start near the parameters of the identity."""
        last: Any = list(network.children())[-1]
        with torch.no_grad():
            last.weight.mul_(0.01)
            start = torch.tensor(self.univariate.start)
            last.bias.copy_(start.repeat(len(last.bias) // self.univariate.total))
        return network


class AutoregressiveFlow(ConditionedFlow):
    """Layers z'_i = f(z_i; network(z_1 ... z_{i-1}, context)), every second one in the reverse order."""

    def _layer(self, reverse: bool) -> nn.Module:
        if self.latent_dim == 1 and not self.context_dim:  # nothing to depend on
            start = torch.tensor(self.univariate.start)
            return Parameters(start + 0.01 * torch.randn_like(start), None)
        with torch.device("cpu"):  # masks are made by looking at values, which the device "meta" has not
            order = torch.arange(self.latent_dim)
            order = order.flip(0) if reverse else order
            adjacency = order.unsqueeze(-1) > order
            if self.context_dim:
                adjacency = torch.cat([adjacency, adjacency.new_ones(self.latent_dim, self.context_dim)], -1)
            return self._near_identity(
                _zuko.MaskedMLP(adjacency.repeat_interleave(self.univariate.total, 0), **self._network)
            )

    def parts(self, context: Tensor | None) -> list[Any]:
        """Return the layers."""
        return [
            _zuko.AutoregressiveTransform(partial(self._maps, layer, context), self.latent_dim)
            for layer in self.layers
        ]

    def _maps(self, layer: nn.Module, context: Tensor | None, z: Tensor) -> Any:
        return self.univariate(layer(None) if isinstance(layer, Parameters) else layer(_beside(z, context)))


class CouplingFlow(ConditionedFlow):
    """Layers that keep one half of z and map the other by it, halves in turn."""

    _least = 2

    def _halves(self, reverse: bool) -> tuple[int, int]:
        first = self.latent_dim // 2
        return (self.latent_dim - first, first) if reverse else (first, self.latent_dim - first)

    def _layer(self, reverse: bool) -> nn.Module:
        kept, mapped = self._halves(reverse)
        return self._near_identity(
            _zuko.MLP(kept + (self.context_dim or 0), mapped * self.univariate.total, **self._network)
        )

    def parts(self, context: Tensor | None) -> list["_Coupling"]:
        """Return the layers."""
        return [
            _Coupling(partial(self._maps, layer, context), self._halves(bool(i % 2)), bool(i % 2))
            for i, layer in enumerate(self.layers)
        ]

    def _maps(self, layer: nn.Module, context: Tensor | None, kept: Tensor) -> Any:
        return self.univariate(layer(_beside(kept, context)))


class _Coupling(Part):
    """Zuko's coupling indexes by a mask, whose values the tracer of compiled steps can't read."""

    def __init__(self, maps: Callable[[Tensor], Any], halves: tuple[int, int], reverse: bool) -> None:
        super().__init__()
        self.maps, self.halves, self.reverse = maps, halves, reverse

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log |det J|."""
        kept, rest = self._split(x)
        mapped, ladj = self.maps(kept).call_and_ladj(rest)
        return self._join(kept, mapped), ladj

    def _inverse(self, y: Tensor) -> Tensor:
        kept, mapped = self._split(y)
        return self._join(kept, self.maps(kept).inv(mapped))

    def _split(self, x: Tensor) -> Iterable[Tensor]:
        if self.reverse:
            return x.split(self.halves[::-1], -1)[::-1]
        return x.split(self.halves, -1)

    def _join(self, kept: Tensor, mapped: Tensor) -> Tensor:
        return torch.cat((mapped, kept) if self.reverse else (kept, mapped), -1)


def _beside(z: Tensor, context: Tensor | None) -> Tensor:
    if context is None:
        return z
    batch = torch.broadcast_shapes(z.shape[:-1], context.shape[:-1])
    return torch.cat([z.expand(*batch, -1), context.expand(*batch, -1)], -1)
