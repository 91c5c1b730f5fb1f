"""Distributions that torch and Pyro lack."""

from ppl_vae.distributions.autoregressive_pixels import AutoregressivePixels as AutoregressivePixels
from ppl_vae.distributions.autoregressive_sequence import AutoregressiveSequence as AutoregressiveSequence
from ppl_vae.distributions.discretized_logistic import (
    DiscretizedLogisticMixture as DiscretizedLogisticMixture,
)
from ppl_vae.distributions.full_rank_normal import FullRankNormal as FullRankNormal
from ppl_vae.distributions.hyperspherical_uniform import HypersphericalUniform as HypersphericalUniform
from ppl_vae.distributions.levels import CategoricalLevels as CategoricalLevels
from ppl_vae.distributions.low_rank_normal import LowRankNormal as LowRankNormal
from ppl_vae.distributions.normal_mixture import NormalMixture as NormalMixture
from ppl_vae.distributions.reshaped import Reshaped as Reshaped
from ppl_vae.distributions.shared_mixture import SharedMixture as SharedMixture
from ppl_vae.distributions.shared_normal_mixture import SharedNormalMixture as SharedNormalMixture
from ppl_vae.distributions.some_labels import SomeLabels as SomeLabels
from ppl_vae.distributions.von_mises_fisher import VonMisesFisher as VonMisesFisher

__all__ = [
    "AutoregressivePixels",
    "AutoregressiveSequence",
    "CategoricalLevels",
    "DiscretizedLogisticMixture",
    "FullRankNormal",
    "HypersphericalUniform",
    "LowRankNormal",
    "NormalMixture",
    "Reshaped",
    "SharedMixture",
    "SharedNormalMixture",
    "SomeLabels",
    "VonMisesFisher",
]
