"""Likelihoods: modules that own a decoder and whose ``forward`` returns a Distribution over x."""

from ppl_vae.likelihoods.bernoulli import Bernoulli as Bernoulli
from ppl_vae.likelihoods.continuous_bernoulli import ContinuousBernoulli as ContinuousBernoulli
from ppl_vae.likelihoods.normal import Normal as Normal

__all__ = ["Bernoulli", "ContinuousBernoulli", "Normal"]
