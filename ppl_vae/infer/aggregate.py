"""Estimators that look at the aggregate posterior: all of a batch's posteriors together."""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from ppl_vae._checks import check_at_least, check_choice, check_positive_int
from ppl_vae.infer.elbo import factorises
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.scoring import Scores


class BetaTC_ELBO(Estimator):
    r"""The beta-TCVAE: the KL in three parts, each with a weight of its own.

    .. math::
        E[\log p(x \mid z)] - \alpha \, I(x; z) - \beta \, TC(z) - \gamma \sum_d KL(q(z_d) \,\|\, p(z_d))

    The aggregate posterior q(z) is estimated from the batch. With all weights 1 the objective is the
    ELBO. A batch must be drawn from the ``size`` data at random.

    References:
        Isolating Sources of Disentanglement in VAEs (Chen et al., 2018), arXiv:1802.04942

    Args:
        size: N, the number of training data.
        alpha: the weight of the mutual information between index and code.
        beta: of the total correlation.
        gamma: of the dimension-wise KL.
        sampling: how the batch stands for the data: ``"weighted"`` (minibatch-weighted, biased) or
            ``"stratified"`` (minibatch-stratified).
        site: the latent site.
        num_particles: the number of draws per datum.

    Attributes:
        parts: ``mutual_information``, ``total_correlation`` and ``dimension_kl`` at the last call, nats,
            the batch's means; their sum is the mean of log q(z | x) - log p(z).

    Raises:
        ValueError: on a run, if there is no such site, it is masked, its distribution in the guide has no
            known marginals (it neither factorises nor is a multivariate normal), or the batch is larger than
            ``size``.
    """

    def __init__(
        self,
        size: int,
        *,
        alpha: float = 1.0,
        beta: float = 6.0,
        gamma: float = 1.0,
        sampling: Literal["weighted", "stratified"] = "stratified",
        site: str = "z",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        self.size = check_positive_int("size", size)
        self.alpha = check_at_least("alpha", alpha)
        self.beta = check_at_least("beta", beta)
        self.gamma = check_at_least("gamma", gamma)
        check_choice("sampling", sampling, ("weighted", "stratified"))
        self.sampling = sampling
        self.site = site
        self.parts: dict[str, Tensor] = {}

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return reconstruction minus the weighted parts, ``[n]``."""
        parts = self.decompose(scores)
        self.parts = {name: part.detach().mean() for name, part in parts.items()}
        weights = (self.alpha, self.beta, self.gamma)
        kl = sum(weight * part for weight, part in zip(weights, parts.values(), strict=True))
        kl = scores.weights[self.site] * kl
        others = sum(scores.weights[name] * scores.kl(name) for name in scores.guide if name != self.site)
        return (scores.reconstruction - kl - others).mean(0)

    def decompose(self, scores: Scores) -> dict[str, Tensor]:
        """Return the three parts of log q(z | x) - log p(z), ``[K, n]`` each."""
        site = guide_site(self.site, scores)
        fn, z = site["fn"], site["value"]
        marginals = _marginals(self.site, fn)
        n = z.shape[-2]
        if n > self.size:
            raise ValueError(f"size: expected at least the batch's {n} data, got {self.size}")
        draws = z.movedim(-2, 0).unsqueeze(-2)  # [n, *K, 1, latent] against the posteriors [*K, n, latent]
        by_dimension = marginals.log_prob(draws).movedim(0, -3)  # [*K, n, n, latent]
        joint = by_dimension.sum(-1) if factorises(fn) else fn.log_prob(draws).movedim(0, -2)
        log_shares = self._log_shares(n, z)
        log_q = (joint + log_shares).logsumexp(-1)
        log_marginals = (by_dimension + log_shares.unsqueeze(-1)).logsumexp(-2).sum(-1)
        log_q, log_marginals = (v.expand_as(scores.guide[self.site]) for v in (log_q, log_marginals))
        return {
            "mutual_information": scores.guide[self.site] - log_q,
            "total_correlation": log_q - log_marginals,
            "dimension_kl": log_marginals - scores.prior[self.site],
        }

    def _log_shares(self, n: int, z: Tensor) -> Tensor:
        """Return the log weights of the batch's posteriors in q(z) at each draw, ``[n, n]``."""
        if self.sampling == "weighted" or n == 1:
            return z.new_full((n, n), -math.log(self.size * n))
        others = n - 1
        shares = z.new_full((n, n), 1 / others)
        index = torch.arange(n, device=z.device)
        shares[index, index] = 1 / self.size
        shares[index, (index + 1) % n] = (self.size - others) / (self.size * others)
        return shares.log()


class DIP_ELBO(Estimator):
    r"""DIP-VAE: the ELBO and a penalty that draws the aggregate posterior's covariance to the identity.

    .. math:: \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    per datum, where C is the covariance over the batch of the posterior means (``kind="I"``) or that of the
    draws, which adds the mean posterior covariance (``"II"``).

    References:
        Variational Inference of Disentangled Latent Concepts (Kumar et al., 2018), arXiv:1711.00848

    Args:
        off_diagonal: :math:`\lambda_{od}`.
        diagonal: :math:`\lambda_d`; by default ten times (I) or once (II) ``off_diagonal``.
        kind: ``"I"`` or ``"II"``.
        site: the latent site.
        num_particles: the number of draws per datum.

    Raises:
        ValueError: on a run, if there is no such site, it is masked, its distribution in the guide has no
            known mean and covariance, or the batch has less than two data.
    """

    def __init__(
        self,
        off_diagonal: float = 10.0,
        diagonal: float | None = None,
        *,
        kind: Literal["I", "II"] = "I",
        site: str = "z",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        check_choice("kind", kind, ("I", "II"))
        self.off_diagonal = check_at_least("off_diagonal", off_diagonal)
        default = 10 * off_diagonal if kind == "I" else off_diagonal
        self.diagonal = default if diagonal is None else check_at_least("diagonal", diagonal)
        self.kind = kind
        self.site = site

    def objective(self, scores: Scores, kl_weight: Any) -> Tensor:
        """Return the log weights' mean minus the penalty, ``[n]``."""
        covariance = self.covariance(scores)
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        penalty = self.off_diagonal * off + self.diagonal * (diagonal - 1).square().sum()
        return scores.log_weights().mean(0) - penalty

    def covariance(self, scores: Scores) -> Tensor:
        """Return the aggregate posterior's covariance, ``[latent, latent]``."""
        fn = guide_site(self.site, scores)["fn"]
        marginals = _marginals(self.site, fn)
        one = (0,) * (len(fn.batch_shape) - 1)  # the same for every draw
        mean, variance = marginals.mean[one], marginals.variance[one]
        if len(mean) < 2:
            raise ValueError(f"data: expected a batch of at least 2 data for a covariance, got {len(mean)}")
        latent = mean.shape[-1]
        covariance = mean.mT.cov(correction=0).reshape(latent, latent)  # `cov` drops dimensions of size 1
        if self.kind == "I":
            return covariance
        if factorises(fn):
            return covariance + variance.mean(0).diag()
        return covariance + fn.covariance_matrix[one].mean(0)


def guide_site(name: str, scores: Scores) -> Any:
    """Return a latent site of both programs.

    Raises:
        ValueError: if there is none of that name, or it is masked.
    """
    if name not in scores.guide_sites or name not in scores.prior:
        raise ValueError(
            f"site: expected a latent site of model and guide, {sorted(scores.prior)}, got {name!r}"
        )
    if any(sites[name]["mask"] is not None for sites in (scores.guide_sites, scores.model_sites)):
        raise ValueError(
            f"site {name!r}: expected no mask, since all data have a part in the aggregate posterior"
        )
    return scores.guide_sites[name]


def _marginals(name: str, fn: Any) -> Any:
    """Return the distribution of each dimension, batch shape ``[*K, n, latent]``."""
    if factorises(fn):
        return fn.base_dist
    if isinstance(fn, (MultivariateNormal, LowRankMultivariateNormal)):
        return Normal(fn.mean, fn.variance.sqrt())
    raise ValueError(
        f"site {name!r}: expected a distribution in the guide with known marginals, factorised "
        f"(`.to_event(1)`) or a multivariate normal, got {type(fn).__name__}"
    )
