"""Likelihoods: modules that own a decoder and whose ``forward`` returns a Distribution over x."""

from ppl_vae.likelihoods.autoregressive import Autoregressive as Autoregressive
from ppl_vae.likelihoods.autoregressive_categorical import (
    AutoregressiveCategorical as AutoregressiveCategorical,
)
from ppl_vae.likelihoods.autoregressive_normal import AutoregressiveNormal as AutoregressiveNormal
from ppl_vae.likelihoods.bernoulli import Bernoulli as Bernoulli
from ppl_vae.likelihoods.categorical import Categorical as Categorical
from ppl_vae.likelihoods.continuous_bernoulli import ContinuousBernoulli as ContinuousBernoulli
from ppl_vae.likelihoods.discretized_logistic import DiscretizedLogistic as DiscretizedLogistic
from ppl_vae.likelihoods.low_rank_normal import LowRankNormal as LowRankNormal
from ppl_vae.likelihoods.negative_binomial import NegativeBinomial as NegativeBinomial
from ppl_vae.likelihoods.normal import Normal as Normal
from ppl_vae.likelihoods.poisson import Poisson as Poisson
from ppl_vae.likelihoods.student_t import StudentT as StudentT

__all__ = [
    "Autoregressive",
    "AutoregressiveCategorical",
    "AutoregressiveNormal",
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "LowRankNormal",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
]
