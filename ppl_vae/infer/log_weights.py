"""Per-datum log weights: the primitive under estimators and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ppl_vae._checks import check_positive_int
from ppl_vae.infer.running import (
    Program,
    Site,
    data_plate_size,
    latent_sites,
    observed_sites,
    trace_pair,
)

PARTICLE_DIM = -2


@dataclass(frozen=True)
class Terms:
    r"""The parts of log weights: log w = reconstruction - sum of kl.

    Attributes:
        reconstruction: log p(x | z), nats, ``[num_particles, n]``.
        kl: for each latent site log q(z | x) - log p(z), nats, ``[num_particles, n]``; its mean over
            draws is the KL divergence.
    """

    reconstruction: Tensor
    kl: dict[str, Tensor]

    def log_weights(self) -> Tensor:
        """Return log p(x, z) - log q(z | x), ``[num_particles, n]``."""
        return self.reconstruction - sum(self.kl.values(), torch.zeros_like(self.reconstruction))


def log_weights(model: Program, guide: Program, *batch: Tensor, num_particles: int = 1) -> Tensor:
    r"""Return :math:`\log p(x, z_k) - \log q(z_k \mid x)` for each datum and each of K draws.

    All draws are made in one vectorised pass, the encoder runs once per datum. The weights are
    unscaled: the scale of a subsampling plate multiplies what is made of them, never the weights.

    Args:
        model: program over the latent sites and the data.
        guide: program over the latent sites.
        *batch: what both are called with, each ``[n, ...]``.
        num_particles: K, the number of draws per datum.

    Returns:
        Log weights in nats, ``[num_particles, n]``, with gradients to the parameters of both.

    Raises:
        ValueError: if a site is outside the data plate or model and guide have other latent sites.

    Example:
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> log_weights(model, guide, model(None, size=3), num_particles=7).shape
        torch.Size([7, 3])
    """
    return terms(model, guide, *batch, num_particles=num_particles).log_weights()


def terms(model: Program, guide: Program, *batch: Tensor, num_particles: int = 1) -> Terms:
    """Return the parts of ``log_weights`` from one vectorised pass."""
    size = check_positive_int("num_particles", num_particles)
    plate = pyro.plate("num_particles", size, dim=PARTICLE_DIM)
    model_trace, guide_trace = trace_pair(plate(model), plate(guide), *batch)
    return terms_of_sites(latent_sites(model_trace) | observed_sites(model_trace), latent_sites(guide_trace))


def terms_of_sites(model_sites: Mapping[str, Site], guide_sites: Mapping[str, Site]) -> Terms:
    """Return the parts of the log weights from the sites of one run of model and guide."""
    reconstruction: list[Tensor] = []
    kl: dict[str, Tensor] = {}
    for name, site in model_sites.items():
        if site["is_observed"]:
            reconstruction.append(per_datum_log_prob(name, site))
        elif name in guide_sites:
            kl[name] = per_datum_log_prob(name, guide_sites[name]) - per_datum_log_prob(name, site)
        else:
            raise ValueError(f"guide: lacks the model's latent site {name!r}; it has {sorted(guide_sites)}")
    check_auxiliary(guide_sites, model_sites)
    for name in guide_sites.keys() - model_sites.keys():
        kl[name] = per_datum_log_prob(name, guide_sites[name])
    if not reconstruction:
        raise ValueError("model: expected an observed site (`obs=x`), found none")
    return Terms(sum(reconstruction[1:], reconstruction[0]), kl)


def check_auxiliary(guide_sites: Mapping[str, Site], model_sites: Mapping[str, Site]) -> None:
    """Raise if the guide has a site that is neither the model's nor marked as auxiliary."""
    for name in guide_sites.keys() - model_sites.keys():
        if not guide_sites[name]["infer"].get("is_auxiliary"):
            raise ValueError(f"guide: site {name!r} is no latent site of the model: {sorted(model_sites)}")


def per_datum_log_prob(name: str, site: Site) -> Tensor:
    """Return a site's log-probability, unscaled, ``[num_particles, n]``."""
    n = data_plate_size(name, site)
    log_prob = site["fn"].log_prob(site["value"])
    mask = site["mask"]
    if mask is not None:
        log_prob = torch.where(torch.as_tensor(mask, device=log_prob.device), log_prob, 0.0)
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    misfits = [i for i in range(-log_prob.dim(), 0) if log_prob.shape[i] not in (1, sizes.get(i, 1))]
    if log_prob.dim() > 2 or misfits:
        raise ValueError(
            f"site {name!r}: expected a log-probability of shape [num_particles, {n}], "
            f"got {list(log_prob.shape)}; everything right of the data plate is an event (`.to_event`)"
        )
    if log_prob.dim() < 2:
        log_prob = log_prob.unsqueeze(0)
    return log_prob.expand(log_prob.shape[0], n)
