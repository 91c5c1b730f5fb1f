"""The bottom-up guide of several stochastic layers."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_sizes
from ppl_vae.guides.mean_field import mean_field
from ppl_vae.program import Program


class HierarchicalGuide(Program):
    r"""The bottom-up guide :math:`q(z_1 \mid x) \, q(z_2 \mid z_1) \cdots q(z_L \mid z_{L-1})`.

    Each layer is a normal of independent dimensions whose mean and log standard deviation, clamped to
    [-7, 7], are a linear head on the features of the layer's own encoder. With one layer it is
    :class:`MeanFieldGuide`, but for the site's name, ``z1``.

    ``KL_ELBO`` needs ``analytic_kl=False`` with it: the guide draws the layers from the bottom up, the model
    from the top down, so that no closed form holds but the top one's.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519, section 5

    Args:
        encoders: a network for each layer, the lowest first: from ``x`` ``[n, *event]``, then from the layer
            below ``[*particles, n, latent]``, to features.
        latent_dims: the number of dimensions of each layer, the lowest first.

    Raises:
        TypeError: if an encoder has no ``out_features``, or a size is no whole number.
        ValueError: if encoders and sizes differ in number, there are none, or a size is not above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = HierarchicalGuide([MLP((1, 8, 8)), MLP(4)], (4, 2))
        >>> [z.shape for z in guide(torch.zeros(5, 1, 8, 8))]
        [torch.Size([5, 4]), torch.Size([5, 2])]
    """

    def __init__(self, encoders: Sequence[nn.Module], latent_dims: Sequence[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.latent_dims = latent_dims
        self.heads = make_heads(encoders, latent_dims)

    def posterior(self, level: int, below: Tensor) -> dist.TorchDistribution:
        """Return q of a layer given the one below, or given ``x`` for layer 1; event shape ``[latent]``."""
        return mean_field(self.heads[level - 1](self.encoders[level - 1](below)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the program: sites ``z1`` to ``zL`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.

        Returns:
            The layers, ``[*particles, n, latent]`` each, the lowest first.
        """
        drawn = [x]
        with pyro.plate("data", x.shape[0], dim=-1):
            for level in range(1, len(self.encoders) + 1):
                drawn.append(pyro.sample(f"z{level}", self.posterior(level, drawn[-1])))
        return drawn[1:]


def make_heads(encoders: Sequence[nn.Module], latent_dims: Sequence[int]) -> nn.ModuleList:
    """Return a linear layer for each encoder, from its features to means and log scales."""
    sizes = check_sizes("latent_dims", latent_dims)
    if len(encoders) != len(sizes) or not sizes:
        raise ValueError(
            f"latent_dims: expected one size for each encoder, {len(encoders)} and at least 1, got {sizes}"
        )
    heads = nn.ModuleList()
    for i, (encoder, size) in enumerate(zip(encoders, sizes, strict=True)):
        features = getattr(encoder, "out_features", None)
        if features is None:
            raise TypeError(
                f"encoders[{i}]: expected a network with `out_features`, got {type(encoder).__name__}"
            )
        heads.append(nn.Linear(features, 2 * size))
    return heads
