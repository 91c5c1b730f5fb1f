"""The discretised logistic likelihood, and mixtures of it, for values on levels."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions.discretized_logistic import DiscretizedLogisticMixture
from ppl_vae.likelihoods._decoder import bias_and_data, check_levels, decode, event_dims, split_output


class DiscretizedLogistic(nn.Module):
    r"""The likelihood of levels :math:`x_j = k / (L - 1)` that rounded logistic variables have.

    :math:`p(x \mid z) = \prod_j \sum_m w_{jm} [\sigma((x_j + h - \mu_{jm}) / s_{jm}) -
    \sigma((x_j - h - \mu_{jm}) / s_{jm})]`, with :math:`h` half the distance of two levels; the lowest and
    the highest level take the tails, so that the probabilities of all levels sum to one. Channels of a pixel
    are independent given z, unlike those of PixelCNN++.

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517

    Args:
        decoder: network from ``[*batch, latent]`` to the parameters, whose first event dimension is a
            multiple of that of x. With one component there are two numbers for each value, :math:`\mu` for
            all of x and then :math:`\log s`; with more, 3 times ``components``: logits of the weights,
            :math:`\mu` and :math:`\log s`, each of the first component for all of x, then of the next.
            Units are those of x in [0, 1]; :math:`\log s` is clamped to [-7, 7].
        components: the number of components of the mixture.
        levels: the number of levels, from 2.

    Raises:
        TypeError, ValueError: if ``components`` is not a whole number above 0, or ``levels`` from 2.

    Example:
        >>> from ppl_vae.networks import MLP
        >>> likelihood = DiscretizedLogistic(MLP(2, (3 * 5 * 1, 8, 8)), components=5, levels=17)
        >>> likelihood(torch.zeros(4, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, components: int = 1, levels: int = 256) -> None:
        super().__init__()
        self.decoder = decoder
        self.components = check_positive_int("components", components)
        self.levels = check_levels(levels)

    @staticmethod
    def outputs(components: int = 1, levels: int = 256) -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return 2 if components == 1 else 3 * components

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        output = decode(self.decoder, z, context)
        if self.components == 1:
            loc, log_scale = split_output(output, z, 2, "mean, log-scale").unsqueeze(-1).unbind()
            logits = torch.zeros_like(loc)
        else:
            names = "log-weight, mean, log-scale of each component"
            outputs = split_output(output, z, self.outputs(self.components), names).movedim(0, -1)
            logits, loc, log_scale = outputs.chunk(3, -1)
        scale = bounded_scale(log_scale)
        pixels = DiscretizedLogisticMixture(logits, loc, scale, self.levels)
        return pixels.to_event(event_dims(output, z))

    def init_bias(self, x: Tensor) -> None:
        """Start the decoder's output bias at the mean and the spread of the data.

        The means of several components are normal quantiles around the data mean, at equal weights.

        Args:
            x: the training data, ``[n, *event]``, values in [0, 1].

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        count = self.outputs(self.components)
        bias, data = bias_and_data(self.decoder, x, count)
        mean = data.mean(0)
        deviation = data.std(0, correction=0).clamp(min=1 / (self.levels - 1))
        below = (torch.arange(self.components).to(bias) + 0.5) / self.components
        spread = torch.special.ndtri(below).unsqueeze(-1) * deviation
        log_scale = (deviation * math.sqrt(3) / math.pi).log().expand_as(spread)
        logits = torch.zeros_like(spread)[: count - 2 * self.components]
        bias.copy_(torch.cat([logits, mean + spread, log_scale]))
