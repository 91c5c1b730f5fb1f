"""Distributions that torch and Pyro lack."""

from ppl_vae.distributions.full_rank_normal import FullRankNormal as FullRankNormal
from ppl_vae.distributions.hyperspherical_uniform import HypersphericalUniform as HypersphericalUniform
from ppl_vae.distributions.normal_mixture import NormalMixture as NormalMixture
from ppl_vae.distributions.von_mises_fisher import VonMisesFisher as VonMisesFisher

__all__ = ["FullRankNormal", "HypersphericalUniform", "NormalMixture", "VonMisesFisher"]
