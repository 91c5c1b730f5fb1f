"""The affine coupling flow."""

from collections.abc import Sequence

from ppl_vae.flows._conditioned import AFFINE, CouplingFlow


class AffineCoupling(CouplingFlow):
    r"""Layers that keep one half of z and scale and shift the other.

    .. math:: z_a' = z_a, \quad z_b' = z_b\, e^{s(z_a, c)} + t(z_a, c)

    Sampling and scoring take one pass each. Starts near the identity.

    References:
        Density estimation using Real NVP (Dinh et al., 2017), arXiv:1605.08803
        Zuko's ``MonotonicAffineTransform`` is used.


    Args:
        latent_dim: the number of latent dimensions, at least 2.
        context_dim: the number of context features; None or 0 for a flow without context.
        depth: the number of layers.
        hidden: widths of the networks' hidden layers.
        activation: name of the networks' activation, as of :class:`ppl_vae.networks.MLP`.

    Raises:
        TypeError, ValueError: if a size is not a whole number above 0, or ``latent_dim`` is 1.
        ValueError: if ``activation`` is not known.

    Example:
        >>> import torch
        >>> z = AffineCoupling(2, 8)(torch.randn(5, 8))(torch.randn(3, 5, 2))
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
