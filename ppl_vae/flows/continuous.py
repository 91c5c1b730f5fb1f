"""The continuous flow."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae.flows._transform import Part
from ppl_vae.flows.flow import Flow


class Continuous(Flow):
    r"""The flow along :math:`\dot z = \sum_k u_k \tanh(w_k^\top z + b_k(t, c))`, from time 0 to 1.

    A velocity of one hidden layer has a divergence in closed form, so that no trace is estimated; for a
    velocity by any network see the paper. The equation is solved by ``steps`` steps of the classic
    Runge-Kutta method: log q and the inverse are those of the exact flow up to an error of order
    ``steps`` to the power -4. Starts near the identity.

    References:
        Neural Ordinary Differential Equations (Chen et al., 2018), arXiv:1806.07366
        FFJORD (Grathwohl et al., 2019), arXiv:1810.01367

    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        hidden: the number of hidden units.
        steps: the number of steps of the solver, with four evaluations each.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> z = Continuous(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self, latent_dim: int, context_dim: int | None = None, *, hidden: int = 64, steps: int = 8
    ) -> None:
        super().__init__(latent_dim, context_dim, 1)
        self.hidden = check_positive_int("hidden", hidden)
        self.steps = check_positive_int("steps", steps)
        self.inside = nn.Linear(latent_dim, hidden)
        self.time = nn.Parameter(torch.randn(hidden))
        self.outside = nn.Linear(hidden, latent_dim)
        self.given = nn.Linear(context_dim, hidden, bias=False) if context_dim else None
        with torch.no_grad():
            self.outside.weight.mul_(0.05)
            self.outside.bias.zero_()

    def parts(self, context: Tensor | None) -> list["_Solver"]:
        """Return the solver as one part."""
        bias = self.inside.bias if self.given is None else self.inside.bias + self.given(context)
        into, out = self.inside.weight, self.outside.weight
        return [_Solver(self.steps, into, bias, self.time, out, self.outside.bias)]


class _Solver(Part):
    def __init__(
        self, steps: int, into: Tensor, bias: Tensor, time: Tensor, out: Tensor, drift: Tensor
    ) -> None:
        super().__init__()
        self.steps, self.into, self.bias, self.time, self.out, self.drift = (
            steps,
            into,
            bias,
            time,
            out,
            drift,
        )
        self.diagonal = (into * out.mT).sum(-1)

    def _velocity(self, t: float, z: Tensor) -> tuple[Tensor, Tensor]:
        h = (nn.functional.linear(z, self.into) + (self.bias + t * self.time)).tanh()
        return nn.functional.linear(h, self.out, self.drift), (1 - h.square()) @ self.diagonal

    def _solve(self, z: Tensor, start: float, step: float) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(self.steps):
            t = start + i * step
            v1, d1 = self._velocity(t, z)
            v2, d2 = self._velocity(t + step / 2, z + step / 2 * v1)
            v3, d3 = self._velocity(t + step / 2, z + step / 2 * v2)
            v4, d4 = self._velocity(t + step, z + step * v3)
            z = z + step / 6 * (v1 + 2 * (v2 + v3) + v4)
            yield z, step / 6 * (d1 + 2 * (d2 + d3) + d4)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and log |det J|."""
        states, ladj = zip(*self._solve(x, 0.0, 1 / self.steps), strict=True)
        return states[-1], torch.stack(ladj).sum(0)

    def _inverse(self, y: Tensor) -> Tensor:
        return list(self._solve(y, 1.0, -1 / self.steps))[-1][0]
