"""The Gaussian mixture prior."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions import SharedNormalMixture


class GaussianMixture(nn.Module):
    r"""The prior :math:`p(z) = \sum_c w_c \, N(z; \mu_c, \mathrm{diag}\, \sigma_c^2)`, all of it learned.

    Weights start equal, the means as draws of a normal and the scales equal, so that the whole starts near
    the standard normal. :math:`\log \sigma` is clamped to [-7, 7]. The density takes matrix products: memory
    is of ``[n, components]`` numbers, not ``[n, components, latent]``.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv:1705.07120, where it is "MoG"

    Args:
        latent_dim: the number of latent dimensions.
        components: the number of components.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> prior = GaussianMixture(2, components=10)()
        >>> prior.log_prob(prior.sample((4, 3))).shape
        torch.Size([4, 3])
    """

    def __init__(self, latent_dim: int, components: int) -> None:
        super().__init__()
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.components = check_positive_int("components", components)
        size = (self.components, self.latent_dim)
        self.loc = nn.Parameter(torch.randn(size) * 0.5**0.5)
        self.log_scale = nn.Parameter(torch.full(size, 0.5).log() / 2)
        self.logits = nn.Parameter(torch.zeros(self.components))

    @classmethod
    def from_samples(cls, z: Tensor, components: int, *, seed: int = 0) -> "GaussianMixture":
        """Return the prior fitted to draws of the aggregate posterior, say, by scikit-learn's EM.

        Args:
            z: draws ``[n, latent]``.
            components: the number of components.
            seed: of EM's start.

        Returns:
            A prior of z's dtype and device.

        Raises:
            TypeError, ValueError: if ``z`` has another number of dimensions, or fewer rows than components.

        Example:
            >>> z = torch.randn(200, 2, dtype=torch.float64)
            >>> GaussianMixture.from_samples(z, components=2)().mean.dtype
            torch.float64
        """
        from sklearn.mixture import GaussianMixture as EM

        check_samples(z)
        if check_positive_int("components", components) > len(z):
            raise ValueError(f"components: expected at most the number of draws, {len(z)}, got {components}")
        numbers = z.detach().double().cpu().numpy()
        found = EM(components, covariance_type="diag", random_state=check_seed(seed)).fit(numbers)
        with torch.random.fork_rng(devices=[]):  # the first values are drawn, then overwritten
            prior = cls(z.shape[1], components).to(z)
        with torch.no_grad():
            prior.loc.copy_(torch.as_tensor(found.means_))
            prior.log_scale.copy_(torch.as_tensor(found.covariances_).log() / 2)
            prior.logits.copy_(torch.as_tensor(found.weights_).log())
        return prior

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]`` and event shape ``[latent]``.

        Args:
            context: what the model is conditioned on, if anything; the prior is independent of it.
        """
        scale = bounded_scale(self.log_scale)
        return SharedNormalMixture(self.loc, scale, self.logits.log_softmax(-1))


def check_samples(z: object) -> None:
    """Raise unless ``z`` is a matrix of finite draws."""
    if not isinstance(z, Tensor) or not z.is_floating_point():
        raise TypeError(f"z: expected a tensor of draws [n, latent], got {type(z).__name__}")
    if z.ndim != 2 or not z.numel():
        raise ValueError(f"z: expected draws [n, latent], got shape {list(z.shape)}")
    if not z.isfinite().all():
        raise ValueError("z: expected finite draws, got NaN or infinite ones")
