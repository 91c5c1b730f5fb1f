"""The flow guide."""

import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive_int
from ppl_vae.guides.amortized import AmortizedGuide
from ppl_vae.guides.full_rank import full_rank
from ppl_vae.guides.mean_field import mean_field


class FlowGuide(AmortizedGuide):
    r"""The amortised guide :math:`z = f_{c(x)}(z_0)` with a flow :math:`f` and a Gaussian :math:`z_0`.

    .. math:: \log q(z \mid x) = \log N(z_0; \mu(x), \Sigma(x)) - \log |\det \partial f_{c(x)} / \partial z_0|

    A linear head on the encoder's features gives the base's parameters and the context :math:`c(x)`. The
    base is mean-field, or full-rank with a Cholesky factor, as of FullRankGuide; the logarithms of its
    scales are clamped to [-7, 7]. A flow without context has the same parameters
    for all data.

    Draws are scored as they are made. Other values are scored by the flow's inverse; Planar, Radial and
    Sylvester have none, so that what needs it raises: STL_ELBO, DReG, WakeSleep, IWAE that sticks the
    landing.

    References:
        Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), arXiv:1505.05770

    Args:
        encoder: network from ``[n, *event]`` to features ``[n, features]``.
        flow: a flow of :mod:`ppl_vae.flows`; its ``latent_dim`` is the guide's.
        base: "mean-field" or "full-rank".
        features: the encoder's number of features; by default ``encoder.out_features``.

    Raises:
        TypeError: if ``flow`` is not a flow, or ``features`` is None and the encoder has no ``out_features``.
        TypeError, ValueError: if ``features`` is not a whole number above 0.
        ValueError: if ``base`` is not known. On a run, if the encoder gives another number of features.

    Example:
        >>> import torch
        >>> from ppl_vae.flows import InverseAutoregressive
        >>> from ppl_vae.networks import MLP
        >>> guide = FlowGuide(MLP((1, 8, 8)), InverseAutoregressive(2, context_dim=16))
        >>> guide.posterior(torch.zeros(5, 1, 8, 8)).rsample((3,)).shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self, encoder: nn.Module, flow: nn.Module, *, base: str = "mean-field", features: int | None = None
    ) -> None:
        check_choice("base", base, ("mean-field", "full-rank"))
        if not (isinstance(flow, nn.Module) and hasattr(flow, "latent_dim") and hasattr(flow, "context_dim")):
            raise TypeError(
                "flow: expected a module with `latent_dim` and `context_dim`, as of ppl_vae.flows, "
                f"got {type(flow).__name__}"
            )
        d = check_positive_int("flow.latent_dim", flow.latent_dim)
        below = 0 if base == "mean-field" else d * (d - 1) // 2
        context: int = flow.context_dim or 0  # type: ignore[assignment]
        super().__init__(encoder, d, 2 * d + below + context, features)
        self.flow = flow
        self.base = base
        self._sizes = (2 * d + below, context)

    def posterior(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """Return q(z | x): batch shape ``[n]``, event shape ``[latent]``, for ``x`` of ``[n, *event]``."""
        parameters, context = self.encode(x, y).split(self._sizes, -1)
        base = mean_field(parameters) if self.base == "mean-field" else full_rank(parameters, self.latent_dim)
        transform = self.flow(context if self._sizes[-1] else None)
        return dist.TransformedDistribution(base, [transform])
