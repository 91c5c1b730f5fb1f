"""The normal likelihood with correlated noise."""

import math

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae import distributions
from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions.reshaped import Reshaped
from ppl_vae.likelihoods._decoder import decode, event_dims, split_output


class LowRankNormal(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = N(x; \mu(z), D(z) + W(z) W(z)^\top)` over all of x together.

    :math:`D = \mathrm{diag}(\sigma^2)`, and :math:`W = \mathrm{diag}(\sigma) V / \sqrt r` has :math:`r`
    columns, each a pattern of noise that values share. A log-density costs :math:`O(d r^2)` for :math:`d`
    values. Independent noise is ``Normal(decoder, scale="network")``.

    References:
        Structured Uncertainty Prediction Networks (Dorta et al., 2018), arXiv:1802.07079
        Stochastic Segmentation Networks (Monteiro et al., 2020), arXiv:2006.06015

    Args:
        decoder: network from ``[*batch, latent]`` to the parameters, whose first event dimension is
            ``2 + rank`` times that of x: :math:`\mu` for all of x, then :math:`\log \sigma`, clamped to
            [-7, 7], then each column of :math:`V`.
        rank: the number of columns of :math:`W`.

    Raises:
        TypeError, ValueError: if ``rank`` is not a whole number above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> LowRankNormal(MLP(2, (4 * 3, 8, 8)), rank=2)(torch.zeros(5, 2)).event_shape
        torch.Size([3, 8, 8])
    """

    def __init__(self, decoder: nn.Module, rank: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.rank = check_positive_int("rank", rank)

    @staticmethod
    def outputs(rank: int) -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return 2 + rank

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        output = decode(self.decoder, z, context)
        outputs = split_output(output, z, self.outputs(self.rank), "mean, log-scale, columns")
        dims = event_dims(output, z)
        flat = outputs.flatten(-dims)
        scale = bounded_scale(flat[1])
        columns = scale.unsqueeze(-1) * flat[2:].movedim(0, -1) / math.sqrt(self.rank)
        normal = distributions.LowRankNormal(flat[0], columns, scale.square())
        return Reshaped.to(normal, outputs.shape[-dims:])
