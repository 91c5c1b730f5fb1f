"""The conditional normal prior."""

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_features, check_positive_int
from ppl_vae.guides.mean_field import mean_field
from ppl_vae.networks._layers import encode_context


class ConditionalNormal(nn.Module):
    r"""The prior :math:`p(z \mid y) = N(z; \mu(y), \mathrm{diag}\, \sigma^2(y))` of a conditional model.

    A linear head on the network's features gives :math:`\mu` and :math:`\log \sigma`; the latter is clamped
    to [-7, 7].

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn et al.,
        2015), NeurIPS

    Args:
        network: network from the context ``[n, *event]``, or from one-hot labels ``[n, num_classes]``, to
            features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        features: the network's number of features; by default ``network.out_features``.
        num_classes: the number of classes, where the context are labels: whole numbers ``[n]``, which are
            one-hot encoded.

    Raises:
        TypeError: if ``features`` is None and the network has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0. On a call: if there is no context, or
            labels without ``num_classes``.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> prior = ConditionalNormal(MLP(10, hidden=16), 2, num_classes=10)
        >>> prior(torch.tensor([3, 1, 4])).batch_shape
        torch.Size([3])
    """

    def __init__(
        self,
        network: nn.Module,
        latent_dim: int,
        *,
        features: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.features = features
        self.num_classes = None if num_classes is None else check_positive_int("num_classes", num_classes)
        self.head = nn.Linear(check_features(network, features), 2 * self.latent_dim)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[n]`` and event shape ``[latent]``.

        Args:
            context: labels ``[n]`` or any floating-point tensor ``[n, *event]`` that the network takes.
        """
        if context is None:
            raise ValueError("context: expected labels or what else the prior is conditioned on, got None")
        if not context.is_floating_point():
            if self.num_classes is None:
                raise TypeError(
                    f"context: expected floating point as num_classes is None, got {context.dtype}"
                )
            context = encode_context(context, self.num_classes, (), self.head.weight)
        return mean_field(self.head(self.network(context)))
