"""The semi-amortised guide."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from ppl_vae._checks import check_at_least, check_positive, check_positive_int
from ppl_vae.distributions import NormalMixture, VonMisesFisher
from ppl_vae.guides.amortized import AmortizedGuide
from ppl_vae.guides.model_based import ModelBasedGuide, check_gradient, gradient_of, log_joint
from ppl_vae.infer.running import Program as AnyProgram

DECAY = (0.5, 0.9)  # of Adam's moments, for a few steps
EPSILON = 1e-16
FIRST_ORDER = NormalMixture, VonMisesFisher  # second derivatives of their draws are wrong


class SemiAmortizedGuide(ModelBasedGuide):
    r"""An amortised guide whose answer is refined by gradient steps on each datum's ELBO.

    The outputs :math:`\lambda` of the encoder's head are the parameters of :math:`q_\lambda(z)`. They take S
    steps of Adam on :math:`E_{q_\lambda}[\log p(x, z) - \log q_\lambda(z)]`, each datum apart, with fresh
    draws and a step size that falls linearly, where the paper has gradient steps with momentum, whose size
    has to be found for each model. As its draws are, :math:`q(z \mid x)` is random; any bound holds with it.
    Steps are taken in evaluation too, where they cost S gradients of the model per pass.

    The model is a reference, which ``state_dict`` leaves out; `load_run` gives the loaded guide the loaded
    model. A pair that runs with another model than the guide's raises an error.

    References:
        Semi-Amortized Variational Autoencoders (Kim et al., 2018), arXiv:1802.02550

    Args:
        guide: the amortised guide, one with a ``family``.
        model: the model that both are trained with, of one latent site ``z``.
        steps: S.
        step_size: of the first step, about the most that an output changes by in it.
        num_particles: draws per datum and step.
        kl_weight: multiplies the KL divergence in the ELBO that the steps go up. The estimator's weight does
            not reach the guide: give it here too, if it is a number; of a schedule, its end.
        differentiable: let gradients of training go through the steps, to the encoder and the model, at more
            than twice the cost; else the change is a constant. Such a gradient is biased: Adam's first steps
            are nearly signs of a gradient, whose jumps have no derivative. It needs second derivatives of
            draws, which ``NormalMixture`` and ``VonMisesFisher`` don't have.

    Raises:
        TypeError: if ``guide`` has no ``family``, or an argument is no number.
        ValueError: if ``steps``, ``step_size`` or ``num_particles`` is not above 0, or ``kl_weight`` below 0;
            or, with ``differentiable``, if draws have no second derivatives.

    Example:
        >>> import torch
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model = LinearGaussian(2, 5)
        >>> guide = SemiAmortizedGuide(MeanFieldGuide(MLP(5), 2), model, steps=3)
        >>> guide.posterior(torch.zeros(4, 5)).mean.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        guide: AmortizedGuide,
        model: AnyProgram,
        *,
        steps: int = 5,
        step_size: float = 0.1,
        num_particles: int = 4,
        kl_weight: float = 1.0,
        differentiable: bool = False,
    ) -> None:
        if not isinstance(guide, AmortizedGuide) or type(guide).family is AmortizedGuide.family:
            raise TypeError(
                f"guide: expected an amortised guide whose `family` makes a distribution of its head's "
                f"outputs, got {type(guide).__name__}"
            )
        super().__init__(guide, model)
        self.steps = check_positive_int("steps", steps)
        self.step_size = check_positive("step_size", step_size)
        self.num_particles = check_positive_int("num_particles", num_particles)
        self.kl_weight = check_at_least("kl_weight", kl_weight)
        self.differentiable = differentiable
        if differentiable and not guide.head.bias.is_meta:  # without values; a run looks again
            with torch.no_grad():
                _check_second_order(guide, guide.family(guide.head.bias.unsqueeze(0)))

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x): batch shape ``[n]``, event shape ``[latent]``, for ``x`` of ``[n, *event]``."""
        batch = (x,) if y is None else (x, y)
        refined: dist.TorchDistribution = self.guide.family(self.refine(self.guide.encode(*batch), *batch))
        return refined

    def refine(self, outputs: Tensor, *batch: Tensor) -> Tensor:
        """Return outputs of the head, ``[n, outputs]``, after the steps on each datum's ELBO."""
        if self.differentiable:
            _check_second_order(self.guide, self.guide.family(outputs))
            return self._steps(outputs, batch)
        with torch.no_grad():
            change = self._steps(outputs, batch) - outputs
        return outputs + change

    def _steps(self, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        def elbo(outputs: Tensor) -> Tensor:
            posterior = self.guide.family(outputs)
            check_gradient(posterior)
            z = posterior.rsample((self.num_particles,))
            log_p = log_joint(self.model, z, batch, prior_weight=self.kl_weight)
            return (log_p - self.kl_weight * posterior.log_prob(z)).mean(0)

        first, second = torch.zeros_like(outputs), torch.zeros_like(outputs)
        for step in range(1, self.steps + 1):
            gradient = gradient_of(elbo, outputs)
            first = torch.lerp(gradient, first, DECAY[0])
            second = torch.lerp(gradient.square(), second, DECAY[1])
            scale = (second / (1 - DECAY[1] ** step) + EPSILON).sqrt()  # its derivative at 0 is finite
            rate = self.step_size * (1 - (step - 1) / self.steps)
            outputs = outputs + rate / (1 - DECAY[0] ** step) * first / scale
        return outputs


def _check_second_order(guide: AmortizedGuide, posterior: Any) -> None:
    """Raise if second derivatives of draws are wrong, which nothing else would tell."""
    while posterior is not None:
        if isinstance(posterior, FIRST_ORDER):
            raise ValueError(
                f"guide: expected draws with second derivatives, since differentiable=True, got a "
                f"{type(guide).__name__} whose draws, of {type(posterior).__name__}, have first ones alone; "
                "give differentiable=False"
            )
        posterior = getattr(posterior, "base_dist", None)
