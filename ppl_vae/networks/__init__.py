"""Networks: modules that map tensors to tensors, for any leading batch shape."""

from ppl_vae.networks.conv import ConvDecoder as ConvDecoder
from ppl_vae.networks.conv import ConvEncoder as ConvEncoder
from ppl_vae.networks.mlp import MLP as MLP
from ppl_vae.networks.pixel_head import PixelHead as PixelHead
from ppl_vae.networks.recurrent import GatedTransition as GatedTransition
from ppl_vae.networks.recurrent import RecurrentDecoder as RecurrentDecoder
from ppl_vae.networks.recurrent import RecurrentEncoder as RecurrentEncoder
from ppl_vae.networks.residual import ResidualConv as ResidualConv
from ppl_vae.networks.residual import ResidualMLP as ResidualMLP
from ppl_vae.networks.transformer import TransformerDecoder as TransformerDecoder
from ppl_vae.networks.transformer import TransformerEncoder as TransformerEncoder

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GatedTransition",
    "PixelHead",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "ResidualConv",
    "ResidualMLP",
    "TransformerDecoder",
    "TransformerEncoder",
]
