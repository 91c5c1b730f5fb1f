"""Bounds from importance weights, and gradients for them."""

import math
from typing import Any

import torch
from torch import Tensor

from ppl_vae._checks import check_at_least, check_positive_int
from ppl_vae.infer.estimator import (
    Estimator,
    check_baseline,
    scale_gradients,
    two_objectives,
    with_gradient_of,
    with_score_function,
)
from ppl_vae.infer.schedules import Schedule
from ppl_vae.infer.scoring import Gradient, Scores


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Return the logarithm of the mean weight."""
    return log_weights.logsumexp(dim) - math.log(log_weights.shape[dim])


class IWAE(Estimator):
    r"""The importance-weighted bound :math:`\log \frac{1}{K} \sum_k w_k`.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519; sticking the landing for
        it: Sticking the Landing (Roeder et al., 2017), arXiv:1703.09194

    Args:
        num_particles: K, the number of draws per datum.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.
        stick_the_landing: let the guide's gradient go through the draws alone. For K > 1 the gradient
            is then biased (Tucker et al., 2019, arXiv:1810.04152); ``DReG`` isn't.

    Raises:
        ValueError: on a run, if a site of the guide is not reparameterised; ``VIMCO`` takes any.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> IWAE(num_particles=50).loss(model, guide, model(None, size=3)).shape
        torch.Size([])
    """

    def __init__(
        self,
        num_particles: int = 5,
        *,
        kl_weight: float | Schedule = 1.0,
        stick_the_landing: bool = False,
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.stick_the_landing = stick_the_landing
        self.gradient = "path" if stick_the_landing else "full"

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the logarithm of the mean weight, ``[n]``."""
        return log_mean_exp(scores.log_weights(kl_weight))


