"""Guides whose draws are moved along the model's gradient."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae._checks import check_positive, check_positive_int
from ppl_vae.guides.model_based import ModelBasedGuide, gradient_of, log_joint
from ppl_vae.infer.running import Program as AnyProgram

Move = Callable[[Any, Tensor], tuple[Tensor, Tensor]]

REFERENCES = 4  # draws that the step sizes are found with


class MovingGuide(ModelBasedGuide):
    """A guide that moves the draws of the guide that it starts from; a subclass says where in ``_move``.

    Args:
        guide: the guide to start from, whose ``posterior`` is reparameterised.
        model: the model that both are trained with, of one latent site ``z``.
        steps: the number of steps.
        step_size: the start of the step size in standard deviations of the guide to start from, which is
            trained, one for each dimension.

    Raises:
        TypeError: if ``guide`` has no ``posterior``, or an argument is no number.
        ValueError: if ``steps`` or ``step_size`` is not above 0.
    """

    def __init__(self, guide: nn.Module, model: AnyProgram, steps: int, step_size: float) -> None:
        super().__init__(guide, model)
        self.steps = check_positive_int("steps", steps)
        self.step_size = check_positive("step_size", step_size)
        self.log_step_size = nn.Parameter(torch.full((_latent_dim_of(guide),), math.log(step_size)))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x), which scores its own last draws alone: batch shape ``[n]``, event ``[latent]``."""
        start, batch = self.start(x, y)
        size = self.sizes(start, batch)  # draws of the start, which are to come before those that it scores
        return _MovedDraws(start, partial(self._move, batch, size), type(self).__name__)

    def sizes(self, start: Any, batch: tuple[Tensor, ...]) -> Tensor:
        r"""Return step sizes for each datum and dimension, ``[n, latent]``.

        These are :math:`\sigma / \sqrt{1 / s^2 + 4 F}`, with the start's standard deviations
        :math:`\sigma`, the trained sizes s, and F, the root mean square of :math:`|\sigma \nabla \log
        p(x, z)|` over a few draws of the start, independent of those that are moved. For a Gaussian
        posterior :math:`F^2` is at least the mean of :math:`|H \epsilon|^2`, with its precision H in units
        of :math:`\sigma` and a standard normal :math:`\epsilon`, so that F is about its largest eigenvalue or
        more; steps whose square is below 4 divided by that are stable.
        """
        z = start.rsample((REFERENCES,))
        try:
            scale = start.stddev
        except NotImplementedError:  # of a flow, say
            scale = z.std(0)
        force = gradient_of(lambda z: log_joint(self.model, z, batch), z)
        bend = (scale * force).square().sum(-1).mean(0).sqrt().unsqueeze(-1)
        size: Tensor = scale * ((-2 * self.log_step_size).exp() + 4 * bend).rsqrt()
        return size

    def _move(self, batch: tuple[Tensor, ...], size: Tensor, start: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return where draws of ``start`` go, and what they score, ``[*particles, n]``."""
        raise NotImplementedError


class _MovedDraws(dist.TorchDistribution):
    """Draws of a distribution, moved: each with the logarithm of what stands in place of its density.

    Args:
        start: what is drawn from first.
        move: gives, for ``start`` and its draws ``[*shape, event]``, where they go and what they score,
            ``[*shape]``.
        guide: the name of the guide, for errors.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, start: Any, move: Move, guide: str) -> None:
        super().__init__(start.batch_shape, start.event_shape, validate_args=False)
        self.start = start
        self.move = move
        self.guide = guide
        self._drawn: tuple[Tensor, Tensor] | None = None

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_MovedDraws":
        """Return the distribution of independent draws for each of a larger batch."""
        return _MovedDraws(self.start.expand(batch_shape), self.move, self.guide)

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
            raise NotImplementedError(
                f"guide: a {self.guide} scores its own last draws alone, by the path that they took, and no "
                "other z, as WakeSleep, STL_ELBO, DReG and AnnealedGuide need; use KL_ELBO or IWAE"
            )
        return self._drawn[1]


def log_normal(value: Tensor) -> Tensor:
    """Return log N(value; 0, I) over the last dimension."""
    return -0.5 * (value.square() + math.log(2 * math.pi)).sum(-1)


def _latent_dim_of(guide: nn.Module) -> int:
    size = getattr(guide, "latent_dim", None)
    if size is None:
        size = _latent_dim_of(guide.guide) if isinstance(guide, ModelBasedGuide) else None
    if size is None:
        raise TypeError(f"guide: expected one with a `latent_dim`, got {type(guide).__name__}")
    return int(size)
