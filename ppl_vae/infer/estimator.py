"""The base of the library's ELBO estimators."""

import contextlib
from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppl_vae._checks import check_at_least, check_positive_int
from ppl_vae.infer.log_weights import Terms
from ppl_vae.infer.running import Program
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Gradient, Scores, check_apart, check_baseline, check_reparameterized, score


class Estimator(ELBO):
    """An estimator made of per-datum log weights; a ``pyro.infer.ELBO`` for ``pyro.infer.SVI`` too.

    All draws are made in one vectorised pass. The loss is the negative objective, summed over the
    batch and multiplied by N / B in a subsampling plate, outside any logarithm.

    A subclass gives ``objective``: its value and its gradient are the estimator.

    Args:
        num_particles: K, the number of draws per datum.
        kl_weight: multiplies log q(z | x) - log p(z) of each latent site: a number from 0, or a function of
            the number of gradient steps taken, such as ``LinearWarmup``. A site that the programs scale
            with ``poutine.scale``, in the model, the guide or both, has that weight in addition.

    Attributes:
        step: the number of gradients taken, a scalar tensor.
        terms: the parts of the true ELBO at the last call, ``[num_particles, n]``; None before.

    Raises:
        TypeError, ValueError: if ``num_particles`` is not a whole number above 0 or a weight below 0; on a
            run, if ``objective`` returns something else than a value per datum.

    Example:
        One of one's own, the median of the log weights in the place of their mean:

        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.infer import Estimator
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> class Median(Estimator):
        ...     def objective(self, scores, kl_weight):
        ...         return scores.log_weights(kl_weight).median(0).values
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> loss = Median(9).loss_and_grads(model, guide, model(None, size=10).detach())
    """

    gradient: Gradient = "full"  # which way gradients reach the guide
    score_function = False  # whether sites that are not reparameterised have the score function
    weighs_draws = False  # whether the gradient through each draw has a weight of its own

    def __init__(self, num_particles: int = 1, *, kl_weight: float | Schedule = 1.0) -> None:
        super().__init__(
            num_particles=check_positive_int("num_particles", num_particles), max_plate_nesting=1
        )
        self.kl_weight = kl_weight if callable(kl_weight) else check_at_least("kl_weight", kl_weight)
        self.step = torch.zeros((), dtype=torch.int64)
        self.terms: Terms | None = None

    @abstractmethod
    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return what is maximised, per datum, nats, ``[n]``; its gradient is the estimator's."""

    def drawing(self) -> Messenger | None:
        """Return what makes the draws of the guide; None for the guide itself."""
        return None

    def check(self, scores: Scores) -> None:
        """Raise if the estimator is wrong for a pair; here, for draws without a gradient, or coupled data."""
        if self.score_function:
            check_baseline(scores, type(self).__name__, self.num_particles)
            return
        if self.weighs_draws:
            check_apart(scores, type(self).__name__)
        if self.gradient != "score":
            why = f"{type(self).__name__} takes its gradient through the draws"
            check_reparameterized(scores.guide_sites, why)

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return the loss, a scalar, whose gradient is the estimator's."""
        if self.step.device != batch[0].device:
            self.step = self.step.to(batch[0].device)
        scores = score(
            model,
            guide,
            *batch,
            num_particles=self.num_particles,
            gradient=self.gradient,
            drawing=self.drawing(),
            find_coupling=self.weighs_draws,
        )
        self.check(scores)
        objective = self.objective(scores, self.at_step(self.kl_weight))
        shape = getattr(objective, "shape", None)
        if shape != scores.reconstruction.shape[1:]:
            expected = f"a value per datum, {list(scores.reconstruction.shape[1:])}"
            got = type(objective).__name__ if shape is None else list(shape)
            raise ValueError(f"{type(self).__name__}.objective: expected {expected}, got {got}")
        with contextlib.suppress(RuntimeError):  # torch.func lets nothing be counted
            if torch.is_grad_enabled():
                self.step += 1
            self.terms = scores.terms()
        return -(scores.scale * objective).sum()

    def at_step(self, value: float | Schedule) -> Any:
        """Return a setting's value at the present step."""
        return value(self.step) if callable(value) else value

    def loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return the loss, a scalar without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *batch)

    def loss_and_grads(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Add the loss's gradients to ``grad`` of the parameters; return the loss, detached."""
        loss = self.differentiable_loss(model, guide, *batch)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:  # Pyro's way to run one particle at a time
        raise NotImplementedError(f"{type(self).__name__} runs all particles in one pass")
