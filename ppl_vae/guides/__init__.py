"""Guides: Pyro programs over a model's latent sites."""

if __name__ != "ppl_vae.guides":
    raise ImportError(f"import ppl_vae.guides instead: {__name__!r} is a link in the checkout, not a package")

from ppl_vae.guides.annealed import AnnealedGuide as AnnealedGuide
from ppl_vae.guides.deep_markov import DeepMarkovGuide as DeepMarkovGuide
from ppl_vae.guides.flow import FlowGuide as FlowGuide
from ppl_vae.guides.full_rank import FullRankGuide as FullRankGuide
from ppl_vae.guides.gaussian_mixture import GaussianMixtureGuide as GaussianMixtureGuide
from ppl_vae.guides.hamiltonian import HamiltonianGuide as HamiltonianGuide
from ppl_vae.guides.hierarchical import HierarchicalGuide as HierarchicalGuide
from ppl_vae.guides.hyperspherical import HypersphericalGuide as HypersphericalGuide
from ppl_vae.guides.ladder import LadderGuide as LadderGuide
from ppl_vae.guides.local import LocalGuide as LocalGuide
from ppl_vae.guides.low_rank import LowRankGuide as LowRankGuide
from ppl_vae.guides.mean_field import MeanFieldGuide as MeanFieldGuide
from ppl_vae.guides.mixture import MixtureGuide as MixtureGuide
from ppl_vae.guides.semi_amortized import SemiAmortizedGuide as SemiAmortizedGuide
from ppl_vae.guides.semi_supervised import SemiSupervisedGuide as SemiSupervisedGuide
from ppl_vae.guides.very_deep import VeryDeepGuide as VeryDeepGuide

__all__ = [
    "AnnealedGuide",
    "DeepMarkovGuide",
    "FlowGuide",
    "FullRankGuide",
    "GaussianMixtureGuide",
    "HamiltonianGuide",
    "HierarchicalGuide",
    "HypersphericalGuide",
    "LadderGuide",
    "LocalGuide",
    "LowRankGuide",
    "MeanFieldGuide",
    "MixtureGuide",
    "SemiAmortizedGuide",
    "SemiSupervisedGuide",
    "VeryDeepGuide",
]
