"""A distribution over vectors as one over arrays of another shape."""

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor


class Reshaped(dist.TransformedDistribution):
    """A distribution over vectors whose event has another shape; mean and variance are those, reshaped.

    Args:
        base_distribution: event shape ``[d]``.
        event_shape: the shape of the event, of as many numbers.

    Example:
        >>> normal = dist.Normal(torch.zeros(5, 6), 1.0).to_event(1)
        >>> Reshaped.to(normal, (1, 2, 3)).mean.shape
        torch.Size([5, 1, 2, 3])
    """

    @classmethod
    def to(cls, base: dist.TorchDistribution, event_shape: tuple[int, ...]) -> "Reshaped":
        """Return ``base`` with this event shape."""
        return cls(base, [ReshapeTransform(base.event_shape, torch.Size(event_shape))])

    @property
    def mean(self) -> Tensor:
        """The mean, ``[*batch, *event]``."""
        return self.base_dist.mean.reshape(self.shape())

    @property
    def variance(self) -> Tensor:
        """The variance of each entry, ``[*batch, *event]``."""
        return self.base_dist.variance.reshape(self.shape())
