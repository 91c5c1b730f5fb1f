"""Draws of a guide that are moved along the model's gradient."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae.guides.model_based import ModelBasedGuide

Move = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class MovedDraws(dist.TorchDistribution):
    """Draws of a distribution, moved: each with the logarithm of what stands in place of its density.

    Args:
        start: what is drawn from first.
        move: gives, for ``start`` and its draws ``[*shape, event]``, where they go and what they score,
            ``[*shape]``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, start: Any, move: Move) -> None:
        super().__init__(start.batch_shape, start.event_shape, validate_args=False)
        self.start = start
        self.move = move
        self._drawn: tuple[Tensor, Tensor] | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "MovedDraws":
        """Return the distribution of independent draws for each of a larger batch."""
        return MovedDraws(self.start.expand(batch_shape), self.move)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return draws, ``[*sample_shape, *batch, *event]``, which can be scored until the next ones."""
        self._drawn = self.move(self.start, self.start.rsample(sample_shape))
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return what the last draws score.

        Raises:
            NotImplementedError: for another value.
        """
        if self._drawn is None or value is not self._drawn[0]:
            raise NotImplementedError("expected the last draws of this distribution, which scores no other z")
        return self._drawn[1]


def log_normal(value: Tensor) -> Tensor:
    """Return log N(value; 0, I) over the last dimension."""
    return -0.5 * (value.square() + math.log(2 * math.pi)).sum(-1)


def latent_dim_of(guide: nn.Module) -> int:
    size = getattr(guide, "latent_dim", None)
    if size is None:
        size = latent_dim_of(guide.guide) if isinstance(guide, ModelBasedGuide) else None
    if size is None:
        raise TypeError(f"guide: expected one with a `latent_dim`, got {type(guide).__name__}")
    return int(size)
