"""What estimators of the aggregate posterior ask of a latent site."""

from typing import Any

from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from ppl_vae.infer.divergence import factorises
from ppl_vae.infer.scoring import Scores


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


def marginals(name: str, fn: Any) -> Any:
    """Return the distribution of each dimension, batch shape ``[*K, n, latent]``.

    Raises:
        ValueError: if they are not known.
    """
    if factorises(fn):
        return fn.base_dist
    if isinstance(fn, (MultivariateNormal, LowRankMultivariateNormal)):
        return Normal(fn.mean, fn.variance.sqrt())
    raise ValueError(
        f"site {name!r}: expected a distribution in the guide with known marginals, factorised "
        f"(`.to_event(1)`) or a multivariate normal, got {type(fn).__name__}"
    )
