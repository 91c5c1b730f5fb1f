"""A mixture of normals that all data share."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.distributions.normal_mixture import NormalMixture


class SharedNormalMixture(dist.TorchDistribution):
    r"""A mixture of diagonal normal distributions, the same for all data.

    The density of n values under C components takes two matrix products and memory for ``[n, C]`` numbers,
    where ``MixtureSameFamily`` takes ``[n, C, latent]``. They are float64 whatever the dtype is:
    :math:`(z - \mu)^2 / \sigma^2`, multiplied out, cancels, which leaves few digits of float32 where
    :math:`\sigma` is small. Draws have the gradients of ``NormalMixture``.

    Args:
        loc: ``[components, latent]``.
        scale: likewise.
        log_weights: ``[components]``, normalised.

    Example:
        >>> loc = torch.tensor([[-1.0, 0.0], [3.0, 0.0]])
        >>> mixture = SharedNormalMixture(loc, torch.ones(2, 2), torch.tensor([0.5, 0.5]).log())
        >>> mixture.mean, mixture.variance
        (tensor([1., 0.]), tensor([5., 1.]))
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as of torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, log_weights: Tensor) -> None:
        self.loc, self.scale, self.log_weights = loc, scale, log_weights
        super().__init__(torch.Size(), loc.shape[-1:])

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SharedNormalMixture":
        """Return the mixture with another batch shape."""
        new: SharedNormalMixture = self._get_checked_instance(SharedNormalMixture, _instance)
        new.loc, new.scale, new.log_weights = self.loc, self.scale, self.log_weights
        super(SharedNormalMixture, new).__init__(torch.Size(batch_shape), self.event_shape, False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Mean, ``[*batch, latent]``."""
        return (self.log_weights.exp() @ self.loc).expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, ``[*batch, latent]``."""
        weights = self.log_weights.exp()
        mean = weights @ self.loc
        return (weights @ (self.scale.square() + (self.loc - mean).square())).expand(self._extended_shape())

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, ``[*batch]``."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = torch.logsumexp(self._log_weighted(value), -1).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _log_weighted(self, value: Tensor) -> Tensor:
        """Return the log of each component's weight times its density, ``[*batch, components]``."""
        log_norm = self.scale.log().sum(-1) + 0.5 * math.log(2 * math.pi) * self.event_shape[0]
        if value.device.type == "mps":  # which has no float64
            deviations = (value.unsqueeze(-2) - self.loc) / self.scale
            return self.log_weights - log_norm - 0.5 * deviations.square().sum(-1)
        z, loc, precision = value.double(), self.loc.double(), self.scale.double().square().reciprocal()
        weighted = precision * loc
        squares = z.square() @ precision.mT - 2 * (z @ weighted.mT) + (weighted * loc).sum(-1)
        return (self.log_weights - log_norm) - 0.5 * squares

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws without gradients, ``[*sample_shape, *batch, latent]``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch, latent]``; gradients take memory for each component."""
        normals = dist.Normal(self.loc, self.scale, validate_args=False).to_event(1)
        weights = dist.Categorical(logits=self.log_weights, validate_args=False)
        trained = any(t.requires_grad for t in (self.loc, self.scale, self.log_weights))
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            mixture = NormalMixture(weights, normals, validate_args=False)
            return mixture.rsample(torch.Size(sample_shape) + self.batch_shape)
