"""Monotonic maps of the real line without a closed inverse."""

import torch
from torch import Tensor
from torch.distributions import Transform, constraints


class Bisected(Transform):
    """An increasing map that bisection inverts: a subclass gives ``call_and_ladj`` and ``bracket``.

    The inverse has first and second derivatives, those of the implicit function; third ones are wrong.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the logarithm of its derivative."""
        raise NotImplementedError

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return numbers between which the inverse of ``y`` lies."""
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the derivative."""
        return self.call_and_ladj(x)[1]

    def _inverse(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            low, high = self.bracket(y)
            for _ in range(60):
                middle = (low + high) / 2
                below = self._call(middle) < y
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            x = (low + high) / 2
            slope = self.call_and_ladj(x)[1].clamp(min=-50).exp()
        if not torch.is_grad_enabled():
            return x
        for _ in range(2):  # n steps of Newton's method with a constant slope give n derivatives
            found = self._call(x)
            x = x - ((found - found.detach()) - (y - y.detach())) / slope  # the value is kept
        return x
