"""Priors: modules whose ``forward`` returns a Distribution over one latent site."""

from ppl_vae.priors.standard_normal import StandardNormal as StandardNormal

__all__ = ["StandardNormal"]
