"""The guide of annealed importance sampling."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_number
from ppl_vae.guides._moved_draws import MovingGuide, log_normal
from ppl_vae.guides.model_based import gradient_of, log_joint
from ppl_vae.infer.running import Program as AnyProgram


class AnnealedGuide(MovingGuide):
    r"""A guide whose draws are annealed from its start to the model's posterior.

    This is differentiable annealed importance sampling. From a guide's draw, K steps follow
    :math:`\beta_k \log p(x, z) + (1 - \beta_k) \log q(z \mid x)`, with :math:`\beta_K = 1`: half a step along
    the momentum v, a step of v along the gradient, to :math:`\hat v`, half a step along that; then the
    momentum is refreshed in part: :math:`\gamma \hat v + \sqrt{1 - \gamma^2}\, \epsilon`. In place of
    log q(z | x) stands

    .. math:: \log q(z_0 \mid x) + \sum_{k=1}^K \log N(v_{k-1}; 0, I) - \log N(\hat v_k; 0, I),

    so that the weights' mean is p(x): every bound made of them is one on log p(x), tighter with more steps.
    A draw costs K gradients of the model, and a datum four more. The model is a reference, as in
    ``SemiAmortizedGuide``; what the guide can't score, and how long its steps are, is as in
    ``HamiltonianGuide``.

    References:
        Differentiable Annealed Importance Sampling and the Perils of Gradient Noise (Zhang et al., 2021),
        arXiv:2107.10211

    Args:
        guide: the guide to start from, whose ``posterior`` is reparameterised and scores any z.
        model: the model that both are trained with, of one latent site ``z``.
        steps: K.
        step_size: the start of the step size, in standard deviations of the guide to start from, which is
            trained, one for each dimension.
        persistence: :math:`\gamma`, from 0 to 1.

    Attributes:
        log_step_size: ``[latent]``.
        log_increments: :math:`\beta_k - \beta_{k-1}` up to a factor, as logarithms, ``[steps]``; 0 at the
            start.

    Raises:
        TypeError: if ``guide`` has no ``posterior``, or an argument is no number.
        ValueError: if ``steps`` or ``step_size`` is not above 0, or ``persistence`` not from 0 to 1.

    Example:
        >>> import torch
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model = LinearGaussian(2, 5)
        >>> guide = AnnealedGuide(MeanFieldGuide(MLP(5), 2), model, steps=3)
        >>> guide(torch.zeros(4, 5)).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        guide: nn.Module,
        model: AnyProgram,
        *,
        steps: int = 5,
        step_size: float = 0.1,
        persistence: float = 0.9,
    ) -> None:
        super().__init__(guide, model, steps, step_size)
        if not 0 <= check_number("persistence", persistence) <= 1:
            raise ValueError(f"persistence: expected a number from 0 to 1, got {persistence!r}")
        self.persistence = float(persistence)
        self.log_increments = nn.Parameter(torch.zeros(self.steps))

    def _move(self, batch: tuple[Tensor, ...], size: Tensor, start: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        log_q = start.log_prob(z)
        # the last one is 1, whatever rounding does to the sum
        betas = [*self.log_increments.softmax(0).cumsum(0)[:-1].unbind(), 1.0]
        momentum = torch.randn_like(z)
        for k, beta in enumerate(betas, 1):

            def log_density(z: Tensor, beta: Any = beta) -> Tensor:
                joint = beta * log_joint(self.model, z, batch)
                return joint if isinstance(beta, float) else joint + (1 - beta) * start.log_prob(z)

            log_q = log_q + log_normal(momentum)
            z = z + size / 2 * momentum
            momentum = momentum + size * gradient_of(log_density, z)
            z = z + size / 2 * momentum
            log_q = log_q - log_normal(momentum)
            if k < self.steps:
                noise = torch.randn_like(z)
                momentum = self.persistence * momentum + math.sqrt(1 - self.persistence**2) * noise
        return z, log_q
