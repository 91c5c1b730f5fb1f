"""Labels of which some are missing."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppl_vae._one_hot import one_hot


class SomeLabels(dist.TorchDistribution):
    """Labels of which some are missing, -1: a missing one has probability 1, whatever it would be.

    Args:
        log_probs: log p(y) of each class, normalised, ``[*batch, num_classes]``.

    Example:
        >>> labels = SomeLabels(torch.tensor([0.5, 0.3, 0.2]).log())
        >>> labels.log_prob(torch.tensor([0, 2, -1])).exp()
        tensor([0.5000, 0.2000, 1.0000])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, log_probs: Tensor, validate_args: bool | None = None) -> None:
        self.log_probs = log_probs
        super().__init__(log_probs.shape[:-1], torch.Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Whole numbers from -1."""
        return constraints.integer_interval(-1, self.log_probs.shape[-1] - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SomeLabels":
        """Return the distribution of another batch shape."""
        log_probs = self.log_probs.expand((*batch_shape, self.log_probs.shape[-1]))
        return SomeLabels(log_probs, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(y), 0 where y is missing."""
        if self._validate_args:
            self._validate_sample(value)
        chosen = one_hot(value, self.log_probs.shape[-1])
        return torch.where(chosen, self.log_probs, 0.0).sum(-1)
