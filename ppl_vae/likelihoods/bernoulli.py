"""The Bernoulli likelihood for binary data."""

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae.likelihoods._decoder import decode, event_dims, init_logit_bias


class _FastBernoulli(dist.Bernoulli):
    """A Bernoulli whose log-probability takes half the passes over memory that torch's takes.

    It keeps the last one for a caller without gradients: the record of a step's terms asks for what the
    estimator has just computed.
    """

    _last: tuple[Tensor, int, Tensor] | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if not torch.is_grad_enabled() and self._last is not None:
            last, version, log_prob = self._last
            if last is value and version == value._version:
                return log_prob
        log_prob = (value * self.logits).sub_(F.softplus(self.logits, threshold=40.0))
        self._last = value, value._version, log_prob.detach()
        return log_prob


class Bernoulli(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j \mathrm{Bernoulli}(x_j; \sigma(f_j(z)))`.

    It is a likelihood of binary data only: binarise grey pixels
    (``load_dataset(..., binarization="dynamic")``) or use ``ContinuousBernoulli``.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

    Args:
        decoder: network from ``[*batch, latent]`` to the logits, ``[*batch, *event]``.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> Bernoulli(MLP(2, (1, 8, 8)))(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        logits = decode(self.decoder, z, context)
        return _FastBernoulli(logits=logits).to_event(event_dims(logits, z))

    def init_bias(self, x: Tensor) -> None:
        """Start the decoder's output bias at the logit of the data mean, clipped to [0.001, 0.999].

        Args:
            x: the training data, ``[n, *event]``, values in [0, 1].

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        init_logit_bias(self.decoder, x)
