"""The autoregressive spline flow."""

from collections.abc import Sequence

from ppl_vae.flows._conditioned import AutoregressiveFlow, spline


class SplineAutoregressive(AutoregressiveFlow):
    r"""Layers :math:`z_i' = f(z_i; \theta_i(z_1 \dots z_{i-1}, c))`, with splines :math:`f`.

    Each dimension has a monotonic rational-quadratic spline on [-bound, bound], the identity outside.
    Sampling takes one pass; scoring another's draw takes ``latent_dim`` passes per layer. The transform's
    ``inv`` is the flow that scores in one pass. Starts near the identity.

    References:
        Neural Spline Flows (Durkan et al., 2019), arXiv:1906.04032
        Zuko's ``MaskedMLP``, ``AutoregressiveTransform`` and ``MonotonicRQSTransform`` are used.


    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: widths of the networks' hidden layers.
        activation: name of the networks' activation, as of :class:`ppl_vae.networks.MLP`.
        bins: the number of the spline's bins, at least 2.
        bound: the spline acts on [-bound, bound].

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``activation`` is not known.

    Example:
        >>> import torch
        >>> z = SplineAutoregressive(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
        >>> z.shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int | None = None,
        depth: int = 4,
        *,
        hidden: int | Sequence[int] = (128,),
        activation: str = "elu",
        bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        univariate = spline(bins, bound)
        self.bins = int(bins)
        self.bound = float(bound)
        super().__init__(latent_dim, context_dim, depth, hidden, activation, univariate)
