"""Models: Pyro programs made of priors and likelihoods."""

if __name__ != "ppl_vae.models":
    raise ImportError(f"import ppl_vae.models instead: {__name__!r} is a link in the checkout, not a package")

from ppl_vae.models.indexed import IndexedModel as IndexedModel
from ppl_vae.models.linear_gaussian import LinearGaussian as LinearGaussian
from ppl_vae.models.vae import VAE as VAE

__all__ = ["VAE", "IndexedModel", "LinearGaussian"]
