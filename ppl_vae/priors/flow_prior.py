"""The prior of a normalising flow."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.flows.flow import Flow
from ppl_vae.networks._layers import encode_context


class FlowPrior(nn.Module):
    r"""A standard normal, transformed: :math:`z = f(u)` with :math:`u \sim N(0, I)` and a flow :math:`f`.

    A step of training scores z: of the flows, ``MaskedAutoregressive``, ``AffineCoupling`` and
    ``SplineCoupling`` do so in one pass. The flow's parameters are the prior's. A flow with a
    ``context_dim`` makes a conditional prior.

    References:
        Variational Lossy Autoencoder (Chen et al., 2017), arXiv:1611.02731
        Masked Autoregressive Flow for Density Estimation (Papamakarios et al., 2017), arXiv:1705.07057

    Args:
        flow: a flow of :mod:`ppl_vae.flows` that has an inverse; its ``latent_dim`` is the prior's.

    Raises:
        TypeError: if ``flow`` is no flow.
        ValueError: if it can't score values that it did not draw. On a call: if a flow with ``context_dim``
            gets none, or one of another size.

    Example:
        >>> import torch
        >>> from ppl_vae.flows import MaskedAutoregressive
        >>> prior = FlowPrior(MaskedAutoregressive(2, depth=3, hidden=32))()
        >>> prior.log_prob(torch.zeros(4, 3, 2)).shape
        torch.Size([4, 3])
    """

    zeros: Tensor

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        if not isinstance(flow, Flow):
            raise TypeError(f"flow: expected a flow of ppl_vae.flows, got {type(flow).__name__}")
        if not flow.invertible:
            raise ValueError(
                f"flow: expected one that scores values which it did not draw, got {type(flow).__name__}; "
                "use MaskedAutoregressive, AffineCoupling or SplineCoupling"
            )
        self.flow = flow
        self.register_buffer("zeros", torch.zeros(flow.latent_dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution, with batch shape ``[]``, or ``[n]`` given a context; event ``[latent]``.

        Args:
            context: labels ``[n]`` from 0 to ``context_dim`` - 1, or numbers ``[n, *shape]``, ``context_dim``
                of them; a flow without ``context_dim`` is independent of it.
        """
        size, zeros = self.flow.context_dim or None, self.zeros
        given = None if size is None else encode_context(context, size, (), zeros)
        if given is not None:
            zeros = zeros.expand(*given.shape[:-1], -1)
        base: Any = dist.Normal(zeros, torch.ones_like(zeros)).to_event(1)
        return dist.TransformedDistribution(base, [self.flow(given)])
