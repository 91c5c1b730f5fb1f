"""The continuous Bernoulli likelihood for data in [0, 1]."""

import math

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae.likelihoods._decoder import decode, event_dims, init_logit_bias


class _StableContinuousBernoulli(dist.ContinuousBernoulli):
    """A continuous Bernoulli whose density is right at any logit; torch's loses mass beyond 16."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits = self.logits
        near_zero = logits.abs() < 0.1
        square = torch.where(near_zero, logits, 0.0).square()
        series = math.log(2) + torch.log1p(square / 12 - square**2 / 720 + square**3 / 30240)
        away = torch.where(near_zero, 1.0, logits)
        log_constant = torch.where(near_zero, series, (away / torch.tanh(away / 2)).log())
        return value * logits - F.softplus(logits, threshold=40.0) + log_constant


class ContinuousBernoulli(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j C(\lambda_j) \lambda_j^{x_j} (1 - \lambda_j)^{1 - x_j}`.

    Here :math:`\lambda = \sigma(f(z))`, and :math:`C` is the constant that a Bernoulli on grey
    pixels leaves out. The density is over [0, 1], so that its log may be above 0.

    References:
        The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (Loaiza-Ganem & Cunningham, 2019), arXiv:1907.06845

    Args:
        decoder: network from ``[*batch, latent]`` to the logits, ``[*batch, *event]``.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> ContinuousBernoulli(MLP(2, (1, 8, 8)))(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        logits = decode(self.decoder, z, context)
        return _StableContinuousBernoulli(logits=logits).to_event(event_dims(logits, z))

    def init_bias(self, x: Tensor) -> None:
        r"""Start the decoder's output bias at the logit of the data mean.

        The mean of a continuous Bernoulli is nearer to 1/2 than its :math:`\lambda`, so this is a
        start in the right direction, not the exact data mean.

        Args:
            x: the training data, ``[n, *event]``, values in [0, 1].

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        init_logit_bias(self.decoder, x)
