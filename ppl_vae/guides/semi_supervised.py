"""The guide of the semi-supervised variational autoencoder."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae.guides.mean_field import MeanFieldGuide
from ppl_vae.models.semi_supervised import check_labels, known_labels


class SemiSupervisedGuide(MeanFieldGuide):
    r"""The guide :math:`q(y \mid x) \, q(z \mid x, y)` of ``SemiSupervisedVAE``.

    A classifier gives :math:`q(y \mid x)` where a label is missing; one that is there is certain. The encoder
    takes data and label, and a linear head on its features gives the mean and :math:`\log \sigma` of
    :math:`q(z \mid x, y)`, as in ``MeanFieldGuide``.

    References:
        Semi-Supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298

    Args:
        encoder: network from ``x`` and labels to features ``[n, features]``: one with a ``context`` of the
            number of classes.
        classifier: network from ``x`` to logits ``[n, classes]``.
        latent_dim: the number of latent dimensions.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> guide = SemiSupervisedGuide(MLP((1, 8, 8), context=10), MLP((1, 8, 8), 10), 2)
        >>> guide.predict_proba(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self, encoder: nn.Module, classifier: nn.Module, latent_dim: int, *, features: int | None = None
    ) -> None:
        super().__init__(encoder, latent_dim, features=features)
        self.classifier = classifier

    def labels(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(y | x): batch shape ``[n]``; certain where there is a label in ``y`` ``[n]``, not -1."""
        check_labels(x, y)
        logits: Tensor = self.classifier(x)
        return dist.Categorical(logits=known_labels(logits, y))

    def predict_proba(self, x: Tensor) -> Tensor:
        """Return q(y | x) of each class, ``[n, classes]``, for ``x`` of ``[n, *event]``."""
        logits: Tensor = self.classifier(x)
        return logits.softmax(-1)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x, y): batch shape ``[n]``, event shape ``[latent]``.

        Args:
            x: data ``[n, *event]``.
            y: labels ``[n]``; where one is missing (None or -1), the most probable one stands for it.
        """
        check_labels(x, y)
        return super().posterior(x, self.labels(x, y).probs.argmax(-1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program: sites ``y`` and ``z`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.
            y: labels ``[n]``, whole numbers, -1 where there is none; None if there is none at all.

        Returns:
            z, ``[*particles, n, latent]``.
        """
        with pyro.plate("data", x.shape[0], dim=-1):
            label = pyro.sample("y", self.labels(x, y))
            return pyro.sample("z", super().posterior(x, label))
