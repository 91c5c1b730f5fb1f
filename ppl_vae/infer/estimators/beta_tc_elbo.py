"""The beta-TCVAE."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ppl_vae._checks import check_at_least, check_choice, check_positive_int
from ppl_vae.infer.aggregate import guide_site, marginals
from ppl_vae.infer.divergence import factorises
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

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> elbo = BetaTC_ELBO(size=1000, beta=6.0)
        >>> loss = elbo.loss(model, guide, model(None, size=50))
        >>> list(elbo.parts)
        ['mutual_information', 'total_correlation', 'dimension_kl']
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
        dimensions = marginals(self.site, fn)
        n = z.shape[-2]
        if n > self.size:
            raise ValueError(f"size: expected at least the batch's {n} data, got {self.size}")
        draws = z.movedim(-2, 0).unsqueeze(-2)  # [n, *K, 1, latent] against the posteriors [*K, n, latent]
        by_dimension = dimensions.log_prob(draws).movedim(0, -3)  # [*K, n, n, latent]
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
