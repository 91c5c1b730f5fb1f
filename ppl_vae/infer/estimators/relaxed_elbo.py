"""The ELBO with the gradient of relaxed discrete latents."""

from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae._checks import check_positive
from ppl_vae.infer.divergence import site_kl
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class RelaxedELBO(Estimator):
    r"""The ELBO whose discrete draws pass on the gradient of their continuous relaxation.

    The draws are discrete (straight-through) and the KL of discrete sites is a closed form, so the value is
    an unbiased estimate of the ELBO. The gradient is biased, the more the higher the temperature.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang et al., 2017), arXiv:1611.01144; The
        Concrete Distribution (Maddison et al., 2017), arXiv:1611.00712

    Args:
        num_particles: the number of draws per datum.
        temperature: of the relaxation, above 0: a number or a schedule.
        kl_weight: multiplies the KL: a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a discrete site is neither ``OneHotCategorical`` nor ``Bernoulli``.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> encoder, decoder = torch.nn.Linear(5, 3), torch.nn.Linear(3, 5)
        >>> def model(x):
        ...     with pyro.plate("data", len(x), dim=-1):
        ...         z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x), dim=-1):
        ...         pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))
        >>> RelaxedELBO(temperature=0.5).differentiable_loss(model, guide, torch.randn(4, 5)).backward()
        >>> encoder.weight.grad.shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        temperature: float | Schedule = 0.5,
        kl_weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.temperature = (
            temperature if callable(temperature) else check_positive("temperature", temperature)
        )

    def drawing(self) -> Messenger:
        """Return what relaxes the discrete sites."""
        return _Relaxed(self.at_step(self.temperature))

    def check(self, scores: Scores) -> None:
        """Raise nothing: ``_Relaxed`` has looked at the sites."""

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return reconstruction minus the weighted KL, ``[n]``."""
        kls = {
            name: site_kl(name, scores, closed_form=not site["fn"].has_rsample)[0].sum(-1)
            for name, site in scores.guide_sites.items()
        }
        weighted = sum(scores.weights[name] * kl for name, kl in kls.items())
        return scores.reconstruction.mean(0) - kl_weight * weighted


class _Relaxed(Messenger):
    """Makes discrete sites draw with the gradient of a relaxation."""

    def __init__(self, temperature: float | Tensor) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg) or fn.has_rsample:
            return
        base, events = fn, 0
        while isinstance(base, dist.Independent):
            base, events = base.base_dist, events + base.reinterpreted_batch_ndims
        temperature = base.logits.new_tensor(0) + self.temperature if hasattr(base, "logits") else None
        if isinstance(base, dist.OneHotCategorical):
            relaxed = dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=base.logits)
        elif isinstance(base, dist.Bernoulli):
            relaxed = dist.RelaxedBernoulliStraightThrough(temperature, logits=base.logits)
        else:
            raise ValueError(
                f"site {msg['name']!r}: expected OneHotCategorical or Bernoulli to relax, got "
                f"{type(base).__name__}; use VIMCO, ScoreFunctionELBO or EnumELBO"
            )
        msg["value"], msg["done"] = relaxed.rsample(), True
