"""The autoregressive prior."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppl_vae._checks import check_choice, check_positive_int, check_sizes
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions.normal_mixture import NormalMixture
from ppl_vae.flows import _zuko
from ppl_vae.flows.flow import Parameters
from ppl_vae.networks._layers import ACTIVATIONS


class AutoregressivePrior(nn.Module):
    r"""The prior :math:`p(z) = \prod_i p(z_i \mid z_{<i})` of normals, or of mixtures of normals.

    A masked network of all :math:`z_{<i}` gives means, log standard deviations (clamped to [-7, 7]) and
    weights. Scoring takes one pass, sampling ``latent_dim`` passes. Starts near the standard normal; the
    means of several components start spread over [-1, 1].

    References:
        MADE: Masked Autoencoder for Distribution Estimation (Germain et al., 2015), arXiv:1502.03509
        RNADE: The real-valued neural autoregressive density-estimator (Uria et al., 2013), arXiv:1306.0186
        Zuko's ``MaskedMLP`` is used.

    Args:
        latent_dim: the number of latent dimensions.
        hidden: widths of the network's hidden layers.
        components: the number of normals that each conditional density mixes.
        activation: name of the network's activation, as of :class:`ppl_vae.networks.MLP`.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``activation`` is not known.

    Example:
        >>> prior = AutoregressivePrior(3, hidden=16, components=4)()
        >>> prior.log_prob(prior.sample((4, 3))).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        latent_dim: int,
        hidden: int | Sequence[int] = (128,),
        components: int = 1,
        *,
        activation: str = "elu",
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.hidden = hidden
        self.components = check_positive_int("components", components)
        self.activation = activation
        widths = check_sizes("hidden", hidden)
        k = self.components
        sizes = (k, k, 0 if k == 1 else k)  # means, log scales, logits
        self._sizes = sizes
        with torch.device("cpu"):  # masks are made by looking at values, which the device "meta" has not
            start = torch.zeros(sum(sizes))
            if k > 1:
                start[:k] = torch.linspace(-1, 1, k)
            self.network = self._network(start, widths)

    def _network(self, start: Tensor, widths: tuple[int, ...]) -> Any:
        """Return the masked network, whose outputs for each dimension start near ``start``."""
        if self.latent_dim == 1:  # nothing to depend on
            return Parameters((start + 0.01 * torch.randn_like(start)).unsqueeze(0), None)
        order = torch.arange(self.latent_dim)
        adjacency = (order.unsqueeze(-1) > order).repeat_interleave(len(start), 0)
        activation = ACTIVATIONS[self.activation]
        network = _zuko.MaskedMLP(adjacency, hidden_features=widths, activation=activation)
        last: Any = list(network.children())[-1]
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.copy_(start.repeat(self.latent_dim))
        return network

    def conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return means, standard deviations and log weights of each z_i given z_1 ... z_{i-1}.

        Args:
            z: ``[*batch, latent]``.

        Returns:
            ``[*batch, latent, components]`` each; None for the weights of one component.
        """
        if self.latent_dim == 1:
            flat = self.network(None).expand(*z.shape, -1)
        else:
            flat = self.network(z).unflatten(-1, (self.latent_dim, -1))
        loc, log_scale, logits = flat.split(self._sizes, -1)
        scale = bounded_scale(log_scale)
        return loc, scale, logits.log_softmax(-1) if self.components > 1 else None

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]`` and event shape ``[latent]``.

        Args:
            context: what the model is conditioned on, if anything; the prior is independent of it.
        """
        anywhere = next(self.network.parameters())
        return _Autoregressive(self, anywhere.new_zeros(self.latent_dim))


class _Autoregressive(dist.TorchDistribution):
    """The product of the conditional densities."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as of torch
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, prior: AutoregressivePrior, zeros: Tensor) -> None:
        self.prior, self.zeros = prior, zeros
        super().__init__(torch.Size(), zeros.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Autoregressive":
        new: _Autoregressive = self._get_checked_instance(_Autoregressive, _instance)
        new.prior, new.zeros = self.prior, self.zeros
        super(_Autoregressive, new).__init__(torch.Size(batch_shape), self.event_shape, False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, scale, log_weights = self.prior.conditionals(value)
        deviations = (value.unsqueeze(-1) - loc) / scale
        log_density = -0.5 * deviations.square() - scale.log() - 0.5 * math.log(2 * math.pi)
        if log_weights is None:
            log_prob = log_density.squeeze(-1).sum(-1)
        else:
            log_prob = torch.logsumexp(log_weights + log_density, -1).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        zeros = self.zeros.expand(self._extended_shape(sample_shape))
        drawn: list[Tensor] = []
        for i in range(self.prior.latent_dim):
            z = torch.cat([*drawn, zeros[..., i:]], -1)
            loc, scale, log_weights = self.prior.conditionals(z)
            loc, scale = loc[..., i, :], scale[..., i, :]
            if log_weights is None:
                drawn.append(loc + scale * torch.randn_like(loc))
            else:
                normals = dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1), validate_args=False).to_event(1)
                weights = dist.Categorical(logits=log_weights[..., i, :], validate_args=False)
                drawn.append(NormalMixture(weights, normals, validate_args=False).rsample())
        return torch.cat(drawn, -1)
