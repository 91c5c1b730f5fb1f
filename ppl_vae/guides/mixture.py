"""The mixture guide."""

from typing import Literal

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive_int
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions import NormalMixture
from ppl_vae.guides.amortized import AmortizedGuide


class MixtureGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(z \mid x) = \sum_c w_c(x) N(z; \mu_c(x), \mathrm{diag}\, \sigma_c^2(x))`.

    A linear head on the encoder's features gives the logits of :math:`w`, :math:`\mu` and
    :math:`\log \sigma`; the latter is clamped to [-7, 7]. Draws are reparameterised, see
    :class:`ppl_vae.distributions.NormalMixture`: every estimator for reparameterised guides takes this one.

    Equal weights, the default, cost at most the divergence of equal weights from the true ones, and a mode
    can have several components. With ``weights="network"`` the gradient of the weights, alone, has a variance
    that grows as :math:`e^{\Delta^2 / 8}` with the distance :math:`\Delta` of the components in standard
    deviations: a draw moves from one to the other through the space between, where draws are few and their
    gradient is large. From :math:`\Delta` of about 5 on, bound the gradient's norm to 1 or so (``clip_norm``
    of ``fit`` and ``SVI``).

    References:
        Implicit Reparameterization Gradients (Figurnov, Mohamed & Mnih, 2018), arXiv:1805.08498
        Stochastic Backpropagation through Mixture Density Distributions (Graves, 2016), arXiv:1607.05690
        Pathwise Derivatives for Multivariate Distributions (Jankowiak & Karaletsos, 2019), arXiv:1806.01856

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        components: the number of components.
        weights: ``"equal"``: all 1 / components; ``"network"``: :math:`w(x)` by the head, equal at the start.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``weights`` is unknown.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = MixtureGuide(MLP((1, 8, 8)), 2, components=3)
        >>> posterior = guide.posterior(torch.zeros(5, 1, 8, 8))
        >>> posterior.mean.shape, posterior.mixture_distribution.probs.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        components: int,
        *,
        weights: Literal["network", "equal"] = "equal",
        features: int | None = None,
    ) -> None:
        d, c = check_positive_int("latent_dim", latent_dim), check_positive_int("components", components)
        check_choice("weights", weights, ("network", "equal"))
        network = weights == "network"
        super().__init__(encoder, latent_dim, c * (network + 2 * d), features)
        self.components = c
        self.weights = weights
        if network:
            nn.init.zeros_(self.head.weight[2 * c * d :])  # equal weights at the start, whatever the data
            nn.init.zeros_(self.head.bias[2 * c * d :])

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the mixture of these outputs: locations, then log scales, by component, and logits."""
        d, c = self.latent_dim, self.components
        loc, log_scale, logits = outputs.split([c * d, c * d, outputs.shape[-1] - 2 * c * d], -1)
        if self.weights == "equal":
            logits = outputs.new_zeros(c).expand(*outputs.shape[:-1], c)
        scale = bounded_scale(log_scale)
        normals = dist.Normal(loc.unflatten(-1, (c, d)), scale.unflatten(-1, (c, d))).to_event(1)
        return NormalMixture(dist.Categorical(logits=logits), normals)
