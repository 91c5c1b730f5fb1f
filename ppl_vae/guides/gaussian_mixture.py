"""The guide of a Gaussian mixture model: the cluster, and the latent vector given the cluster."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_positive_int
from ppl_vae._one_hot import one_hot
from ppl_vae._scales import bounded_scale
from ppl_vae.distributions import NormalMixture
from ppl_vae.guides.amortized import AmortizedGuide


class GaussianMixtureGuide(AmortizedGuide):
    r"""The amortised guide :math:`q(y \mid x) \, q(z \mid x, y)` of a Gaussian mixture model.

    For :class:`ppl_vae.models.GaussianMixtureVAE`. A linear head on the encoder's features, which all
    clusters share, gives the logits of :math:`q(y \mid x)` and, for each cluster, mean and
    :math:`\log \sigma`, clamped to [-7, 7], of :math:`q(z \mid x, y) = N(\mu_y(x), \mathrm{diag}\,
    \sigma_y^2(x))`. The encoder runs once per datum, whatever the number of clusters.

    ``posterior(x)`` is the mixture :math:`q(z \mid x)`, the clusters summed out.

    With ``per_cluster=False`` z and the cluster are independent given x, :math:`q(y \mid x) \, q(z \mid x)`.
    The decoder then runs once per datum where ``EnumELBO`` sums the cluster out, not once for each cluster.

    References:
        Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders (Dilokthanakul et al.,
        2016), arXiv:1611.02648;
        of independent z and cluster: Variational Deep Embedding (Jiang et al., 2017), arXiv:1611.05148

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        components: the number of clusters.
        per_cluster: let q(z given x) be another one for each cluster.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = GaussianMixtureGuide(MLP((1, 8, 8)), 2, components=3)
        >>> x = torch.zeros(5, 1, 8, 8)
        >>> guide.predict_proba(x).shape, guide.predict(x).shape, guide.posterior(x).mean.shape
        (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        latent_dim: int,
        components: int,
        *,
        per_cluster: bool = True,
        features: int | None = None,
    ) -> None:
        d, c = check_positive_int("latent_dim", latent_dim), check_positive_int("components", components)
        super().__init__(encoder, latent_dim, c + 2 * d * (c if per_cluster else 1), features)
        self.components = c
        self.per_cluster = per_cluster

    def _split(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits ``[n, components]``, locations and scales ``[n, components or 1, latent]``."""
        d, c = self.latent_dim, self.components
        k = c if self.per_cluster else 1
        logits, loc, log_scale = outputs.split([c, k * d, k * d], -1)
        scale = bounded_scale(log_scale)
        return logits, loc.unflatten(-1, (k, d)), scale.unflatten(-1, (k, d))

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return q(z | x) of these outputs: logits, then locations, then log scales, by cluster."""
        logits, loc, scale = self._split(outputs)
        if not self.per_cluster:
            return dist.Normal(loc.squeeze(-2), scale.squeeze(-2)).to_event(1)
        return NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return q(y | x) of each cluster, ``[n, components]``, for ``x`` of ``[n, *event]``."""
        return self._split(self.encode(x))[0].softmax(-1)

    def predict(self, x: Tensor) -> Tensor:
        """Return each datum's most probable cluster, ``[n]``, for ``x`` of ``[n, *event]``."""
        return self.predict_proba(x).argmax(-1)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x), or q(z | x, y) of clusters ``y``; event shape ``[latent]``.

        Args:
            x: data ``[n, *event]``.
            y: clusters, whole numbers, ``[*batch, n]`` or ``[*batch, 1]``: one for all data.

        Returns:
            The Distribution, batch shape ``[n]``, or ``[*batch, n]`` given clusters.
        """
        outputs = self.encode(x)
        if y is None:
            return self.family(outputs)
        given = self._given(y, *self._split(outputs)[1:])
        return given.expand(torch.broadcast_shapes(y.shape, given.batch_shape))

    def _given(self, y: Tensor, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Return q(z | x, y)."""
        if not self.per_cluster:
            return dist.Normal(loc.squeeze(-2), scale.squeeze(-2)).to_event(1)
        y = y.expand(*y.shape[:-1], len(loc))
        chosen = one_hot(y, self.components).to(loc.dtype)
        loc, scale = (torch.einsum("...nc,ncd->...nd", chosen, of_clusters) for of_clusters in (loc, scale))
        return dist.Normal(loc, scale).to_event(1)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # clusters are no labels
        """Run the program: sites ``y`` and ``z`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.

        Returns:
            z, ``[*particles, n, latent]``.
        """
        logits, loc, scale = self._split(self.encode(x))
        with pyro.plate("data", x.shape[0], dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=logits))
            return pyro.sample("z", self._given(y, loc, scale))
