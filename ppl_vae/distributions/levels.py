"""Values on an even grid of levels in [0, 1], grey values say, and categories over them."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class Levels(constraints.Constraint):
    r"""The values :math:`k / (\mathrm{levels} - 1)`, :math:`k = 0, \dots, \mathrm{levels} - 1`.

    A value counts as a level within a hundredth of the distance of two.

    Args:
        levels: the number of levels, from 2.

    Example:
        >>> Levels(256).check(torch.tensor([0.0, 7 / 255, 0.5, 1.0]))
        tensor([ True,  True, False,  True])
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether each value is a level."""
        steps = value * (self.levels - 1)
        whole = steps.round()
        return ((steps - whole).abs() <= 0.01) & (whole >= 0) & (whole < self.levels)

    def __repr__(self) -> str:
        return f"Levels(k / {self.levels - 1} for whole k from 0 to {self.levels - 1})"


def level_index(value: Tensor, levels: int) -> Tensor:
    """Return which level each value is, 0 to levels - 1, as floats."""
    return (value * (levels - 1)).round().clamp(0, levels - 1)


class CategoricalLevels(dist.TorchDistribution):
    r"""A categorical distribution whose outcomes are the levels :math:`k / (\mathrm{levels} - 1)` in [0, 1].

    Args:
        logits: unnormalised log-probabilities of the levels from 0 to 1, ``[*batch, levels]``.
        validate_args: as in torch.

    Example:
        >>> levels = CategoricalLevels(torch.zeros(4, 256))
        >>> levels.batch_shape, levels.mean[0]
        (torch.Size([4]), tensor(0.5000))
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def levels(self) -> int:
        """The number of levels."""
        return self.logits.shape[-1]

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Levels:
        """The levels."""
        return Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CategoricalLevels":
        """Return the distribution with a larger batch shape."""
        new = self._get_checked_instance(CategoricalLevels, _instance)
        new.logits = self.logits.expand((*batch_shape, self.levels))
        super(CategoricalLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _values(self) -> Tensor:
        steps = torch.arange(self.levels, dtype=self.logits.dtype, device=self.logits.device)
        return steps / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The mean, ``[*batch]``."""
        return self.logits.softmax(-1) @ self._values()

    @property
    def variance(self) -> Tensor:
        """The variance, ``[*batch]``."""
        deviations = self._values() - self.mean.unsqueeze(-1)
        return (self.logits.softmax(-1) * deviations.square()).sum(-1)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch]``."""
        with torch.no_grad():
            drawn = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
            return drawn.to(self.logits) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of levels."""
        if self._validate_args:
            self._validate_sample(value)
        index = level_index(value, self.levels).long().unsqueeze(-1)
        index, log_probs = torch.broadcast_tensors(index, self.logits.log_softmax(-1))
        return log_probs.gather(-1, index[..., :1]).squeeze(-1)
