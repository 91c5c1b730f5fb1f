"""The top-down guide that shares the model's layers."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ppl_vae.guides.hierarchical import make_heads
from ppl_vae.guides.mean_field import mean_field
from ppl_vae.models.hierarchical import HierarchicalVAE
from ppl_vae.program import Program, Referring


class LadderGuide(Referring, Program):
    r"""The ladder guide :math:`q(z_L \mid x) \prod_{l < L} q(z_l \mid z_{l+1}, \dots, z_L, x)`.

    A deterministic pass upwards gives each layer :math:`\hat\mu_l(x), \hat\sigma_l(x)`. The pass downwards
    draws the layers in the model's order and combines, by their precisions, what the data say of a layer with
    what the model's own networks say of it, given the layers above:

    .. math:: \sigma_l^{-2} = \hat\sigma_l^{-2} + \sigma_{p,l}^{-2}, \qquad
        \mu_l = \sigma_l^2 (\hat\mu_l \hat\sigma_l^{-2} + \mu_{p,l} \sigma_{p,l}^{-2})

    The top layer is :math:`N(\hat\mu_L, \hat\sigma_L^2)`. The gradient of the guide's density reaches the
    model's layers too.

    The model is a reference, which ``parameters()`` and ``state_dict()`` leave out; another can be set as
    ``guide.model``. A pair that runs with another model than the guide's raises an error.

    References:
        Ladder Variational Autoencoders (Sønderby et al., 2016), arXiv:1602.02282

    Args:
        encoders: a network for each layer, the lowest first: from ``x`` ``[n, *event]``, then from the
            features of the one before, to features.
        latent_dims: the number of dimensions of each layer, the lowest first.
        model: the model, whose layers below the top are normal distributions of independent dimensions.

    Raises:
        TypeError: if an encoder has no ``out_features``, a size is no whole number, or the model is no
            ``HierarchicalVAE``.
        ValueError: if the numbers of encoders, sizes and layers differ, or a size is not above 0. On a run:
            if a layer of the model is no such distribution.

    Example:
        >>> import torch
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.priors import StandardNormal
        >>> model = HierarchicalVAE(StandardNormal(2), (), Bernoulli(MLP(2, (1, 8, 8))))
        >>> guide = LadderGuide([MLP((1, 8, 8))], [2], model)
        >>> [z.shape for z in guide(torch.zeros(5, 1, 8, 8))]
        [torch.Size([5, 2])]
    """

    references = ("model",)
    model: HierarchicalVAE

    def __init__(
        self, encoders: Sequence[nn.Module], latent_dims: Sequence[int], model: HierarchicalVAE
    ) -> None:
        super().__init__()
        if not isinstance(model, HierarchicalVAE):
            raise TypeError(f"model: expected a HierarchicalVAE, got {type(model).__name__}")
        if len(encoders) != len(model.layers) + 1:
            raise ValueError(
                f"encoders: expected one for each of the model's {len(model.layers) + 1} layers, "
                f"got {len(encoders)}"
            )
        self.encoders = nn.ModuleList(encoders)
        self.latent_dims = latent_dims
        self.heads = make_heads(encoders, latent_dims)
        self.model = model

    def encode(self, x: Tensor) -> list[dist.TorchDistribution]:
        """Return what the data say of each layer, the lowest first: normals of batch shape ``[n]``."""
        found = []
        for encoder, head in zip(self.encoders, self.heads, strict=True):
            x = encoder(x)
            found.append(mean_field(head(x)))
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the program: sites ``zL`` to ``z1`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.

        Returns:
            The layers, ``[*particles, n, latent]`` each, the lowest first.
        """
        bottom_up = self.encode(x)
        drawn: list[Tensor] = []
        with pyro.plate("data", x.shape[0], dim=-1):
            for level in range(len(bottom_up), 0, -1):
                posterior = bottom_up[level - 1]
                if drawn:
                    posterior = combine(posterior, self.model.conditional(drawn), level)
                drawn.append(pyro.sample(f"z{level}", posterior))
        return drawn[::-1]


def combine(data: Any, prior: Any, level: int) -> dist.TorchDistribution:
    """Return the normal proportional to the product of two of independent dimensions.

    Raises:
        ValueError: if the second is none.
    """
    base = prior.base_dist if isinstance(prior, Independent) else None
    if not isinstance(base, Normal) or prior.reinterpreted_batch_ndims != 1:
        raise ValueError(
            f"model: expected a normal distribution of independent dimensions at site 'z{level}', whose "
            f"precision is combined with that of the data, got {type(base or prior).__name__}"
        )
    own, other = data.base_dist.scale.square(), base.scale.square()
    total = own + other
    loc = (data.base_dist.loc * other + base.loc * own) / total
    return dist.Normal(loc, (own * other / total).sqrt()).to_event(1)