class Renyi(Estimator):
    r"""The variational Renyi bound :math:`\frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}`.

    ``alpha=0`` is the IWAE's bound, ``alpha=1`` the ELBO, ``alpha=-math.inf`` the largest log weight.
    A lower bound on log p(x) for ``alpha >= 0``; for ``alpha < 0`` neither, with K draws.

    References:
        Renyi Divergence Variational Inference (Li & Turner, 2016), arXiv:1602.02311

    Args:
        num_particles: K, the number of draws per datum.
        alpha: the order, any number, infinite ones too.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``alpha`` is NaN. On a run, if a site of the guide is not reparameterised.
    """

    def __init__(
        self, num_particles: int = 5, *, alpha: float = 0.5, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if math.isnan(alpha):
            raise ValueError(f"alpha: expected a number, got {alpha!r}")
        self.alpha = alpha

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the bound, ``[n]``."""
        return renyi_bound(scores.log_weights(kl_weight), self.alpha)


def renyi_bound(log_weights: Tensor, alpha: float) -> Tensor:
    """Return the Renyi bound of K log weights along the first dimension."""
    if alpha == 1:
        return log_weights.mean(0)
    if math.isinf(alpha):
        return log_weights.amin(0) if alpha > 0 else log_weights.amax(0)
    return log_mean_exp((1 - alpha) * log_weights) / (1 - alpha)


class DReG(Estimator):
    r"""The Renyi bound, the IWAE's by default, with the doubly reparameterised gradient of the guide.

    Unbiased, as the plain gradient is, but its signal-to-noise ratio doesn't fall with K. A guide of several
    sites, or one that holds networks in its distributions (a flow), is run twice.

    References:
        Doubly Reparameterized Gradient Estimators (Tucker et al., 2019), arXiv:1810.04152

    Args:
        num_particles: K, the number of draws per datum.
        alpha: the order of the Renyi bound; 0 is the IWAE's, 1 is ``STL_ELBO``.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``alpha`` is not finite. On a run, if a site of the guide is not reparameterised, or
            the programs weigh sites differently.
    """

    gradient: Gradient = "path"

    def __init__(
        self, num_particles: int = 5, *, alpha: float = 0.0, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha: expected a finite number, got {alpha!r}")
        self.alpha = alpha

    def check(self, scores: Scores) -> None:
        """Raise if a site is weighted apart from the others: the identity behind the gradient fails."""
        super().check(scores)
        weights = list(scores.weights.values())
        for name, weight in scores.weights.items():
            if weight is not weights[0] and not (isinstance(weight, float) and weight == weights[0]):
                raise ValueError(f"site {name!r}: expected one KL weight for all sites; use IWAE or Renyi")

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        order = 1 - self.alpha
        shares = (order * log_weights.detach()).softmax(0)
        own = next(iter(scores.weights.values()), 1.0)
        scale_gradients(scores, 1 - order * kl_weight * own * (1 - shares))
        return with_gradient_of(renyi_bound(log_weights, self.alpha), (shares * log_weights).sum(0))


class CIWAE(Estimator):
    r"""The combination :math:`\beta \, \mathrm{ELBO} + (1 - \beta) \, \mathrm{IWAE}`.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum.
        beta: the ELBO's share, in [0, 1].
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``beta`` is not in [0, 1]. On a run, if a site of the guide is not reparameterised.
    """

    def __init__(
        self, num_particles: int = 5, *, beta: float = 0.5, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if not 0 <= check_at_least("beta", beta) <= 1:
            raise ValueError(f"beta: expected a share in [0, 1], got {beta!r}")
        self.beta = beta

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the combination, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        return self.beta * log_weights.mean(0) + (1 - self.beta) * log_mean_exp(log_weights)


class MIWAE(Estimator):
    r"""The mean of M importance-weighted bounds, each of K / M draws.

    ``num_groups=1`` is the IWAE of all K draws, ``num_groups=num_particles`` the ELBO.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum, all groups together.
        num_groups: M, which divides K.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if M does not divide K. On a run, if a site of the guide is not reparameterised.
    """

    def __init__(
        self, num_particles: int = 16, *, num_groups: int = 4, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.num_groups = check_positive_int("num_groups", num_groups)
        if self.num_particles % self.num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of num_particles={num_particles}, got {num_groups}"
            )

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the mean of the groups' bounds, ``[n]``."""
        return log_mean_exp(self._groups(scores.log_weights(kl_weight)), 1).mean(0)

    def _groups(self, log_weights: Tensor) -> Tensor:
        return log_weights.unflatten(0, (self.num_groups, -1))


class PIWAE(MIWAE):
    """The model trained by the IWAE of all K draws, the guide by the MIWAE of M groups of them.

    Its value is the IWAE's bound. The ends of ``num_groups`` are those of ``MIWAE``, for the guide alone.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), arXiv:1802.04537

    Args:
        num_particles: K, the number of draws per datum, all groups together.
        num_groups: M, which divides K.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if M does not divide K. On a run, if a site of the guide is not reparameterised.
    """

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the IWAE's bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        constant = log_weights.detach()
        in_groups = self._groups(constant).softmax(1).flatten(0, 1) / self.num_groups
        surrogate = two_objectives(scores, kl_weight, constant.softmax(0), in_groups)
        return with_gradient_of(log_mean_exp(log_weights), surrogate)


class CUBO(Estimator):
    r"""The chi upper bound :math:`\frac{1}{n} \log E_q[w^n] \ge \log p(x)`, which the guide minimises.

    The loss is the bound itself. The model can't be trained by an upper bound: its gradient is that of the
    IWAE's bound of the same draws. With K draws the logarithm is biased downwards, so that the value is an
    upper bound for large K only.

    References:
        Variational Inference via chi Upper Bound Minimization (Dieng et al., 2017), arXiv:1611.00328

    Args:
        num_particles: K, the number of draws per datum.
        order: n, above 1.
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``order`` is not above 1. On a run, if a site of the guide is not reparameterised.
    """

    def __init__(
        self, num_particles: int = 50, *, order: float = 2.0, kl_weight: float | Schedule = 1.0
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        if check_at_least("order", order, 1.0) == 1:
            raise ValueError(f"order: expected a number above 1, got {order!r}")
        self.order = order

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return minus the bound, ``[n]``."""
        log_weights = scores.log_weights(kl_weight)
        constant = log_weights.detach()
        surrogate = two_objectives(
            scores, kl_weight, constant.softmax(0), -(self.order * constant).softmax(0)
        )
        return with_gradient_of(-renyi_bound(log_weights, 1 - self.order), surrogate)


class TVO(Estimator):
    r"""The thermodynamic variational objective, a left Riemann sum of the integral that is log p(x).

    .. math:: \sum_s (\beta_{s+1} - \beta_s) \, E_{\pi_{\beta_s}}[\log w], \quad \pi_\beta \propto q w^\beta

    with self-normalised weights. With the same draws it lies between the ELBO, which is one partition, and
    the IWAE. The gradient is that of this K-sample objective; sites that are not reparameterised
    have the score function with leave-one-out baselines.

    References:
        The Thermodynamic Variational Objective (Masrani et al., 2019), arXiv:1907.00031

    Args:
        num_particles: K, the number of draws per datum.
        num_partitions: the number of intervals: [0, ``smallest``], then to 1 in equal ratios.
        smallest: the end of the first interval, in (0, 1).
        kl_weight: multiplies log q(z | x) - log p(z): a number from 0 or a schedule.

    Raises:
        ValueError: if ``smallest`` is not in (0, 1), or ``num_particles`` is 1 and a site is not
            reparameterised.
    """

    def __init__(
        self,
        num_particles: int = 50,
        *,
        num_partitions: int = 5,
        smallest: float = 0.1,
        kl_weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(num_particles, kl_weight=kl_weight)
        self.num_partitions = check_positive_int("num_partitions", num_partitions)
        if not 0 < smallest < 1:
            raise ValueError(f"smallest: expected a number in (0, 1), got {smallest!r}")
        self.smallest = smallest

    def check(self, scores: Scores) -> None:
        """Raise if there is no baseline for sites that are not reparameterised."""
        check_baseline(self, scores)

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the sum, ``[n]``."""
        return with_score_function(scores, scores.log_weights(kl_weight), self._bound)

    def _bound(self, log_weights: Tensor) -> Tensor:
        """Return the sum for log weights ``[K, ...]``."""
        inner = torch.logspace(
            math.log10(self.smallest),
            0.0,
            self.num_partitions,
            dtype=log_weights.dtype,
            device=log_weights.device,
        )
        ends = inner if self.num_partitions > 1 else torch.ones_like(inner)
        starts = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
        column = (-1,) + (1,) * log_weights.dim()
        shares = (starts.view(column) * log_weights).softmax(1)
        return ((ends - starts).view(column[:-1]) * (shares * log_weights).sum(1)).sum(0)
