"""The guide of a deep Markov model."""

import pyro
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_features, check_positive_int
from ppl_vae.guides.mean_field import mean_field
from ppl_vae.networks.recurrent import padding_mask
from ppl_vae.program import Program


class DeepMarkovGuide(Program):
    r"""The structured guide :math:`\prod_t q(z_t \mid z_{t-1}, h_t)` of a ``DeepMarkovModel``.

    :math:`h_t` are an encoder's features of step t: of a recurrent network from the end of the sequence,
    they are what the exact posterior of :math:`z_t` given :math:`z_{t-1}` depends on, the data from t on.
    A combiner, :math:`\frac12 (\tanh(W z_{t-1} + b) + h_t)`, and a linear head give the mean and the log
    standard deviation, which is clamped to [-7, 7].

    References:
        Structured Inference Networks for Nonlinear State Space Models (Krishnan et al., 2017),
        arXiv:1609.09869

    Args:
        encoder: network from ``x`` ``[n, T, *event]``, or from ``x`` and ``lengths``, to features of each
            step, ``[n, T, features]``: ``RecurrentEncoder(..., direction="backward", every_step=True)``.
        latent_dim: the number of latent dimensions.
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if a size is not a whole number above 0.

    Example:
        >>> from ppl_vae.networks.recurrent import RecurrentEncoder
        >>> encoder = RecurrentEncoder(data_dim=88, direction="backward", every_step=True)
        >>> DeepMarkovGuide(encoder, 2)(torch.zeros(3, 5, 88)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(self, encoder: nn.Module, latent_dim: int, *, features: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.latent_dim = check_positive_int("latent_dim", latent_dim)
        self.features = features
        width = check_features(encoder, features)
        self.start = nn.Parameter(torch.zeros(latent_dim))
        self.from_z = nn.Linear(latent_dim, width)
        self.head = nn.Linear(width, 2 * latent_dim)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the program: sites ``z_1`` to ``z_T`` in the plate ``data``.

        Args:
            x: sequences ``[n, T, *event]``.
            lengths: the number of steps of each that are data, integers ``[n]``; None for all.

        Returns:
            The latents, ``[*particles, n, T, latent]``.

        Raises:
            ValueError: if the encoder gives no features of each step.
        """
        features = self.encoder(x) if lengths is None else self.encoder(x, lengths)
        if features.shape[:-1] != x.shape[:2]:
            raise ValueError(
                f"encoder: expected features of each step, {[*x.shape[:2], 'features']} (`every_step=True`), "
                f"got {list(features.shape)}"
            )
        mask = None if lengths is None else padding_mask(lengths, x.shape[1])
        z: list[Tensor] = []
        with pyro.plate("data", len(x), dim=-1):
            last = self.start.expand((len(x), self.latent_dim))
            for t in pyro.markov(range(x.shape[1])):
                hidden = 0.5 * (torch.tanh(self.from_z(last)) + features[:, t])
                q = mean_field(self.head(hidden))
                last = pyro.sample(f"z_{t + 1}", q if mask is None else q.mask(mask[:, t]))
                z.append(last)
        return torch.stack(z, -2)
