"""The uniform distribution on a sphere."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.kl import register_kl

from ppl_vae._checks import check_positive_int


class HypersphericalUniform(dist.TorchDistribution):
    r"""The uniform distribution on the unit sphere :math:`S^{d-1}` in :math:`d` dimensions.

    Args:
        dim: d, the length of the unit vectors, at least 2.
        dtype: of what it draws; by default torch's.
        device: where it draws.
        validate_args: whether to check values; by default torch's.

    Raises:
        TypeError, ValueError: if ``dim`` is not a whole number above 1.

    Example:
        >>> uniform = HypersphericalUniform(3)
        >>> uniform.sample((5,)).norm(dim=-1).shape
        torch.Size([5])
        >>> uniform.entropy().exp()  # the area, 4 pi
        tensor(12.566)
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as in torch
    support = constraints.sphere
    has_rsample = True

    def __init__(
        self,
        dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.dim = check_sphere("dim", dim)
        self._zero = torch.zeros(self.dim, dtype=dtype, device=device)
        super().__init__(torch.Size(), self._zero.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Zero, ``[*batch, d]``, which is not on the sphere."""
        return self._zero

    @property
    def variance(self) -> Tensor:
        """1 / d of each coordinate, ``[*batch, d]``."""
        return torch.full_like(self._zero, 1 / self.dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "HypersphericalUniform":
        """Return the distribution with another batch shape."""
        new: HypersphericalUniform = self._get_checked_instance(HypersphericalUniform, _instance)
        shape = torch.Size(batch_shape)
        new.dim = self.dim
        new._zero = self._zero.expand(shape + self.event_shape)
        super(HypersphericalUniform, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008, as in torch
        """Return unit vectors, ``[*sample, *batch, d]``."""
        shape = self._extended_shape(sample_shape)
        normal = torch.randn(shape, dtype=self._zero.dtype, device=self._zero.device)
        return torch.nn.functional.normalize(normal, dim=-1, eps=torch.finfo(normal.dtype).tiny)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log of one over the sphere's area."""
        if self._validate_args:
            self._validate_sample(value)
        return -(self.entropy() + torch.zeros_like(value[..., 0]))

    def entropy(self) -> Tensor:
        """Return the log of the sphere's area."""
        return torch.full_like(self._zero[..., 0], log_area(self.dim))


def log_area(dim: int) -> float:
    """Return the log of the area of the unit sphere in ``dim`` dimensions."""
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def check_sphere(name: str, dim: object) -> int:
    """Return ``dim`` as an ``int``, or raise if there is no sphere in that many dimensions."""
    if check_positive_int(name, dim) < 2:
        raise ValueError(f"{name}: expected a whole number above 1, for a circle or a sphere, got {dim!r}")
    return check_positive_int(name, dim)


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _kl_uniforms(q: HypersphericalUniform, p: HypersphericalUniform) -> Tensor:
    check_same_sphere(q, p)
    return torch.zeros_like(q._zero[..., 0] + p._zero[..., 0])


def check_same_sphere(q: Any, p: Any) -> None:
    """Raise if two distributions are on spheres of other dimensions."""
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"p: expected a distribution on the sphere of q, of unit vectors of length {q.event_shape[0]}, "
            f"got length {p.event_shape[0]}"
        )
