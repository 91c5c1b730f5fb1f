"""Student's t likelihood, which far values pull less than the normal's."""

import math
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppl_vae._checks import check_choice, check_positive
from ppl_vae._scales import bounded_scale
from ppl_vae.likelihoods._decoder import decode, event_dims, split_output

Choice = float | Literal["learned", "network"]


_LARGE = 30.0  # from here the series is exact to 1e-11


class _StableStudentT(dist.StudentT):
    """Student's t that is exact at many degrees of freedom, where the terms of torch's cancel."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        df = self.df
        # log Gamma((df + 1) / 2) - log Gamma(df / 2) - log(df) / 2, by its series where df is large
        large, small = torch.where(df > _LARGE, df, _LARGE), torch.where(df > _LARGE, _LARGE, df)
        series = (1 / 20 / large.square() - 1 / 24) / large.square() + 1 / 4
        exact = torch.lgamma((small + 1) / 2) - torch.lgamma(small / 2) - small.log() / 2
        ratio = torch.where(df > _LARGE, -series / large - math.log(2) / 2, exact)
        y = (value - self.loc) / self.scale
        kernel = (df + 1) / 2 * torch.log1p(y.square() / df)
        return ratio - math.log(math.pi) / 2 - self.scale.log() - kernel


class StudentT(nn.Module):
    r"""The likelihood :math:`p(x \mid z) = \prod_j t_{\nu_j}(x_j; f_j(z), \sigma_j)`.

    Args:
        decoder: network from ``[*batch, latent]`` to the location, ``[*batch, *event]``. With
            ``scale="network"`` or ``df="network"`` its output has twice the size in the first event
            dimension, with both three times: locations, :math:`\log \sigma`, and what a softplus maps to
            :math:`\nu`.
        scale: the scale :math:`\sigma`: a number (fixed), ``"learned"`` (one number, trained, from 1) or
            ``"network"``; :math:`\log \sigma` of the network is clamped to [-7, 7].
        df: the degrees of freedom :math:`\nu`: a number (fixed; of 1 or less the mean is NaN), ``"learned"``
            (one number, trained, from 4) or ``"network"``. Learned and predicted ones are 1 plus a softplus.

    Raises:
        ValueError: if ``scale`` or ``df`` is none of these, or not above 0.

    Example:
        >>> from ppl_vae.networks import MLP
        >>> StudentT(MLP(2, 6), scale="network", df="learned")(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    def __init__(self, decoder: nn.Module, scale: Choice = 1.0, df: Choice = "learned") -> None:
        super().__init__()
        for name, value in (("scale", scale), ("df", df)):
            if isinstance(value, str):
                check_choice(name, value, ["learned", "network"])
            else:
                check_positive(name, value)
        self.decoder = decoder
        self.scale = scale
        self.df = df
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(()))
        if df == "learned":
            self.raw_df = nn.Parameter(torch.tensor(math.log(math.expm1(3.0))))

    @staticmethod
    def outputs(scale: float | str = 1.0, df: float | str = "learned") -> int:
        """Return how many outputs of the decoder there are for each value of x, by the same arguments."""
        return 1 + (scale == "network") + (df == "network")

    def forward(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the Distribution over x for ``z`` of shape ``[*batch, latent]``, and a context if any."""
        output = decode(self.decoder, z, context)
        dims = event_dims(output, z)
        names = ["location"] + ["log-scale"] * (self.scale == "network") + ["df"] * (self.df == "network")
        loc, *rest = split_output(output, z, len(names), ", ".join(names)).unbind()
        if self.scale == "network":
            scale = bounded_scale(rest[0])
        elif isinstance(self.scale, str):
            scale = self.log_scale.exp()
        else:
            scale = torch.full_like(loc, self.scale)
        if self.df == "network":
            df = 1 + F.softplus(rest[-1])
        elif isinstance(self.df, str):
            df = 1 + F.softplus(self.raw_df)
        else:
            df = torch.full_like(loc, self.df)
        return _StableStudentT(df, loc, scale).to_event(dims)
