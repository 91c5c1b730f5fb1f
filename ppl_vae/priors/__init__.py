"""Priors: modules whose ``forward`` returns a Distribution over one latent site."""

from ppl_vae.priors.autoregressive_prior import AutoregressivePrior as AutoregressivePrior
from ppl_vae.priors.conditional_normal import ConditionalNormal as ConditionalNormal
from ppl_vae.priors.flow_prior import FlowPrior as FlowPrior
from ppl_vae.priors.gaussian_mixture import GaussianMixture as GaussianMixture
from ppl_vae.priors.standard_normal import StandardNormal as StandardNormal
from ppl_vae.priors.uniform_sphere import UniformSphere as UniformSphere
from ppl_vae.priors.vamp_prior import VampPrior as VampPrior

__all__ = [
    "AutoregressivePrior",
    "ConditionalNormal",
    "FlowPrior",
    "GaussianMixture",
    "StandardNormal",
    "UniformSphere",
    "VampPrior",
]
