"""The variational autoencoder with a Gaussian mixture for its prior, and the cluster as a latent site."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive, check_positive_int
from ppl_vae._one_hot import one_hot
from ppl_vae._scales import bounded_scale
from ppl_vae.program import Program, batch_size, check_event


class GaussianMixtureVAE(Program):
    r"""The model :math:`p(y) \, N(z; \mu_y, \Sigma_y) \, p(x \mid z)` of clustered data.

    Sites ``y``, the cluster, a whole number from 0, ``z`` and ``x``. With
    :class:`ppl_vae.guides.GaussianMixtureGuide`, which has both latent sites, ``EnumELBO`` sums y out, at the
    cost of a run of the decoder for each component. Estimators for reparameterised guides don't take y.

    With ``weights="stick-breaking"`` component k takes a share :math:`v_k` of what those before it leave,
    :math:`\pi_k = v_k \prod_{j < k} (1 - v_j)`, and the last one all the rest: a Dirichlet process mixture,
    truncated. The shares are point estimates, trained by the ELBO, that start at the mean :math:`1 / (1 +
    \alpha)` of their prior :math:`\mathrm{Beta}(1, \alpha)`, whose log density, ``log_prior()``, is no part
    of the model: it belongs to no datum.

    References:
        Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders (Dilokthanakul et al.,
        2016), arXiv:1611.02648;
        Variational Deep Embedding (Jiang et al., 2017), arXiv:1611.05148;
        Stick-Breaking Variational Autoencoders (Nalisnick & Smyth, 2017), arXiv:1605.06197

    Args:
        components: the number of clusters.
        latent_dim: the number of dimensions of z.
        likelihood: module whose ``forward(z)`` returns a Distribution over ``x``.
        weights: p(y): ``"learned"`` (free logits, equal at the start), ``"equal"`` or ``"stick-breaking"``.
        concentration: :math:`\alpha` of the sticks' prior: about :math:`\alpha \log n` clusters are expected
            of n data.
        covariance: of a cluster: ``"diagonal"``, or ``"full"`` by a Cholesky factor that starts diagonal.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, ``weights`` or ``covariance`` is
            unknown, or ``concentration`` is not above 0.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> model = GaussianMixtureVAE(10, 2, Bernoulli(MLP(2, (1, 8, 8))))
        >>> model(None, size=3).shape, model.probs.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([10]))
    """

    def __init__(
        self,
        components: int,
        latent_dim: int,
        likelihood: nn.Module,
        *,
        weights: Literal["learned", "equal", "stick-breaking"] = "learned",
        concentration: float = 1.0,
        covariance: Literal["diagonal", "full"] = "diagonal",
    ) -> None:
        super().__init__()
        self.components = check_positive_int("components", components)
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        check_choice("weights", weights, ("learned", "equal", "stick-breaking"))
        self.weights = weights
        self.concentration = check_positive("concentration", concentration)
        check_choice("covariance", covariance, ("diagonal", "full"))
        self.covariance = covariance
        self.likelihood = likelihood
        self.loc = nn.Parameter(torch.randn(components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))
        if covariance == "full":
            self.below_diagonal = nn.Parameter(torch.zeros(components, latent_dim, latent_dim))
        if weights == "learned":
            self.weight_logits = nn.Parameter(torch.zeros(components))
        elif weights == "stick-breaking":
            start = -torch.tensor(self.concentration).log()  # the logit of 1 / (1 + concentration)
            self.stick_logits = nn.Parameter(start.repeat(components - 1))

    @property
    def log_probs(self) -> Tensor:
        """Log p(y) of each component, ``[components]``."""
        if self.weights == "learned":
            return self.weight_logits.log_softmax(-1)
        if self.weights == "equal":
            return torch.zeros_like(self.loc[:, 0]).log_softmax(-1)
        share, rest = F.logsigmoid(self.stick_logits), F.logsigmoid(-self.stick_logits)
        return F.pad(share, (0, 1)) + F.pad(rest.cumsum(0), (1, 0))

    @property
    def probs(self) -> Tensor:
        """The weights p(y), ``[components]``."""
        return self.log_probs.exp()

    def log_prior(self) -> Tensor:
        """Return log p(v) of the shares under Beta(1, concentration), nats, a scalar.

        Raises:
            ValueError: if the weights are not of sticks.
        """
        if self.weights != "stick-breaking":
            raise ValueError(f"weights: expected 'stick-breaking', got {self.weights!r}")
        alpha = torch.full_like(self.stick_logits, self.concentration)
        return (alpha.log() + (alpha - 1) * F.logsigmoid(-self.stick_logits)).sum()

    def cluster(self, y: Tensor) -> dist.TorchDistribution:
        """Return p(z | y): batch shape that of ``y``, whole numbers; event shape ``[latent]``."""
        chosen = one_hot(y, self.components).to(self.loc.dtype)
        loc, scale = chosen @ self.loc, chosen @ bounded_scale(self.log_scale)
        if self.covariance == "diagonal":
            return dist.Normal(loc, scale).to_event(1)
        below = torch.einsum("...c,cij->...ij", chosen, self.below_diagonal.tril(-1))
        return dist.MultivariateNormal(loc, scale_tril=below + scale.diag_embed())

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``y``, ``z`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw from the prior.
            size: the number of data to draw when ``x`` is None.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or both are None.
        """
        with pyro.plate("data", batch_size(x, size), dim=-1):
            y = pyro.sample("y", dist.Categorical(logits=self.log_probs))
            z = pyro.sample("z", self.cluster(y))
            x_given_z = self.likelihood(z)
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)
