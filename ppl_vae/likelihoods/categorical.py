"""The categorical likelihood for values on levels."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.distributions.levels import CategoricalLevels, level_index
from ppl_vae.likelihoods._decoder import bias_and_data, check_levels, decode, event_dims, split_output


class Categorical(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j \pi_{j, k_j}(z)` of levels :math:`x_j = k_j / (L - 1)`.

    Values are the :math:`L` levels in [0, 1], as ``load_dataset`` gives them without binarisation: 8-bit
    images have 256 levels, the digits 17. Each value has a probability for each level, a softmax of its own;
    that levels are ordered is not built in (``DiscretizedLogistic`` does so). The log-likelihood is a log
    probability, at most 0; divided by :math:`-\log 2` and the number of values, it is bits per dimension.

    References:
        Pixel Recurrent Neural Networks (van den Oord et al., 2016), arXiv:1601.06759

    Args:
        decoder: network from ``[*batch, latent]`` to the logits, ``[*batch, levels * C, ...]`` for data of
            event shape ``[C, ...]``: first those of the lowest level, for all of x, then the next level's.
        levels: the number of levels, from 2.

    Raises:
        TypeError, ValueError: if ``levels`` is not a whole number from 2.

    Example:
        >>> from ppl_vae.networks import MLP
        >>> likelihood = Categorical(MLP(2, (17 * 1, 8, 8)), levels=17)
        >>> likelihood(torch.zeros(5, 2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, levels: int = 256) -> None:
        super().__init__()
        self.decoder = decoder
        self.levels = check_levels(levels)

    @staticmethod
    def outputs(levels: int = 256) -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return levels

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        output = decode(self.decoder, z, context)
        logits = split_output(output, z, self.levels, "one for each of the levels").movedim(0, -1)
        return CategoricalLevels(logits).to_event(event_dims(output, z))

    def init_bias(self, x: Tensor) -> None:
        """Start the decoder's output bias at the log-frequencies of the levels.

        The frequencies are mixed with a thousandth of the uniform distribution.

        Args:
            x: the training data, ``[n, *event]``, values in [0, 1].

        Raises:
            TypeError: if the decoder has no ``output_bias``.
            ValueError: if the data have another size than the decoder's output.
        """
        bias, data = bias_and_data(self.decoder, x, self.levels)
        size = data.shape[1]
        counts = torch.zeros(size * self.levels, dtype=torch.int64, device=data.device)
        for rows in data.split(1000):  # the indices of all data at once would fill the memory
            cells = level_index(rows, self.levels).long() * size + torch.arange(size, device=data.device)
            counts += cells.flatten().bincount(minlength=size * self.levels)
        frequencies = counts.view(self.levels, size).to(bias) / len(data)
        bias.copy_((0.999 * frequencies + 0.001 / self.levels).log())
