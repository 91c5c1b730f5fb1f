"""Mixtures of logistic distributions, discretised to levels in [0, 1]."""

from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.distributions.levels import Levels, level_index


class DiscretizedLogisticMixture(dist.TorchDistribution):
    r"""A mixture of logistic distributions, of which each draw is rounded to the nearest level in [0, 1].

    With :math:`h` half the distance of two levels, a component has
    :math:`P(x) = \sigma(b) - \sigma(a)`, :math:`a = (x - h - \mu) / s`, :math:`b = (x + h - \mu) / s`; the
    lowest level takes all below, the highest all above. The logarithm is computed as
    :math:`\log \sigma(b) + \log \sigma(-a) + \log(1 - e^{a - b})`, in which nothing cancels.

    References:
        PixelCNN++ (Salimans et al., 2017), arXiv:1701.05517

    Args:
        logits: unnormalised log-weights, ``[*batch, components]``.
        loc: the means :math:`\mu` before rounding, in units of x, likewise.
        scale: the scales :math:`s`, in units of x, likewise.
        levels: the number of levels, from 2.
        validate_args: as in torch.

    Example:
        >>> logistic = DiscretizedLogisticMixture(torch.zeros(1), torch.full((1,), 0.5), torch.ones(1), 256)
        >>> logistic.log_prob(torch.arange(256) / 255).exp().sum()
        tensor(1.0000)
    """

    arg_constraints = {  # noqa: RUF012
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None
    ) -> None:
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Levels:
        """The levels."""
        return Levels(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "DiscretizedLogisticMixture":
        """Return the distribution with a larger batch shape."""
        new = self._get_checked_instance(DiscretizedLogisticMixture, _instance)
        shape = (*batch_shape, self.loc.shape[-1])
        new.logits, new.loc, new.scale = (t.expand(shape) for t in (self.logits, self.loc, self.scale))
        new.levels = self.levels
        super(DiscretizedLogisticMixture, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """The mean after rounding, ``[*batch]``: the sum of P(x >= level) over the levels above 0."""
        weights, top = self.logits.softmax(-1), self.levels - 1
        total = torch.zeros_like(self.loc[..., 0])
        for k in range(top):
            above = torch.sigmoid((self.loc - (k + 0.5) / top) / self.scale)
            total = total + (weights * above).sum(-1)
        return total / top

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, ``[*sample_shape, *batch]``."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            which = dist.Categorical(logits=self.logits, validate_args=False).sample(sample_shape)
            loc, scale = (
                t.expand(*shape, t.shape[-1]).gather(-1, which.unsqueeze(-1)).squeeze(-1)
                for t in (self.loc, self.scale)
            )
            x = loc + scale * torch.rand(shape, dtype=loc.dtype, device=loc.device).logit()
            return level_index(x, self.levels) / (self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log-probabilities of levels."""
        if self._validate_args:
            self._validate_sample(value)
        top = self.levels - 1
        k = level_index(value, self.levels).unsqueeze(-1)
        below = F.logsigmoid(((k + 0.5) / top - self.loc) / self.scale)
        above = F.logsigmoid((self.loc - (k - 0.5) / top) / self.scale)
        width = (-torch.expm1(-1 / (top * self.scale))).log()
        inner = (k > 0) & (k < top)
        log_probs = (
            torch.where(k < top, below, 0.0) + torch.where(k > 0, above, 0.0) + torch.where(inner, width, 0.0)
        )
        return (self.logits.log_softmax(-1) + log_probs).logsumexp(-1)
