"""Reweighted wake-sleep."""

import inspect
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from ppl_vae._checks import check_at_least
from ppl_vae.infer.bounds import log_mean_exp
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.gradients import (
    scale_gradients,
    weighted_sum,
    with_gradient_of,
)
from ppl_vae.infer.log_weights import per_datum_log_prob
from ppl_vae.infer.running import Program, latent_sites
from ppl_vae.infer.scoring import Scores


class WakeSleep(Estimator):
    r"""Reweighted wake-sleep: the model climbs the IWAE's bound, the guide learns from weighted draws.

    Wake-phi raises :math:`\sum_k \bar w_k \log q(z_k \mid x)` with self-normalised weights per datum: the
    forward KL on the data. Sleep-phi raises :math:`\log q(z \mid x)` on pairs that the model itself draws.
    Draws need no reparameterisation. The value is the IWAE's bound.

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, 2015), arXiv:1406.2751; Revisiting Reweighted Wake-Sleep
        (Le et al., 2019), arXiv:1805.10469; ``dreg``: Tucker et al. (2019), arXiv:1810.04152

    Args:
        num_particles: K, the number of draws per datum, at least 2 for wake-phi.
        sleep: the share of sleep-phi in the guide's gradient, in [0, 1]; the rest is wake-phi.
        dreg: estimate wake-phi by the doubly reparameterised gradient; draws then need a gradient.

    Raises:
        ValueError: if ``sleep`` is not in [0, 1], or 1 with ``dreg``. On a run, for sleep-phi, if the
            model can't be called as ``model(None, size=n)``; for a guide whose
            gradients go through the model, such as ``LadderGuide``, so that its phases would train it.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> x = model(None, size=100)
        >>> run = fit(model, guide, x, elbo=WakeSleep(5, sleep=0.5), epochs=1, progress=False)
        >>> len(run.history)
        1
    """

    def __init__(self, num_particles: int = 5, *, sleep: float = 0.0, dreg: bool = False) -> None:
        super().__init__(num_particles)
        if not 0 <= check_at_least("sleep", sleep) <= 1:
            raise ValueError(f"sleep: expected a share in [0, 1], got {sleep!r}")
        if num_particles < 2 and sleep < 1:
            raise ValueError(f"num_particles: expected at least 2 for wake-phi, got {num_particles}")
        if dreg and sleep == 1:
            raise ValueError("dreg: expected False without wake-phi (sleep=1), got True")
        self.sleep = sleep
        self.dreg = dreg
        self.gradient = "path" if dreg else "score"
        self.weighs_draws = dreg

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the IWAE's bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        shares = log_weights.detach().softmax(0)
        if self.dreg:
            scale_gradients(scores, (1 - self.sleep) * (1 - shares))
            surrogate = log_weights
        else:
            surrogate = scores.joint() + (1 - self.sleep) * sum(scores.guide.values())
        return with_gradient_of(log_mean_exp(log_weights), weighted_sum(shares, surrogate))

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return the loss, a scalar, whose gradient is the estimator's."""
        program = inspect.unwrap(guide)
        for part in program.modules() if isinstance(program, nn.Module) else ():
            if "model" in vars(part) and getattr(part, "differentiable", True):
                raise ValueError(
                    f"guide: expected one whose gradients leave the model alone, got {type(part).__name__}, "
                    "through which the guide's phases would train it; SemiAmortizedGuide takes "
                    "differentiable=False"
                )
        loss = super().differentiable_loss(model, guide, *batch)
        if not self.sleep or not torch.is_grad_enabled():
            return loss
        log_q = self.sleep * self._asleep(model, guide, *batch)
        return loss - (log_q - log_q.detach())

    def _asleep(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return log q of what the model draws, summed over as many draws as the batch has data."""
        program = inspect.unwrap(model)
        signature = inspect.signature(program.forward if isinstance(program, nn.Module) else program)
        try:
            signature.bind(None, *batch[1:], size=len(batch[0]))
        except TypeError:
            raise ValueError(
                "model: expected a program that can be called as `model(None, size=n)`, since sleep-phi "
                f"draws from it, got {signature}; set sleep=0"
            ) from None
        with torch.no_grad():
            dream = poutine.trace(model).get_trace(None, *batch[1:], size=len(batch[0]))
        x: Any = dream.nodes["x" if "x" in dream.nodes else "_RETURN"]["value"]
        if not isinstance(x, Tensor):
            raise ValueError(
                f"model: expected `model(None, size=n)` to draw a site 'x' or to return the data, got {x!r}; "
                "set sleep=0"
            )
        run = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(x.detach(), *batch[1:])
        sites = latent_sites(run)  # whose scale is N / B, as that of the loss, in a subsampling plate
        log_q = [(site["scale"] * per_datum_log_prob(name, site)).sum() for name, site in sites.items()]
        return torch.stack(log_q).sum()
