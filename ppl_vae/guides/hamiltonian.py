"""The Hamiltonian guide."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ppl_vae._checks import check_number
from ppl_vae.guides._moved_draws import MovingGuide, log_normal
from ppl_vae.guides.model_based import gradient_of, log_joint
from ppl_vae.infer.running import Program as AnyProgram


class HamiltonianGuide(MovingGuide):
    r"""A guide whose draws take leapfrog steps on the model's log p(x, z): the Hamiltonian VAE.

    From a guide's draw :math:`z_0` and a momentum :math:`\rho_0 \sim N(0, I / \beta_0)`, K leapfrog steps
    give :math:`z_K, \rho_K`; after step k the momentum is multiplied by
    :math:`\sqrt{\beta_{k-1} / \beta_k}`, where :math:`1 / \sqrt{\beta_k}` goes quadratically to 1. In place
    of log q(z | x) stands

    .. math:: \log q(z_0 \mid x) + \log N(\sqrt{\beta_0}\, \rho_0; 0, I) - \log N(\rho_K; 0, I),

    so that the weights' mean is p(x): every bound made of them is one on log p(x). A draw costs K + 1
    gradients of the model, and a datum four more. The model is a reference, as in ``SemiAmortizedGuide``.

    Steps are as long as ``step_size`` says, in standard deviations of the guide to start from, or shorter
    where the model's gradient at four other draws of it is large, so that they do not diverge.

    The guide scores its own draws alone, by the path that they took. ``STL_ELBO``, ``DReG`` and
    ``WakeSleep`` score other ones, ``BetaTC_ELBO`` and ``DIP_ELBO`` need marginals: they raise. Estimators
    for discrete latents (``VIMCO``, ``ScoreFunctionELBO``) take their gradient through the draws, which are
    reparameterised.

    References:
        Hamiltonian Variational Auto-Encoder (Caterini et al., 2018), arXiv:1805.11328

    Args:
        guide: the guide to start from, whose ``posterior`` is reparameterised.
        model: the model that both are trained with, of one latent site ``z``.
        steps: K.
        step_size: the start of the step size, in standard deviations of the guide to start from, which is
            trained, one for each dimension.
        tempering: the start of :math:`\beta_0`, above 0 and below 1, which is trained; None for 1.

    Attributes:
        log_step_size: ``[latent]``.
        log_tempering: :math:`\log(1 / \sqrt{\beta_0} - 1)`, ``[]``; None without tempering.

    Raises:
        TypeError: if ``guide`` has no ``posterior``, or an argument is no number.
        ValueError: if ``steps`` or ``step_size`` is not above 0, or ``tempering`` not between 0 and 1.

    Example:
        >>> import torch
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model = LinearGaussian(2, 5)
        >>> guide = HamiltonianGuide(MeanFieldGuide(MLP(5), 2), model, steps=3)
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
        tempering: float | None = None,
    ) -> None:
        super().__init__(guide, model, steps, step_size)
        if tempering is not None and not 0 < check_number("tempering", tempering) < 1:
            raise ValueError(f"tempering: expected a number between 0 and 1, or None, got {tempering!r}")
        self.tempering = tempering
        start = None if tempering is None else torch.tensor(math.log(tempering**-0.5 - 1))
        self.log_tempering = None if start is None else nn.Parameter(start)

    def _move(self, batch: tuple[Tensor, ...], size: Tensor, start: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(z)
        moved, momentum = self.leapfrog(z, noise, size, *batch)
        return moved, start.log_prob(z) + log_normal(noise) - log_normal(momentum)

    def leapfrog(self, z: Tensor, noise: Tensor, size: Tensor, *batch: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return position and momentum after all steps; the map's Jacobian determinant is 1.

        Args:
            z: where the steps start, ``[*particles, n, latent]``.
            noise: :math:`\sqrt{\beta_0}\, \rho_0`, likewise.
            size: step sizes, ``[n, latent]``, as ``sizes`` gives them.
            *batch: what the model is called with.
        """
        scales: list[Any] = [1.0] * (self.steps + 1)  # 1 / sqrt(beta_k)
        if self.log_tempering is not None:
            rise = self.log_tempering.exp()
            scales = [1 + rise * (1 - (k / self.steps) ** 2) for k in range(self.steps + 1)]

        def log_density(z: Tensor) -> Tensor:
            return log_joint(self.model, z, batch)

        momentum = noise * scales[0]
        force = gradient_of(log_density, z)
        for before, after in itertools.pairwise(scales):
            momentum = momentum + size / 2 * force
            z = z + size * momentum
            force = gradient_of(log_density, z)
            momentum = (momentum + size / 2 * force) * (after / before)
        return z, momentum
