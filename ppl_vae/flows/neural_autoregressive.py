"""The neural autoregressive flow."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ppl_vae._checks import check_positive_int
from ppl_vae.flows._bisection import Bisected
from ppl_vae.flows._conditioned import AutoregressiveFlow, Univariate


class NeuralAutoregressive(AutoregressiveFlow):
    r"""Layers of one-hidden-layer sigmoidal networks, each of one dimension, given those before it.

    .. math:: z_i' = \mathrm{logit} \sum_k w_{ik}\, \mathrm{sigmoid}(a_{ik} z_i + b_{ik})

    :math:`w, a, b` are autoregressive: the paper's deep sigmoidal flow. Sampling takes one pass; scoring
    another's draw takes ``latent_dim`` passes per layer, in each of which bisection inverts the maps. The
    inverse has first and second derivatives, no third. All is computed on the log scale, so that it holds
    far out too. Starts near the identity.

    References:
        Neural Autoregressive Flows (Huang et al., 2018), arXiv:1804.00779
        Zuko's ``MaskedMLP`` and ``AutoregressiveTransform`` are used.


    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: widths of the networks' hidden layers.
        activation: name of the networks' activation, as of :class:`ppl_vae.networks.MLP`.
        units: the number of sigmoids per dimension.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``activation`` is not known.

    Example:
        >>> import torch
        >>> z = NeuralAutoregressive(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        depth: int = 4,
        *,
        hidden: int | Sequence[int] = (128,),
        activation: str = "elu",
        units: int = 8,
    ) -> None:
        self.units = check_positive_int("units", units)
        slopes, weights = [math.log(math.e - 1)] * units, [0.0] * units  # after softplus and softmax
        shifts = [i / max(units - 1, 1) - 0.5 for i in range(units)]
        start = (*slopes, *shifts, *weights)
        univariate = Univariate(_Sigmoids, (units, units, units), start)
        super().__init__(latent_dim, context_dim, depth, hidden, activation, univariate)


class _Sigmoids(Bisected):
    def __init__(self, slopes: Tensor, shifts: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.slopes = softplus(slopes) + 1e-3
        self.shifts = shifts
        self.log_weights = weights.log_softmax(-1)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the logarithm of its derivative."""
        inner = self.slopes * x.unsqueeze(-1) + self.shifts
        below, above = logsigmoid(inner), logsigmoid(-inner)
        left = (self.log_weights + below).logsumexp(-1)
        right = (self.log_weights + above).logsumexp(-1)
        slope = (self.log_weights + self.slopes.log() + below + above).logsumexp(-1)
        return left - right, slope - left - right

    def bracket(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the inverse lies, as y does between the least and the greatest of the inner lines."""
        ends = (y.unsqueeze(-1) - self.shifts) / self.slopes
        return ends.amin(-1), ends.amax(-1)
