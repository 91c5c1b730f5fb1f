"""Priors: modules whose ``forward`` returns a Distribution over one latent site."""

from ppl_vae.priors.standard_normal import StandardNormal as StandardNormal
from ppl_vae.priors.uniform_sphere import UniformSphere as UniformSphere

__all__ = ["StandardNormal", "UniformSphere"]
