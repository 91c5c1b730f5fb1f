"""Images whose values are drawn one after another, each given those before it."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.distributions.levels import CategoricalLevels, Levels
from ppl_vae.networks.masked_conv import GatedPixelCNN


class AutoregressivePixels(dist.TorchDistribution):
    r"""The distribution :math:`p(x) = \prod_j p(x_j \mid x_{<j})` of images, by a masked network.

    A log-probability is one pass of the network. A draw is a loop over the values of an image, for all images
    at once, that computes each value from the part of the image that it depends on.

    Args:
        network: from images and a feature map to logits, one for each value if there are two levels,
            otherwise one for each level.
        features: the feature map, ``[*batch, features, H, W]``.
        channels: channels of the images.
        levels: the number of levels of a value, from 2.
        mean_draws: the number of draws for the mean.
        validate_args: as in torch.

    Example:
        >>> network = GatedPixelCNN(1, 1, features=4, hidden=8, layers=1)
        >>> images = AutoregressivePixels(network, torch.zeros(3, 4, 5, 5), channels=1)
        >>> x = images.sample()
        >>> x.shape, images.log_prob(x).shape
        (torch.Size([3, 1, 5, 5]), torch.Size([3]))
    """

    arg_constraints = {"features": constraints.independent(constraints.real, 3)}  # noqa: RUF012

    def __init__(
        self,
        network: GatedPixelCNN,
        features: Tensor,
        channels: int,
        levels: int = 2,
        mean_draws: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self.network = network
        self.features = features
        self.levels = levels
        self.mean_draws = mean_draws
        shape = torch.Size((channels, *features.shape[-2:]))
        super().__init__(features.shape[:-3], shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=3)
    def support(self) -> constraints.Constraint:
        """Images of bits, or of levels."""
        value = constraints.boolean if self.levels == 2 else Levels(self.levels)
        return constraints.independent(value, 3)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "AutoregressivePixels":
        """Return the distribution with a larger batch shape."""
        new = self._get_checked_instance(AutoregressivePixels, _instance)
        new.network, new.levels, new.mean_draws = self.network, self.levels, self.mean_draws
        new.features = self.features.expand((*batch_shape, *self.features.shape[-3:]))
        super(AutoregressivePixels, new).__init__(
            torch.Size(batch_shape), self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of images ``[*batch, C, H, W]``."""
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[:-3], self.batch_shape)
        x = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        outputs = self.network(x, self._flat_features(batch))
        return self._values(outputs).log_prob(x).sum((1, 2, 3)).reshape(batch)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch, C, H, W]``."""
        return self._draw(torch.Size(sample_shape))[0]

    @property
    def mean(self) -> Tensor:
        """An unbiased estimate of the mean, ``[*batch, C, H, W]``: there is no closed form.

        It averages the means of the values, each given those before it, along ``mean_draws`` draws.
        """
        return self._draw(torch.Size((self.mean_draws,)))[1].mean(0)

    def _flat_features(self, batch: torch.Size) -> Tensor:
        shape = self.features.shape[-3:]
        return self.features.expand(*batch, *shape).reshape(-1, *shape)

    def _values(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the distributions ``[n, C, H, W]`` of the network's outputs."""
        logits = outputs.unflatten(1, (-1, self.event_shape[0]))
        if self.levels == 2:
            return dist.Bernoulli(logits=logits.squeeze(1), validate_args=False)
        return CategoricalLevels(logits.movedim(1, -1), validate_args=False)

    @torch.no_grad()
    def _draw(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return draws and the means that their values were drawn with."""
        shape = self._extended_shape(sample_shape)
        features = self._flat_features(shape[:-3])
        channels, height, width = self.event_shape
        x = features.new_zeros(len(features), channels, height, width)
        mean, reach = torch.empty_like(x), self.network.reach
        for i in range(height):
            rows = slice(max(0, i - reach), i + 1)
            above = self.network.above(x[:, :, rows], features[:, :, rows])[..., -1:, :]
            for j in range(width):
                columns = slice(max(0, j - reach), j + 1)
                for c in range(channels):
                    outputs = self.network.along(x[:, :, i : i + 1, columns], above[..., columns])
                    values = self._values(outputs[..., -1:])
                    x[:, c, i, j] = values.sample()[:, c, 0, 0]
                    mean[:, c, i, j] = values.mean[:, c, 0, 0]
        return x.reshape(shape), mean.reshape(shape)
