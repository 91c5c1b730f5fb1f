"""What guides with an encoder share."""

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_features, check_positive_int
from ppl_vae.program import Program


class AmortizedGuide(Program):
    """A guide whose posterior is a function of the data: a linear head on an encoder's features.

    A family of yours is a subclass: its constructor says how many outputs the head has, and its
    ``family`` makes a Distribution of them.

    Args:
        encoder: network from ``x`` ``[n, *event]``, or from ``x`` and ``y``, to features ``[n, features]``.
        latent_dim: the number of latent dimensions.
        outputs: the number of outputs of the head.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0. On a run, if the encoder gives another
            number of features.
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, outputs: int, features: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.features = features
        self.head = nn.Linear(check_features(encoder, features), outputs)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the head's outputs, ``[n, outputs]``; ``y`` goes to the encoder too, if it is given."""
        features: Tensor = self.encoder(x) if y is None else self.encoder(x, y)
        if features.shape[-1:] != (self.head.in_features,):
            raise ValueError(
                f"features: expected [n, {self.head.in_features}] from {type(self.encoder).__name__}, as its "
                f"`out_features` or the argument says, got {list(features.shape)}"
            )
        outputs: Tensor = self.head(features)
        return outputs

    def family(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the distribution of z that the head's outputs ``[n, outputs]`` are the parameters of."""
        raise NotImplementedError

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x): batch shape ``[n]``, event shape ``[latent]``, for ``x`` of ``[n, *event]``."""
        return self.family(self.encode(x, y))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Run the program: site ``z`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``.
            y: labels ``[n, ...]``, for an encoder that takes them.

        Returns:
            z, ``[*particles, n, latent]``.
        """
        with pyro.plate("data", x.shape[0], dim=-1):
            return pyro.sample("z", self.posterior(x) if y is None else self.posterior(x, y))
