"""The conditional variational autoencoder's model."""

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor, nn

from ppl_vae.program import Program, check_event


class CVAE(Program):
    r"""The model :math:`p(z \mid y) \, p(x \mid z, y)` of data x given labels, or any tensor, y.

    Nothing is learned of y, which is given and never drawn: the ELBO and the weights are of
    :math:`\log p(x \mid y)`. With a prior that leaves y out (``StandardNormal``) z is independent of y.
    Structured prediction is the same: y is what is seen, one quadrant of an image say, and x the rest.

    The site ``y`` observes what is given, with log-probability 0, so that labels out of the networks' range
    are found before training.

    References:
        Learning Structured Output Representation using Deep Conditional Generative Models (Sohn et al.,
        2015);
        Semi-Supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298

    Args:
        prior: module whose ``forward(y)`` returns a Distribution over ``z``, event shape ``[latent]``.
        likelihood: module whose ``forward(z, y)`` returns a Distribution over ``x``; its decoder takes a
            context.

    Raises:
        ValueError: if the likelihood is of sequences, whose context is their lengths.

    Example:
        >>> import torch
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.priors import StandardNormal
        >>> model = CVAE(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8), context=10)))
        >>> model(None, torch.tensor([3, 1, 4])).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        check_takes_labels(likelihood)
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``y``, ``z`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw them for the given ``y``.
            y: integer labels ``[n]``, or another tensor ``[n, *shape]``.
            size: the number of data, known from ``y``.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``y`` is None, ``x``, ``y`` and ``size`` are not of one number of data, ``x`` has
                another event shape than the likelihood, or a label is out of the networks' range.
        """
        if y is None:
            raise ValueError(
                "y: expected the labels, or another tensor, that the model is conditioned on, got None; "
                "draw data as `model(None, y)` or `sample(model, given={'y': y})`"
            )
        for name, n in (("x", None if x is None else x.shape[0]), ("size", size)):
            if n not in (None, y.shape[0]):
                raise ValueError(f"{name}: expected as many data as y has, {y.shape[0]}, got {n}")
        with pyro.plate("data", y.shape[0], dim=-1):
            pyro.sample("y", self._given(y), obs=y)
            z = pyro.sample("z", self.prior(y))
            x_given_z = self.likelihood(z, y)
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)

    def _given(self, y: Tensor) -> dist.TorchDistribution:
        """Return a distribution of log-probability 0 whose support is what the networks take for y."""
        support: Any
        if y.is_floating_point():
            support = constraints.independent(constraints.real, y.dim() - 1)
        else:
            classes = classes_of(self)
            support = constraints.integer if classes is None else constraints.integer_interval(0, classes - 1)
        return dist.ImproperUniform(support, (), y.shape[1:]).mask(False)


def classes_of(model: nn.Module) -> int | None:
    """Return how many classes all networks of a model take as labels; None if none says."""
    sizes = [getattr(part, name, None) for part in model.modules() for name in ("context", "num_classes")]
    return min((size for size in sizes if isinstance(size, int)), default=None)


def check_takes_labels(likelihood: nn.Module) -> None:
    """Raise if a likelihood would take labels for the lengths of sequences."""
    if hasattr(likelihood, "max_length"):
        raise ValueError(
            f"likelihood: expected one whose context is y, got {type(likelihood).__name__}, whose context is "
            "the lengths of sequences, as of SequenceVAE"
        )
