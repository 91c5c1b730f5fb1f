"""Networks: modules that map tensors to tensors, for any leading batch shape."""

from ppl_vae.networks.conv import ConvDecoder as ConvDecoder
from ppl_vae.networks.conv import ConvEncoder as ConvEncoder
from ppl_vae.networks.mlp import MLP as MLP

__all__ = ["MLP", "ConvDecoder", "ConvEncoder"]
