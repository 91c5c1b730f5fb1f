"""Models: Pyro programs made of priors and likelihoods."""

if __name__ != "ppl_vae.models":
    raise ImportError(f"import ppl_vae.models instead: {__name__!r} is a link in the checkout, not a package")

from ppl_vae.models.cvae import CVAE as CVAE
from ppl_vae.models.deep_markov import DeepMarkovModel as DeepMarkovModel
from ppl_vae.models.gaussian_mixture_vae import GaussianMixtureVAE as GaussianMixtureVAE
from ppl_vae.models.hierarchical import HierarchicalVAE as HierarchicalVAE
from ppl_vae.models.indexed import IndexedModel as IndexedModel
from ppl_vae.models.linear_gaussian import LinearGaussian as LinearGaussian
from ppl_vae.models.semi_supervised import SemiSupervisedVAE as SemiSupervisedVAE
from ppl_vae.models.sequence import SequenceVAE as SequenceVAE
from ppl_vae.models.vae import VAE as VAE
from ppl_vae.models.very_deep import VeryDeepVAE as VeryDeepVAE

__all__ = [
    "CVAE",
    "VAE",
    "DeepMarkovModel",
    "GaussianMixtureVAE",
    "HierarchicalVAE",
    "IndexedModel",
    "LinearGaussian",
    "SemiSupervisedVAE",
    "SequenceVAE",
    "VeryDeepVAE",
]
