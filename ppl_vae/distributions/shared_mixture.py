"""A mixture that all data share."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class SharedMixture(dist.TorchDistribution):
    """A mixture of any family, the same for all data; the density by each component in turn.

    Args:
        components: a distribution of batch shape ``[components]``.
        log_weights: ``[components]``, normalised.
        select: gives the distribution of components by their numbers ``[m]``, of batch shape ``[m]``.

    Example:
        >>> from ppl_vae.distributions import VonMisesFisher
        >>> loc, concentration = torch.eye(3), torch.full((3,), 10.0)
        >>> mixture = SharedMixture(
        ...     VonMisesFisher(loc, concentration),
        ...     torch.full((3,), 1 / 3).log(),
        ...     lambda which: VonMisesFisher(loc[which], concentration[which]),
        ... )
        >>> mixture.log_prob(mixture.sample((5,))).shape
        torch.Size([5])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as of torch
    has_rsample = False

    def __init__(self, components: Any, log_weights: Tensor, select: Callable[[Tensor], Any]) -> None:
        self.components, self.log_weights, self.select = components, log_weights, select
        super().__init__(torch.Size(), components.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedMixture":
        """Return the mixture with another batch shape."""
        new: SharedMixture = self._get_checked_instance(SharedMixture, _instance)
        new.components, new.log_weights, new.select = self.components, self.log_weights, self.select
        super(SharedMixture, new).__init__(torch.Size(batch_shape), self.event_shape, False)
        return new

    @property
    def support(self) -> Any:
        """The components' support."""
        return self.components.support

    @property
    def mean(self) -> Tensor:
        """Mean, ``[*batch, latent]``, if the components have one."""
        return (self.log_weights.exp() @ self.components.mean).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, ``[*batch, latent]``, if the components have one."""
        weights, loc = self.log_weights.exp(), self.components.mean
        within = self.components.variance
        return (weights @ (within + (loc - weights @ loc).square())).expand(self._extended_shape())

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, ``[*batch]``."""
        each = value.unsqueeze(-2).expand(*value.shape[:-1], *self.components.batch_shape, value.shape[-1])
        log_density = self.components.log_prob(each)
        log_prob = torch.logsumexp(self.log_weights + log_density, -1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws without gradients, ``[*sample_shape, *batch, latent]``."""
        shape = self._extended_shape(sample_shape)
        below = self.log_weights.exp().cumsum(-1)[..., :-1]
        uniform = torch.rand((math.prod(shape[:-1]), 1), dtype=below.dtype, device=below.device)
        draws: Tensor = self.select((uniform > below).sum(-1)).sample()
        return draws.reshape(shape)
