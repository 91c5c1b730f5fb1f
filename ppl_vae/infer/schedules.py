"""Schedules: settings of an estimator that change from step to step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ppl_vae._checks import check_at_least, check_positive_int

Schedule = Callable[[Tensor], Tensor]  # of the number of steps taken, a scalar tensor


@dataclass(frozen=True)
class LinearWarmup:
    """From ``start`` to ``end`` in a straight line over the first ``steps`` gradient steps, then ``end``.

    References:
        Generating Sentences from a Continuous Space (Bowman et al., 2016), arXiv:1511.06349

    Args:
        steps: the number of gradient steps, not epochs.
        start: the value at the first step, at least 0.
        end: the value from step ``steps`` on, at least 0.

    Raises:
        TypeError, ValueError: if ``steps`` is not a whole number above 0, or a value is below 0.

    Example:
        >>> import torch
        >>> [float(LinearWarmup(10)(torch.tensor(step))) for step in (0, 5, 10, 20)]
        [0.0, 0.5, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("steps", self.steps)
        check_at_least("start", self.start)
        check_at_least("end", self.end)

    def __call__(self, step: Tensor) -> Tensor:
        """Return the value at a step, a scalar tensor."""
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1.0)


@dataclass(frozen=True)
class CyclicalWarmup:
    """A linear warm-up that starts anew every ``period`` steps and takes ``ramp`` of the period.

    References:
        Cyclical Annealing Schedule (Fu et al., 2019), arXiv:1903.10145

    Args:
        period: gradient steps per cycle.
        ramp: the share of a cycle in which the value grows, in (0, 1].
        start: the value at the start of a cycle, at least 0.
        end: the value at the end of the ramp, at least 0.

    Raises:
        TypeError, ValueError: if ``period`` is not a whole number above 0, ``ramp`` not in (0, 1], or a value
            is below 0.

    Example:
        >>> import torch
        >>> [float(CyclicalWarmup(10)(torch.tensor(step))) for step in (0, 4, 5, 9, 10)]
        [0.0, 0.8, 1.0, 1.0, 0.0]
    """

    period: int
    ramp: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_positive_int("period", self.period)
        check_at_least("start", self.start)
        check_at_least("end", self.end)
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp: expected a share of the period in (0, 1], got {self.ramp!r}")

    def __call__(self, step: Tensor) -> Tensor:
        """Return the value at a step, a scalar tensor."""
        share = (step % self.period) / (self.period * self.ramp)
        return self.start + (self.end - self.start) * share.clamp(max=1.0)
