"""The masked autoregressive flow."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributions import Transform

from ppl_vae.flows._conditioned import AFFINE, AutoregressiveFlow


class MaskedAutoregressive(AutoregressiveFlow):
    r"""Layers :math:`z_i = (u_i - t_i) e^{-s_i}`, autoregressive in their output.

    :math:`s_i, t_i` are functions of :math:`z_1 \dots z_{i-1}` and of the context.

    Scoring takes one pass, sampling ``latent_dim`` passes per layer: meant for priors. For a guide
    :class:`InverseAutoregressive` is the same with the costs exchanged. Starts near the identity.

    References:
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057
        Zuko's ``MaskedMLP``, ``AutoregressiveTransform`` and ``MonotonicAffineTransform`` are used.


    Args:
        latent_dim: the number of latent dimensions.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: widths of the networks' hidden layers.
        activation: name of the networks' activation, as of :class:`ppl_vae.networks.MLP`.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0.
        ValueError: if ``activation`` is not known.

    Example:
        >>> import torch
        >>> z = MaskedAutoregressive(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
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
    ) -> None:
        super().__init__(latent_dim, context_dim, depth, hidden, activation, AFFINE)

    def forward(self, context: Tensor | None = None) -> Transform:
        """Return the map from noise ``[*particles, n, latent]`` to z.

        Args:
            context: ``[n, context_dim]``, or None for a flow without context.
        """
        return super().forward(context).inv
