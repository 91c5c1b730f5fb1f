"""The negative binomial likelihood for overdispersed counts."""

import math
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive
from ppl_vae.likelihoods._decoder import (
    LOG_MEAN,
    decode,
    event_dims,
    init_log_bias,
    out_shape,
    split_output,
)

_LEAST = 1e-4  # of the total count that is learned or predicted
_LARGE = 30.0  # from here Stirling's series is exact to 1e-13


class _StableNegativeBinomial(dist.NegativeBinomial):
    """A negative binomial that is exact at large total counts, where the terms of torch's cancel."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        count, mean = self.total_count, self.mean
        log_mean = self.logits + count.log()
        # log Gamma(count + value) - log Gamma(count) - value log count, by Stirling where count is large
        large = torch.where(count > _LARGE, count, _LARGE)
        ratio = torch.log1p(value / large)
        series = (large + value - 0.5) * ratio - value + _stirling(large + value) - _stirling(large)
        small = torch.where(count > _LARGE, _LARGE, count)
        exact = torch.lgamma(small + value) - torch.lgamma(small) - value * small.log()
        rising = torch.where(count > _LARGE, series, exact)
        return (
            value * log_mean - (value + count) * torch.log1p(mean / count) + rising - torch.lgamma(value + 1)
        )


def _stirling(a: Tensor) -> Tensor:
    """Return log Gamma(a) less (a - 1/2) log a - a + log(2 pi) / 2."""
    square = a.square()
    return (1 / 12 - (1 / 360 - 1 / (1260 * square)) / square) / a


class NegativeBinomial(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j \mathrm{NB}(x_j; \mu_j, r_j)` of counts, mean e^f(z).

    The variance is :math:`\mu + \mu^2 / r`: the total count :math:`r` is the inverse dispersion, and
    with :math:`r \to \infty` the likelihood is ``Poisson``.

    References:
        A deep generative model for gene expression profiles from single-cell RNA sequencing
        (Lopez et al., 2017), arXiv:1709.02082

    Args:
        decoder: network from ``[*batch, latent]`` to :math:`\log \mu`, ``[*batch, *event]``, clamped to
            [-15, 15]. With ``total_count="network"`` its output has twice the size in the first event
            dimension: the second half is mapped to :math:`r` by a softplus.
        total_count: :math:`r`: a number (fixed), ``"learned"`` (one number, trained, from 1),
            ``"elementwise"`` (one for each element of x, trained, from 1; the decoder needs an
            ``out_shape``) or ``"network"`` (the decoder's second half). Learned and predicted ones are a
            softplus plus 0.0001.

    Raises:
        TypeError: if ``total_count`` is ``"elementwise"`` and the decoder has no ``out_shape``.
        ValueError: if ``total_count`` is none of these, or not above 0.

    Example:
        >>> from ppl_vae.networks import MLP
        >>> NegativeBinomial(MLP(2, 6), total_count="elementwise")(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        decoder: nn.Module,
        total_count: float | Literal["learned", "elementwise", "network"] = "learned",
    ) -> None:
        super().__init__()
        if isinstance(total_count, str):
            check_choice("total_count", total_count, ["learned", "elementwise", "network"])
        else:
            check_positive("total_count", total_count)
        self.decoder = decoder
        self.total_count = total_count
        if total_count in ("learned", "elementwise"):
            shape = out_shape(decoder, "total_count") if total_count == "elementwise" else ()
            self.raw_total_count = nn.Parameter(torch.full(shape, math.log(math.e - 1)))

    @staticmethod
    def outputs(total_count: float | str = "learned") -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return 2 if total_count == "network" else 1

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        log_mean = decode(self.decoder, z, context)
        dims = event_dims(log_mean, z)
        if self.total_count == "network":
            log_mean, raw = split_output(log_mean, z, 2, "log-mean, total count").unbind()
            total_count = F.softplus(raw) + _LEAST
        elif isinstance(self.total_count, str):
            total_count = (F.softplus(self.raw_total_count) + _LEAST).expand_as(log_mean)
        else:
            total_count = torch.full_like(log_mean, self.total_count)
        logits = log_mean.clamp(-LOG_MEAN, LOG_MEAN) - total_count.log()
        return _StableNegativeBinomial(total_count, logits=logits).to_event(dims)

    def init_bias(self, x: Tensor) -> None:
        """Start the decoder's output bias of the mean at the log of the data mean, clipped from 0.001.

        Args:
            x: the training data, ``[n, *event]``, counts.

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        init_log_bias(self.decoder, x, self.outputs(self.total_count))
