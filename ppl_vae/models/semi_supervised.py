"""The semi-supervised variational autoencoder's model."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_at_least, check_positive, check_positive_int
from ppl_vae._one_hot import one_hot
from ppl_vae.distributions import SomeLabels
from ppl_vae.models.cvae import check_takes_labels
from ppl_vae.program import Program, Referring, batch_size, check_event

NEVER = -1e30  # a log-probability whose exponential is 0, and whose product with 0 is 0


class SemiSupervisedVAE(Referring, Program):
    r"""The model :math:`p(y) \, p(z) \, p(x \mid z, y)`, M2, of data of which some have a label y.

    A batch mixes both kinds; the label -1 is a missing one. Of a datum with a label the ELBO bounds
    :math:`\log p(x, y)`, of one without :math:`\log p(x)`, where y is a latent site: ``EnumELBO`` sums it
    out, at the cost of a run of encoder and decoder for each class; ``VIMCO`` and ``ScoreFunctionELBO`` draw
    it. The guide is ``SemiSupervisedGuide``.

    Sites: ``label`` observes the labels that are there (its log-probability, :math:`\log p(y)`, is part of
    the reconstruction, and 0 where none is), ``y`` is the label of every datum, certain where it is known
    (its KL is 0 there), ``z`` and ``x``.

    With a classifier, that of the guide, gradients are those of the ELBO plus
    :math:`\alpha \log q(y \mid x)` of each datum with a label, from which alone the bound would not train the
    classifier. The term acts in the gradient only: its value is 0, so that losses, ELBOs and weights are
    those of the model.

    References:
        Semi-Supervised Learning with Deep Generative Models (Kingma et al., 2014), arXiv:1406.5298

    Args:
        prior: module whose ``forward(y)`` returns a Distribution over ``z``, event shape ``[latent]``;
            M2's leaves y out (``StandardNormal``).
        likelihood: module whose ``forward(z, y)`` returns a Distribution over ``x``; its decoder takes a
            context of ``num_classes``.
        num_classes: the number of classes.
        label_prior: p(y), a positive weight for each class; by default all are equal.
        classifier: the guide's network from ``x`` to the logits of q(y | x), the same object. It is a
            reference: the model's ``parameters()`` and ``state_dict()`` leave it alone.
        alpha: the weight of its classification loss, nats per datum with a label; with 0 there is none.

    Raises:
        TypeError, ValueError: if a number or a weight has a value that is not allowed, there is not one
            weight for each class, or ``alpha`` is above 0 without a classifier.

    Example:
        >>> import torch
        >>> from ppl_vae.guides.semi_supervised import SemiSupervisedGuide
        >>> from ppl_vae.infer import EnumELBO
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.networks import MLP
        >>> from ppl_vae.priors import StandardNormal
        >>> model = SemiSupervisedVAE(StandardNormal(2), Bernoulli(MLP(2, 8, context=3)), 3)
        >>> guide = SemiSupervisedGuide(MLP(8, context=3), MLP(8, 3), 2)
        >>> x, y = model(None, size=4), torch.tensor([2, -1, -1, 0])
        >>> loss = EnumELBO().differentiable_loss(model, guide, x, y)
        >>> guide.predict_proba(x).shape
        torch.Size([4, 3])
    """

    references = ("classifier",)
    label_weights: Tensor

    def __init__(
        self,
        prior: nn.Module,
        likelihood: nn.Module,
        num_classes: int,
        label_prior: Sequence[float] | None = None,
        *,
        classifier: nn.Module | None = None,
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.prior = prior
        check_takes_labels(likelihood)
        self.likelihood = likelihood
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.label_prior = label_prior
        self.classifier = classifier
        self.alpha = check_at_least("alpha", alpha)
        if alpha and classifier is None:
            raise ValueError(f"classifier: expected the guide's for alpha={alpha!r}, got None")
        weights = [1.0] * self.num_classes if label_prior is None else list(label_prior)
        if len(weights) != self.num_classes:
            raise ValueError(
                f"label_prior: expected a weight for each of {num_classes} classes, got {len(weights)}"
            )
        for i, weight in enumerate(weights):
            check_positive(f"label_prior[{i}]", weight)
        self.register_buffer("label_weights", torch.tensor(weights))

    @property
    def log_prior(self) -> Tensor:
        """Log p(y) of each class, ``[num_classes]``."""
        return (self.label_weights / self.label_weights.sum()).log()

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Run the program: sites ``label`` (given ``y``), ``y``, ``z`` and ``x`` in the plate ``data``.

        Args:
            x: data ``[n, *event]``, or None to draw them.
            y: labels ``[n]``, whole numbers, -1 where there is none; None if there is none at all.
            size: the number of data to draw when ``x`` and ``y`` are None.

        Returns:
            x, given or drawn, ``[*particles, n, *event]``.

        Raises:
            ValueError: if ``x`` has another event shape than the likelihood, all three are None, or they are
                not of one number of data.
        """
        check_labels(x, y)
        log_prior, n = self.log_prior, batch_size(x if y is None else y, size)
        if size not in (None, n):
            raise ValueError(f"size: expected the number of data that are given, {n}, got {size}")
        with pyro.plate("data", n, dim=-1):
            if y is not None:
                pyro.sample("label", SomeLabels(log_prior), obs=y)
                if self.alpha and x is not None:
                    pyro.factor("classification", self._classification(x, y))
            label = pyro.sample("y", dist.Categorical(logits=known_labels(log_prior, y)))
            z = pyro.sample("z", self.prior(label))
            if (dims := label.dim()) >= z.dim():  # y is enumerated, z not
                z = z.expand((*label.shape[: dims - z.dim() + 1], *z.shape))
            x_given_z = self.likelihood(z, label)
            check_event(x, x_given_z)
            return pyro.sample("x", x_given_z, obs=x)

    def _classification(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros ``[n]`` with the gradient of alpha * log q(y | x) where there is a label."""
        logits: Tensor = self.classifier(x)  # type: ignore[misc]
        log_q = SomeLabels(logits.log_softmax(-1)).log_prob(y)
        return self.alpha * (log_q - log_q.detach())


def check_labels(x: Tensor | None, y: Tensor | None) -> None:
    """Raise unless labels are whole numbers, one for each datum."""
    if y is None:
        return
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y: expected whole numbers as labels, -1 where there is none, got {y.dtype}")
    if y.dim() != 1 or (x is not None and len(y) != len(x)):
        expected = "n" if x is None else len(x)
        raise ValueError(f"y: expected one label per datum, [{expected}], got {list(y.shape)}")


def known_labels(logits: Tensor, y: Tensor | None) -> Tensor:
    """Return logits that are certain where there is a label, ``[n, classes]``; as they are without ``y``."""
    if y is None:
        return logits
    certain = torch.where(one_hot(y, logits.shape[-1]), 0.0, NEVER)
    return torch.where(y.unsqueeze(-1) < 0, logits, certain.to(logits.dtype))
