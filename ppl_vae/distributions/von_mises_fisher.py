"""The von Mises-Fisher distribution, with gradients."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.kl import register_kl

from ppl_vae.distributions import _polar_angle
from ppl_vae.distributions.hyperspherical_uniform import (
    HypersphericalUniform,
    check_same_sphere,
    check_sphere,
    log_area,
)


class VonMisesFisher(dist.TorchDistribution):
    r"""The density :math:`C_d(\kappa) \, e^{\kappa \mu^T x}` on the unit sphere :math:`S^{d-1}`.

    The constant is an integral over the polar angle by Gauss-Legendre quadrature, right to a relative
    1e-10 for :math:`d` to 500 and :math:`\kappa` from 1e-3 to 1e5. The polar angle of a draw comes from the
    inverse of its cumulative distribution, without rejections; its gradient to :math:`\kappa` is that of
    implicit reparameterisation, and the gradient to :math:`\mu` is that of the rotation which carries the
    mean direction. Gradients of draws are of first order.

    References:
        Hyperspherical Variational Auto-Encoders (Davidson et al., 2018), arXiv:1804.00891;
        Implicit Reparameterization Gradients (Figurnov et al., 2018), arXiv:1805.08498

    Args:
        loc: the mean direction, unit vectors ``[*batch, d]``, d at least 2.
        concentration: :math:`\kappa` above 0, ``[*batch]``.
        validate_args: whether to check values; by default torch's.

    Raises:
        ValueError: if ``loc`` has no dimension of at least 2 entries, or the shapes don't fit.

    Example:
        >>> import torch
        >>> vmf = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(5.0))
        >>> vmf.mean  # 1 / tanh(5) - 1 / 5 along loc
        tensor([0.0000, 0.0000, 0.8001])
        >>> vmf.rsample((7,)).shape
        torch.Size([7, 3])
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.positive}  # noqa: RUF012
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None) -> None:
        if not loc.dim():
            raise ValueError("loc: expected unit vectors [*batch, d], got a number")
        dim = check_sphere("loc.shape[-1]", loc.shape[-1])
        try:
            batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        except RuntimeError:
            raise ValueError(
                f"concentration: expected a shape that broadcasts with loc's batch shape "
                f"{list(loc.shape[:-1])}, got {list(concentration.shape)}"
            ) from None
        self.loc = loc.expand(*batch, dim)
        self.concentration = concentration.expand(batch)
        # of the shape that came: the integrals cost more than all else
        self._own = concentration
        self._log_integral, self._versine = _polar_angle.integrate(concentration, dim)
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """``[*batch, d]``, inside of the sphere."""
        return self.loc * (1 - self._versine).to(self.loc).unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        """Of each coordinate, ``[*batch, d]``."""
        # E[sin^2 t] = (d - 1) E[cos t] / kappa
        cosine = 1 - self._versine
        across = cosine / self._own.to(cosine)
        along = self._versine * (1 + cosine) - (self.event_shape[0] - 1) * across
        across, along = (x.to(self.loc).unsqueeze(-1) for x in (across, along))
        return across + (along - across) * self.loc**2

    def expand(self, batch_shape: Any, _instance: Any = None) -> "VonMisesFisher":
        """Return the distribution with another batch shape."""
        new: VonMisesFisher = self._get_checked_instance(VonMisesFisher, _instance)
        shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(shape + self.event_shape)
        new.concentration = self.concentration.expand(shape)
        new._own, new._log_integral, new._versine = self._own, self._log_integral, self._versine
        super(VonMisesFisher, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log of the density over the sphere's area, ``[*sample, *batch]``."""
        if self._validate_args:
            self._validate_sample(value)
        # mu^T x - 1 = - |x - mu|^2 / 2, which loses no digits near the mean direction
        distance = (value - self.loc).square().sum(-1)
        return -0.5 * self.concentration * distance - self._log_constant().to(distance)

    def entropy(self) -> Tensor:
        """Return the entropy, ``[*batch]``, nats."""
        entropy = self._own.to(self._versine) * self._versine + self._log_constant()
        return entropy.to(self.loc).expand(self.batch_shape)

    def _log_constant(self) -> Tensor:
        """Return the log of the integral of exp(kappa (mu^T x - 1)) over the sphere."""
        return self._log_integral + _log_area_across(self.event_shape[0])

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008, as in torch
        """Return unit vectors, ``[*sample, *batch, d]``."""
        loc, shape = self.loc.detach(), self._extended_shape(sample_shape)
        with torch.no_grad():
            angle, slope = self._angles(shape[:-1])
            sine = angle.sin()
            cosine, outwards, sine = (x.to(loc).unsqueeze(-1) for x in (angle.cos(), slope / sine, sine))
            # about the first axis, then reflected so that the axis falls on loc or its opposite
            first = loc[..., :1]
            sign = torch.where(first < 0.0, -1.0, 1.0).to(loc)
            across = torch.randn((*shape[:-1], shape[-1] - 1), dtype=loc.dtype, device=loc.device)
            length = across.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(loc.dtype).tiny)
            about = torch.cat([sign * cosine, across * (sine / length)], -1)
            normal = torch.cat([first + sign, loc[..., 1:]], -1)
            x = normal * ((normal * about).sum(-1, keepdim=True) / (1.0 + first.abs())) - about
            x = torch.nn.functional.normalize(x, dim=-1)
        # zero, with gradients: how far loc turns, and how far a change of the concentration moves x
        turned = self.loc - loc
        moved = outwards * (self.concentration - self.concentration.detach()).unsqueeze(-1)
        falls = moved + (x * turned).sum(-1, keepdim=True)
        return x * (1.0 + cosine * moved) + cosine * turned - loc * falls

    def _angles(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return polar angles of draws and their derivatives by the concentration."""
        own = (1,) * (len(shape) - self._own.dim()) + tuple(self._own.shape)
        kept = [i for i, size in enumerate(own) if size == shape[i]]
        free = [i for i, size in enumerate(own) if size != shape[i]]
        draws = torch.Size(shape[i] for i in free).numel()
        k, log_integral, versine = (x.reshape(-1) for x in (self._own, self._log_integral, self._versine))
        order = [(*kept, *free).index(i) for i in range(len(shape))]
        found = _polar_angle.draw(k, log_integral, versine, self.event_shape[0], draws)
        angle, slope = (x.reshape([shape[i] for i in (*kept, *free)]).permute(order) for x in found)
        return angle, slope


def _log_area_across(dim: int) -> float:
    """Return the log of the area of the sphere of directions across an axis."""
    return log_area(dim - 1)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_to_uniform(q: VonMisesFisher, p: HypersphericalUniform) -> Tensor:
    check_same_sphere(q, p)
    return p.entropy() - q.entropy()


@register_kl(VonMisesFisher, VonMisesFisher)
def _kl_to_von_mises_fisher(q: VonMisesFisher, p: VonMisesFisher) -> Tensor:
    check_same_sphere(q, p)
    # E[1 - mu_p^T x] = 1 - (1 - E[1 - cos t]) mu_p^T mu_q
    away = 0.5 * (q.loc - p.loc).square().sum(-1)
    versine = q._versine.to(q.loc)
    return p.concentration * (away + versine * (1 - away)) + p._log_constant().to(q.loc) - q.entropy()
