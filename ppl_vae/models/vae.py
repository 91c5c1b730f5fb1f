"""The variational autoencoder's model."""

import pyro
from torch import Tensor, nn

from ppl_vae.program import Program, batch_size, check_event


class VAE(Program):
    r"""The model :math:`p(z) \, p(x \mid z)` of one latent vector per datum.

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114

    Args:
        prior: module whose ``forward()`` returns a Distribution over ``z``, event shape ``[latent]``.
        likelihood: module whose ``forward(z)`` returns a Distribution over ``x``.

    Example:
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.priors import StandardNormal
        >>> model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8))))
        >>> model(None, size=3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``z`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw from the prior.
            size: the number of data to draw when ``x`` is None.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, or both are None.
        """
        with pyro.plate("data", batch_size(x, size), dim=-1):
            z = pyro.sample("z", self.prior())
            x_given_z = self.likelihood(z)
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)

    def with_prior(self, prior: nn.Module) -> "VAE":
        """Return a model of this likelihood, the same module, and another prior.

        For a prior that is fitted after training, to draws of the aggregate posterior say. Both models have
        the likelihood's parameters; neither is changed.

        Args:
            prior: module whose ``forward()`` returns a Distribution over ``z``, event shape ``[latent]``.
        """
        model = VAE(prior, self.likelihood)
        model.training = self.training
        return model
