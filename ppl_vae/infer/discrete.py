"""Estimators for discrete latents: one model and guide, four ways to train them."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae._checks import check_positive, check_positive_int
from ppl_vae.infer.elbo import KL_ELBO
from ppl_vae.infer.estimator import Estimator, check_baseline, with_score_function
from ppl_vae.infer.importance import log_mean_exp
from ppl_vae.infer.running import Program
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Scores


class ScoreFunctionELBO(Estimator):
    """The ELBO with the score function and leave-one-out baselines for sites that are not reparameterised.

    The baseline of a draw is the mean log weight of the others. Reparameterised sites have the
    reparameterised gradient. For K = 1 use Pyro's ``TraceGraph_ELBO``, whose baselines are learned.

    References:
        Variational inference for Monte Carlo objectives (Mnih & Rezende, 2016), arXiv:1602.06725

    Args:
        num_particles: K, the number of draws per datum, at least 2 for a discrete latent.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a site needs a baseline and K is 1.
    """

    def __init__(self, num_particles: int = 5, *, kl_weight: float | Schedule = 1.0) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)

    def check(self, scores: Scores) -> None:
        """Raise if there is no baseline."""
        check_baseline(self, scores)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the mean of the log weights, ``[n]``."""
        return with_score_function(scores, scores.log_weights(kl_weight), lambda w: w.mean(0))


class VIMCO(Estimator):
    """The importance-weighted bound with the score function and leave-one-out baselines.

    The baseline of a draw is the bound with its log weight replaced by the mean of the others'.
    Reparameterised sites have the reparameterised gradient.

    References:
        Variational inference for Monte Carlo objectives (Mnih & Rezende, 2016), arXiv:1602.06725

    Args:
        num_particles: K, the number of draws per datum, at least 2 for a discrete latent.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: on a run, if a site needs a baseline and K is 1.
    """

    def __init__(self, num_particles: int = 5, *, kl_weight: float | Schedule = 1.0) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)

    def check(self, scores: Scores) -> None:
        """Raise if there is no baseline."""
        check_baseline(self, scores)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the logarithm of the mean weight, ``[n]``."""
        return with_score_function(scores, scores.log_weights(kl_weight), log_mean_exp)


class EnumELBO(TraceEnum_ELBO):
    """The ELBO summed over all values of the discrete latents: Pyro's, without marks on the programs.

    Every discrete site of finite support is enumerated in parallel, one of several dimensions
    (``.to_event``) too. S sites, or dimensions, of C values cost C^S runs of the decoder.

    Args:
        num_particles: the number of draws per datum of the other sites.
        max_plate_nesting: the number of plates, 1 for the plate of the data alone.
        max_values: the most combinations of values that are enumerated for a datum.

    Raises:
        ValueError: on a run, if there are more.

    Example:
        >>> EnumELBO().max_plate_nesting
        1
    """

    def __init__(
        self, num_particles: int = 1, *, max_plate_nesting: int = 1, max_values: int = 10_000
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=num_particles > 1,
            strict_enumeration_warning=False,
        )
        self.max_values = check_positive_int("max_values", max_values)

    def _get_traces(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        # what is entered last sees a site first
        marked = _Counted(self.max_values)(config_enumerate(_Enumerable()(guide)))
        return super()._get_traces(config_enumerate(model), marked, args, kwargs)


class _Enumerable(Messenger):
    """Lets sites of several dimensions, each of finite support, be enumerated."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or site_is_subsample(msg) or fn.has_enumerate_support:
            return
        if isinstance(fn, dist.Independent) and fn.base_dist.has_enumerate_support:
            msg["fn"] = _Product(fn.base_dist, fn.reinterpreted_batch_ndims)


class _Product(dist.Independent):
    """Independent dimensions whose support is all combinations of theirs."""

    has_enumerate_support = True

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all combinations, ``[C ** dimensions, *batch, *event]``; batch of ones unless expanded."""
        one = self.base_dist.enumerate_support(expand=False)  # [C, *1, *event of the base]
        one = one.reshape(len(one), *one.shape[1 + len(self.base_dist.batch_shape) :])
        dims = self.event_shape[: self.reinterpreted_batch_ndims]
        index = torch.cartesian_prod(*[torch.arange(len(one), device=one.device)] * dims.numel())
        values = one[index.view(-1, *dims)]
        values = values.view(len(values), *(1,) * len(self.batch_shape), *self.event_shape)
        return values.expand(-1, *self.batch_shape, *self.event_shape) if expand else values


class _Counted(Messenger):
    """Raises before a program enumerates more combinations of values than there is room for."""

    def __init__(self, max_values: int) -> None:
        super().__init__()
        self.max_values = max_values
        self.values: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or not msg["fn"].has_enumerate_support:
            return
        self.values[msg["name"]] = _number_of_values(msg["fn"])
        if (total := math.prod(self.values.values())) > self.max_values:
            raise ValueError(
                f"site {msg['name']!r}: expected at most max_values={self.max_values} combinations of values "
                f"to enumerate, got {total} of the sites {list(self.values)}; use VIMCO or ScoreFunctionELBO"
            )


def _number_of_values(fn: Any) -> int:
    if isinstance(fn, _Product):  # not all of which there may be room for
        return _number_of_values(fn.base_dist) ** fn.event_shape[: fn.reinterpreted_batch_ndims].numel()
    return len(fn.enumerate_support(expand=False))


class RelaxedELBO(KL_ELBO):
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

    def check(self, scores: Scores) -> None:
        """Raise nothing: ``_Relaxed`` has looked at the sites."""

    def drawing(self) -> Messenger:
        """Return what relaxes the discrete sites."""
        return _Relaxed(self.at_step(self.temperature))


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
