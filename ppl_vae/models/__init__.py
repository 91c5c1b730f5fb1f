"""Models: Pyro programs made of priors and likelihoods."""

from ppl_vae.models.linear_gaussian import LinearGaussian as LinearGaussian
from ppl_vae.models.vae import VAE as VAE

__all__ = ["VAE", "LinearGaussian"]
