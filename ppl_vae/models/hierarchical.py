"""The model of several stochastic layers."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.program import Program, batch_size, check_event


class HierarchicalVAE(Program):
    r"""The model :math:`p(z_L) \prod_{l < L} p(z_l \mid z_{l+1}) \; p(x \mid z_1)` of L stochastic layers.

    Sites are ``z1``, next to the data, to ``zL`` on top. Without ``layers`` it is :class:`VAE`, but for the
    site's name, ``z1``. With ``skip=True`` each layer depends on all above it, side by side from the nearest
    to the top one, and the data on all layers: :math:`p(z_l \mid z_{l+1}, \dots, z_L)` and :math:`p(x \mid
    z_1, \dots, z_L)`; information then need not pass through every layer to reach the data.

    References:
        Stochastic Backpropagation and Approximate Inference in Deep Generative Models (Rezende et al., 2014),
        arXiv:1401.4082;
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519: two layers;
        skip connections: BIVA (Maaløe et al., 2019), arXiv:1902.02102

    Args:
        prior: module whose ``forward()`` returns a Distribution over the top layer, event shape ``[latent]``.
        layers: the layers below, in the order that they are drawn in, from ``L - 1`` to 1: modules whose
            ``forward(above)`` returns a Distribution over the layer, such as ``ConditionalNormal``.
        likelihood: module whose ``forward(z)`` returns a Distribution over ``x``.
        skip: let every layer and the data depend on all layers above.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.priors import StandardNormal
        >>> model = HierarchicalVAE(StandardNormal(2), (), Bernoulli(MLP(2, (1, 8, 8))))
        >>> model(None, size=3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self, prior: nn.Module, layers: Sequence[nn.Module], likelihood: nn.Module, *, skip: bool = False
    ) -> None:
        super().__init__()
        self.prior = prior
        self.layers = nn.ModuleList(layers)
        self.likelihood = likelihood
        self.skip = skip

    def conditional(self, above: Sequence[Tensor]) -> dist.TorchDistribution:
        """Return the prior of the next layer to be drawn, given those above, the top one first.

        Args:
            above: what has been drawn, ``[*particles, n, latent]`` each; may be empty.
        """
        if not above:
            prior: dist.TorchDistribution = self.prior()
            return prior
        layer: dist.TorchDistribution = self.layers[len(above) - 1](self._seen(above))
        return layer

    def _seen(self, above: Sequence[Tensor]) -> Tensor:
        """Return what a layer depends on."""
        return torch.cat(list(reversed(above)), -1) if self.skip and len(above) > 1 else above[-1]

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``zL`` to ``z1`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw from the prior.
            size: the number of data to draw when ``x`` is None.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or both are None.
        """
        with pyro.plate("data", batch_size(x, size), dim=-1):
            drawn: list[Tensor] = []
            for level in range(len(self.layers) + 1, 0, -1):
                drawn.append(pyro.sample(f"z{level}", self.conditional(drawn)))
            x_given_z = self.likelihood(self._seen(drawn))
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)
