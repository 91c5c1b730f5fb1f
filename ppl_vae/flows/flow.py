"""What flows share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from ppl_vae._checks import check_positive_int
from ppl_vae.flows._transform import FlowTransform


class Flow(nn.Module):
    """A map from base noise to z, invertible for each value of a context.

    A flow of yours is a subclass whose ``parts`` gives the transforms of a context. The returned
    transform remembers its last input and output; it is made anew by each call, so nothing of it outlives
    a step of training.

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if the flow needs more dimensions.
    """

    invertible = True
    """Whether values can be scored that the flow did not draw."""
    _least = 1

    def __init__(self, latent_dim: int, context_dim: int | None, depth: int) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        if latent_dim < self._least:
            raise ValueError(
                f"latent_dim: expected at least {self._least} for {type(self).__name__}, got {latent_dim}"
            )
        if context_dim is None or (context_dim == 0 and not isinstance(context_dim, bool)):
            self.context_dim = context_dim
        else:
            self.context_dim = check_positive_int("context_dim", context_dim)
        self.depth = check_positive_int("depth", depth)

    def parts(self, context: Tensor | None) -> Sequence[Any]:
        """Return the transforms, first to last, each with ``call_and_ladj``."""
        raise NotImplementedError

    def forward(self, context: Tensor | None = None) -> Transform:
        """Return the map from noise ``[*particles, n, latent]`` to z.

        Args:
            context: ``[n, context_dim]``, or None for a flow without context.
        """
        size = self.context_dim or None
        found = None if context is None else list(context.shape)
        if (found and found[-1]) != size:
            expected = "None" if size is None else f"shape [*batch, {size}]"
            raise ValueError(f"context: expected {expected}, got {found}")
        return FlowTransform(self.parts(context), type(self).__name__, self.invertible)


class Parameters(nn.Module):
    """Tensors that are linear in the context, or free where there is none.

    Args:
        start: their values at a context of zeros, ``[*shape]``.
        context_dim: the number of context features.
    """

    def __init__(self, start: Tensor, context_dim: int | None) -> None:
        super().__init__()
        self.shape = tuple(start.shape)
        self.bias = nn.Parameter(start.flatten())
        if context_dim:
            self.weight = nn.Parameter(0.01 * torch.randn(start.numel(), context_dim))
        else:
            self.register_parameter("weight", None)

    def forward(self, context: Tensor | None) -> Tensor:
        """Return ``[*batch, *shape]``."""
        flat = self.bias if context is None else nn.functional.linear(context, self.weight, self.bias)
        return flat.unflatten(-1, self.shape)
