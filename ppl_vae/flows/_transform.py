"""The map that a flow returns: its parts one after the other, scored where they are run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints


class Part(Transform):
    """A part of a flow: a subclass gives ``call_and_ladj``, the output with log |det J|."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the logarithm of the Jacobian's absolute determinant."""
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx|."""
        return self.call_and_ladj(x)[1]


class FlowTransform(Transform):
    """Parts one after the other; the last input, its output and log |det J| are kept.

    So the density of a draw costs nothing beyond the draw. What was kept without gradients does not serve
    where gradients are wanted.

    Args:
        parts: transforms with ``call_and_ladj``.
        name: name of the flow, for errors.
        invertible: whether the parts have inverses.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, parts: Sequence[Any], name: str, invertible: bool = True) -> None:
        super().__init__(cache_size=1)
        self.parts = parts
        self.name = name
        self.invertible = invertible
        self._kept: tuple[Any, Any, Any, bool] = (None, None, None, False)

    def __repr__(self) -> str:
        return f"{self.name}({len(self.parts)} parts)"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the flow's output."""
        if x is self._kept[0] and self._serves():
            return self._y()
        y, ladj = self._run(x)
        self._kept = (x, y, ladj, torch.is_grad_enabled())
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        if y is self._kept[1] and self._serves():
            known: Tensor = self._kept[0]
            return known
        if not self.invertible:
            raise ValueError(
                f"{self.name}: expected the last value that this distribution drew (with gradients, where "
                "they are wanted of its density), since the flow's inverse is not known; use Trace_ELBO, "
                "KL_ELBO, IWAE or another estimator that scores draws as they are made (STL_ELBO, DReG, "
                "stick_the_landing and WakeSleep score them again), or a flow with an inverse, such as "
                "InverseAutoregressive or AffineCoupling"
            )
        x, ladj = y, torch.zeros_like(y[..., 0])
        for part in reversed(self.parts):
            z = x
            x = part._inverse(z)  # `inv` would look into the part's own cache
            ladj = ladj + part.log_abs_det_jacobian(x, z)
        self._kept = (x, y, ladj, torch.is_grad_enabled())
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |det dy/dx|, ``[*batch]``."""
        if x is self._kept[0] and y is self._kept[1] and self._serves():
            known: Tensor = self._kept[2]
            return known
        return self._run(x)[1]

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj: Any = 0.0
        for part in self.parts:
            if part._cache_size:  # one of Pyro's, which would return what it kept without gradients
                part._cached_x_y = None, None
            x, one = part.call_and_ladj(x)
            ladj = ladj + one
        return x, ladj

    def _serves(self) -> bool:
        return self._kept[3] or not torch.is_grad_enabled()

    def _y(self) -> Tensor:
        y: Tensor = self._kept[1]
        return y
