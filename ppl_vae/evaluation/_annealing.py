"""Annealed importance sampling of a batch: chains from a start to the posterior, and back."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_choice, check_number, check_positive_int
from ppl_vae.evaluation._hmc import MultiplicativeAdaptation, Traced, gradient, transition
from ppl_vae.evaluation._latents import Latents
from ppl_vae.evaluation._weights import estimate_of, log_mean_weight
from ppl_vae.evaluation.evaluate import Estimate, pass_size
from ppl_vae.infer.log_weights import Terms
from ppl_vae.infer.running import Program

Schedule = Literal["sigmoidal", "linear"]
Start = Literal["prior", "guide"]

SETTLING = 40  # transitions at the start that find the first step size
JITTER = 0.2
CPU_ROWS = 1024  # a chain for a datum each: more do not fit the processor's caches


class Annealing:
    r"""The densities :math:`f_\beta(u) = f_0(u)^{1 - \beta} \, p(x, u)^\beta` of a batch's latents u.

    :math:`f_0` is the prior or the guide. Each transition is Hamiltonian Monte Carlo with the step size of
    its temperature and datum, times a draw of U(0.8, 1.2), lest trajectories go round in circles. The step
    sizes are found by chains of their own, and frozen: the weights are those of chains that nothing adapts,
    forward and reverse.

    Args:
        latents: of the model for the batch.
        guide: to start from; None for the prior.
        betas: from 0 to 1, ``[T + 1]``.
        leapfrog: steps of a transition.
        target: the acceptance that step sizes aim at.
        num_chains: C.
        tick: called at each temperature of each run.

    Raises:
        ValueError: if the guide's density is another at each run.
    """

    def __init__(
        self,
        latents: Latents,
        guide: Program | None,
        *,
        betas: Tensor,
        leapfrog: int,
        target: float,
        num_chains: int,
        tick: Callable[[], Any],
    ) -> None:
        self.latents, self.guide, self.num_chains = latents, guide, num_chains
        self.betas: list[float] = betas.tolist()
        self.leapfrog, self.target, self.tick = leapfrog, target, tick
        self._traced: dict[int, Traced] = {}
        if guide is not None:
            _check_same_density(latents, guide)
        self.step_sizes = self._adapt()

    def start(self, num_chains: int) -> Tensor:
        """Draw u from the start of the path, ``[num_chains, n, size]``."""
        if self.guide is None:
            return self.latents.draw_prior(num_chains)
        return self.latents.draw_guide(self.guide, num_chains)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the log weights of new chains, ``[C, n]``, and the mean acceptance, ``[n]``."""
        point = self._point(self.start(self.num_chains))
        log_weights = point[3].new_zeros(point[3].shape, dtype=torch.float64)
        accepted = log_weights[0].clone()
        for t in self._temperatures():
            log_weights += (self.betas[t] - self.betas[t - 1]) * _difference(point)
            if t < len(self.betas) - 1:
                point, accept = self._move(point, t)
                accepted += accept.mean(0)
        return log_weights, accepted / (len(self.betas) - 2 or math.nan)

    def reverse(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log weights ``[C, n]`` of chains back from exact posterior draws u, ``[C, n, size]``."""
        point = self._point(u)
        log_weights = point[3].new_zeros(point[3].shape, dtype=torch.float64)
        accepted = log_weights[0].clone()
        for t in self._temperatures(reverse=True):
            if t < len(self.betas) - 1:
                point, accept = self._move(point, t)
                accepted += accept.mean(0)
            log_weights += (self.betas[t] - self.betas[t - 1]) * _difference(point)
        return log_weights, accepted / (len(self.betas) - 2 or math.nan)

    def _temperatures(self, *, reverse: bool = False) -> Iterator[int]:
        numbers = range(1, len(self.betas))
        for t in reversed(numbers) if reverse else numbers:
            yield t
            self.tick()

    def _adapt(self) -> Tensor:
        """Return step sizes for each temperature and datum, ``[T + 1, n]``."""
        chains = settling_chains(self.num_chains)
        point = self._point(self.start(chains))
        temperatures = len(self.betas) - 1
        adaptation = MultiplicativeAdaptation(point[0].new_full((1, self.latents.n), 0.1), self.target, 1.1)
        sizes = point[0].new_ones(temperatures + 1, self.latents.n)
        for _ in range(SETTLING):
            point, accept = self._move(point, 0, adaptation.step_size)
            adaptation.update(accept)
        # few temperatures are far apart
        adaptation.rate = max(1.02, min(1.2, math.exp(20 / temperatures)))
        sizes[0] = adaptation.step_size[0]
        for t in self._temperatures():
            if t < temperatures:
                point, accept = self._move(point, t, adaptation.step_size)
                adaptation.update(accept)
            sizes[t] = adaptation.step_size[0]
        return sizes

    def _move(
        self, point: list[Tensor], t: int, step_size: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Take a transition that leaves the density at temperature t as it is."""
        beta = self.betas[t]
        parts = self._parts(point[0])

        def evaluate(u: Tensor) -> list[Tensor]:
            return _at(beta, parts(u))

        sizes = self.step_sizes[t : t + 1] if step_size is None else step_size
        jitter = torch.empty_like(point[3]).uniform_(1 - JITTER, 1 + JITTER)
        start = [point[0], *_at(beta, point[3:])]
        return transition(evaluate, start, sizes * jitter, self.leapfrog)

    def _point(self, u: Tensor) -> list[Tensor]:
        """Return u with what ``_at`` gives there, at the start's temperature."""
        return [u, *_at(0.0, self._parts(u)(u))]

    def _parts(self, u: Tensor) -> Traced:
        if len(u) not in self._traced:
            self._traced[len(u)] = Traced(self._evaluate, u)
        return self._traced[len(u)]

    def _evaluate(self, u: Tensor) -> list[Tensor]:
        return parts(self.latents, self.guide, u)


def _check_same_density(latents: Latents, guide: Program) -> None:
    u = latents.draw_guide(guide, 1)
    first, second = latents.log_guide(guide, u), latents.log_guide(guide, u)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(
            "guide: expected one with the same density at each run, for start='guide', got one with noise of "
            "its own beside its sites; use start='prior'"
        )


def parts(latents: Latents, guide: Program | None, u: Tensor) -> list[Tensor]:
    """Return log f_0 and log p(x, u) - log f_0, ``[C, n]``, each with its gradient, ``[C, n, size]``."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        base, difference = latents.log_parts(u)
        if guide is not None:
            log_joint = base + difference
            base = latents.log_guide(guide, u)
            difference = log_joint - base
        base_grad = gradient(base, u, retain_graph=True)
        grad = gradient(difference, u)
    return [base.detach(), base_grad, difference.detach(), grad]


def _at(beta: float, parts: Any) -> list[Tensor]:
    """Return log f_beta and its gradient, then the parts."""
    base, base_grad, difference, grad = parts
    if beta == 0:  # whatever the difference is
        return [base, base_grad, *parts]
    return [base + beta * difference, base_grad + beta * grad, *parts]


def _difference(point: list[Tensor]) -> Tensor:
    return point[5].double()


# -- what its callers share ----------------------------------------------------------------------------------


def settling_chains(num_chains: int) -> int:
    """Return how many chains find the step sizes."""
    return max(1, num_chains // 4)


def inverse_temperatures(num_temperatures: int, schedule: Schedule) -> Tensor:
    """Return beta from 0 to 1, ``[num_temperatures + 1]``, float64.

    ``"sigmoidal"`` has more of them near both ends: the sigmoid between -4 and 4, scaled.
    """
    check_positive_int("num_temperatures", num_temperatures)
    check_choice("schedule", schedule, ("sigmoidal", "linear"))
    betas = torch.linspace(0.0, 1.0, num_temperatures + 1, dtype=torch.float64)
    if schedule == "sigmoidal":
        betas = torch.sigmoid(4 * (2 * betas - 1))
        betas = (betas - betas[0]) / (betas[-1] - betas[0])
    return betas


def check_settings(
    guide: Program | None, num_chains: int, leapfrog: int, start: str, target_acceptance: float
) -> None:
    """Raise if a setting is wrong."""
    check_positive_int("num_chains", num_chains)
    check_positive_int("leapfrog", leapfrog)
    check_choice("start", start, ("prior", "guide"))
    if start == "guide" and guide is None:
        raise ValueError("guide: expected a guide for start='guide', got None")
    if not 0 < check_number("target_acceptance", target_acceptance) < 1:
        raise ValueError(f"target_acceptance: expected a number between 0 and 1, got {target_acceptance!r}")


def data_per_pass(
    model: Program, guide: Program | None, batch: tuple[Tensor, ...], num_chains: int, memory: float
) -> int:
    """Return how many data a pass may have to stay within ``memory`` bytes."""

    def run(n: int, chains: int) -> Terms:
        latents = Latents(model, tuple(t[:n] for t in batch))
        found = parts(latents, guide, latents.draw_prior(chains))
        return Terms(found[0], {})

    rows = CPU_ROWS if batch[0].device.type == "cpu" else 2**31
    size, chains = pass_size(memory, num_chains, max(rows, num_chains), run)
    return size if chains == num_chains else 1


def bound_of(log_weights: Tensor, *, reverse: bool = False) -> Estimate:
    """Return the log mean weight w of each datum, from log weights ``[C, n]``; or minus that of 1 / w."""
    values, variances = log_mean_weight(-log_weights if reverse else log_weights)
    return estimate_of([-values if reverse else values], [variances], len(log_weights))
