"""Flows: modules whose ``forward`` returns an invertible map from base noise to z, given a context."""

from ppl_vae.flows.affine_coupling import AffineCoupling as AffineCoupling
from ppl_vae.flows.block_neural_autoregressive import BlockNeuralAutoregressive as BlockNeuralAutoregressive
from ppl_vae.flows.continuous import Continuous as Continuous
from ppl_vae.flows.householder import Householder as Householder
from ppl_vae.flows.inverse_autoregressive import InverseAutoregressive as InverseAutoregressive
from ppl_vae.flows.masked_autoregressive import MaskedAutoregressive as MaskedAutoregressive
from ppl_vae.flows.neural_autoregressive import NeuralAutoregressive as NeuralAutoregressive
from ppl_vae.flows.planar import Planar as Planar
from ppl_vae.flows.radial import Radial as Radial
from ppl_vae.flows.spline_autoregressive import SplineAutoregressive as SplineAutoregressive
from ppl_vae.flows.spline_coupling import SplineCoupling as SplineCoupling
from ppl_vae.flows.sylvester import Sylvester as Sylvester

__all__ = [
    "AffineCoupling",
    "BlockNeuralAutoregressive",
    "Continuous",
    "Householder",
    "InverseAutoregressive",
    "MaskedAutoregressive",
    "NeuralAutoregressive",
    "Planar",
    "Radial",
    "SplineAutoregressive",
    "SplineCoupling",
    "Sylvester",
]
