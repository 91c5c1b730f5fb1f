"""The VampPrior."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae._checks import check_number, check_positive_int, check_sizes
from ppl_vae.distributions import SharedMixture, SharedNormalMixture
from ppl_vae.guides.amortized import AmortizedGuide
from ppl_vae.program import Referring


class VampPrior(Referring):
    r"""The mixture of the guide's posteriors of pseudo-inputs, :math:`p(z) = \sum_c w_c \, q(z \mid u_c)`.

    The pseudo-inputs :math:`u_c` are learned, and clamped to ``bounds``: one that leaves them has no
    gradient any more. They start at random; ``init_pseudo_inputs`` has them start at data, which is better
    for images. Each call runs the encoder once on all of them, whatever the number of particles. With a
    mean-field guide the density takes matrix products; another one's is scored component by component, in
    memory for ``[n, components, latent]`` numbers, and has to score values that it did not draw.

    The guide is the model's own, trained through the prior too. It is a reference: ``parameters()``,
    ``state_dict()``, ``train()`` and ``to()`` leave it alone, and another can be set as ``prior.guide``. A
    saved pair is loaded with the loaded guide in the prior. To keep the model apart from a guide that goes
    on training, give the prior a copy.

    References:
        VAE with a VampPrior (Tomczak & Welling, 2018), arXiv:1705.07120

    Args:
        guide: the guide that the model is trained with, or the one that it starts from: any with a
            ``posterior(x)`` that is a function of x alone.
        x_shape: event shape of the data, a size or several.
        components: the number of pseudo-inputs.
        bounds: least and largest value of the data, or None for unbounded ones.
        learn_weights: learn the weights too; else they are equal, as in the paper.

    Raises:
        TypeError: if ``guide`` has no ``posterior``.
        ValueError: if the guide's encoder takes tokens.
        TypeError, ValueError: if a size is not a whole number above 0, or ``bounds`` are no interval. On a
            call: if the posterior has another batch shape than one for each pseudo-input.

    Example:
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> from ppl_vae.models import VAE
        >>> from ppl_vae.networks import MLP
        >>> guide = MeanFieldGuide(MLP((1, 8, 8)), 2)
        >>> prior = VampPrior(guide, (1, 8, 8), components=50)
        >>> prior.init_pseudo_inputs(torch.rand(100, 1, 8, 8))
        >>> model = VAE(prior, Bernoulli(MLP(2, (1, 8, 8))))
        >>> prior().sample((3,)).shape
        torch.Size([3, 2])
    """

    references = ("guide",)
    guide: Any
    logits: nn.Parameter | None

    def __init__(
        self,
        guide: nn.Module,
        x_shape: int | Sequence[int],
        components: int = 500,
        *,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        learn_weights: bool = False,
    ) -> None:
        super().__init__()
        if not (isinstance(guide, nn.Module) and callable(getattr(guide, "posterior", None))):
            raise TypeError(f"guide: expected a guide with a `posterior`, got {type(guide).__name__}")
        if any(getattr(part, "vocabulary", None) for part in guide.modules()):
            raise ValueError("guide: expected an encoder of reals, got one of tokens, which can't be learned")
        shape = check_sizes("x_shape", x_shape)
        self.guide = guide
        self.x_shape = x_shape
        self.components = check_positive_int("components", components)
        self.bounds = None if bounds is None else _check_bounds(bounds)
        self.learn_weights = learn_weights
        if self.bounds is None:
            start = torch.randn(self.components, *shape)
        else:
            low, high = self.bounds
            start = low + (high - low) * torch.rand(self.components, *shape)
        self.pseudo_inputs = nn.Parameter(start)
        self.register_parameter(
            "logits", nn.Parameter(torch.zeros(self.components)) if learn_weights else None
        )

    @torch.no_grad()
    def init_pseudo_inputs(self, x: Tensor) -> None:
        """Let the pseudo-inputs start at data, at as many of them as there are components, chosen at random.

        Args:
            x: data ``[n, *x_shape]``, at least one for each component.

        Raises:
            ValueError: if ``x`` has another event shape, or fewer data than there are components.
        """
        if x.shape[1:] != self.pseudo_inputs.shape[1:] or len(x) < self.components:
            expected = [self.components, *self.pseudo_inputs.shape[1:]]
            raise ValueError(f"x: expected data of shape {expected} or more of them, got {list(x.shape)}")
        chosen = torch.randperm(len(x))[: self.components].to(x.device)
        self.pseudo_inputs.copy_(x[chosen])

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]`` and event shape ``[latent]``.

        Args:
            context: what the model is conditioned on, if anything; the prior is independent of it.
        """
        u = self.pseudo_inputs if self.bounds is None else self.pseudo_inputs.clamp(*self.bounds)
        if self.logits is None:
            log_weights = u.new_full((self.components,), -math.log(self.components))
        else:
            log_weights = self.logits.log_softmax(-1)
        guide = self.guide
        if isinstance(guide, AmortizedGuide) and type(guide).family is not AmortizedGuide.family:
            outputs = guide.encode(u)  # from which components can be picked without another pass
            components: Any = guide.family(outputs)
        else:
            outputs, components = None, guide.posterior(u)
        if components.batch_shape != (self.components,):
            raise ValueError(
                f"guide: expected a posterior of batch shape {[self.components]} for as many pseudo-inputs, "
                f"got {list(components.batch_shape)}"
            )
        if _is_mean_field(components):
            return SharedNormalMixture(components.base_dist.loc, components.base_dist.scale, log_weights)

        def select(index: Tensor) -> Any:
            return guide.posterior(u[index]) if outputs is None else guide.family(outputs[index])

        return SharedMixture(components, log_weights, select)


def _is_mean_field(posterior: Any) -> bool:
    return (
        type(posterior) is dist.Independent
        and posterior.reinterpreted_batch_ndims == 1
        and isinstance(posterior.base_dist, torch.distributions.Normal)
    )


def _check_bounds(bounds: Any) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds: expected a least and a largest value, or None, got {bounds!r}")
    low, high = (check_number(f"bounds[{i}]", value) for i, value in enumerate(bounds))
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"bounds: expected a least and a larger value, both finite, got {bounds!r}")
    return low, high
