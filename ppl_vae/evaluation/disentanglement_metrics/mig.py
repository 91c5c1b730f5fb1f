"""The mutual information gap."""

import math

import torch
from torch import Tensor

from ppl_vae.evaluation.disentanglement_metrics._table import (
    JointCounts,
    check_bootstrap,
    check_table,
    gap,
    information,
    resamples,
)
from ppl_vae.evaluation.disentanglement_metrics.score import Score


def mutual_information_gap(
    codes: Tensor, factors: Tensor, *, bins: int = 20, bootstrap: int = 100, seed: int = 0
) -> Score:
    r"""Return the MIG: how much more of a factor the best code knows than the second best.

    .. math:: \frac{1}{F} \sum_f \frac{I(c_{(1)}; f) - I(c_{(2)}; f)}{H(f)}

    with the two codes of the highest mutual information with f. It is 1 if each factor is known to one code
    only, and 0 if two codes know it alike.

    As in disentanglement_lib, codes are put into ``bins`` bins of equal width over their range, and the
    mutual information is that of the counts, natural logarithm. It is biased upwards by about
    (bins - 1)(values - 1) / 2n nats. A factor of more values than bins can't reach 1. The standard error is
    that of a bootstrap over data, the bins being kept.

    Args:
        codes: ``[n, latent]``, latent of two or more.
        factors: whole numbers ``[n, factors]``.
        bins: of each code.
        bootstrap: the number of resamples; 0 for no standard error.
        seed: of the resamples.

    Raises:
        ValueError: if a shape is wrong, values are not finite, or a factor does not vary.

    References:
        Isolating Sources of Disentanglement in VAEs (Chen et al., 2018), arXiv:1802.04942

    Example:
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5))
        >>> float(mutual_information_gap(factors.float(), factors))
        1.0
    """
    table, count = check_table(codes, factors), check_bootstrap(bootstrap)
    counts = JointCounts(table, bins)

    def score(weights: Tensor | None = None) -> float:
        mutual, entropy = information(counts(weights))
        # a factor that is one value in a resample has no entropy, and no gap
        return float((gap(mutual) / entropy.clamp(min=1e-12)).mean())

    scores = torch.tensor([score(weights) for weights in resamples(len(table), count, seed)])
    error = float(scores.std()) if count else math.nan
    return Score(score(), error, {"bins": bins, "bootstrap": count, "seed": seed})
