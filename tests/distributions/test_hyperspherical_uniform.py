"""The uniform distribution on a sphere."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.distributions import HypersphericalUniform


def assert_mean(values: Tensor, expected: float) -> None:
    """Check means over the first dimension: 4 standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 4 * error).all()


@pytest.mark.parametrize(
    ("dim", "area"), [(2, 2 * math.pi), (3, 4 * math.pi), (4, 2 * math.pi**2), (6, math.pi**3)]
)
def test_density_is_one_over_the_area(dim: int, area: float) -> None:
    uniform = HypersphericalUniform(dim, dtype=torch.float64)
    expected = torch.full((4, 3), -math.log(area), dtype=torch.float64)
    torch.testing.assert_close(uniform.log_prob(uniform.sample((4, 3))), expected)
    torch.testing.assert_close(uniform.entropy(), -expected[0, 0])


@pytest.mark.parametrize("dim", [2, 3, 20])
def test_draws_are_uniform(dim: int) -> None:
    torch.manual_seed(0)
    uniform = HypersphericalUniform(dim, dtype=torch.float64)
    x = uniform.rsample((20_000,))
    assert uniform.support.check(x).all()
    assert_mean(x, 0.0)
    assert_mean(x**2, 1 / dim)
    assert_mean(x[:, 0] * x[:, 1], 0.0)
    assert_mean(x[:, 0] ** 4, 3 / (dim * (dim + 2)))
    assert torch.equal(uniform.mean, torch.zeros(dim).double())
    assert torch.equal(uniform.variance, torch.full((dim,), 1 / dim, dtype=torch.float64))


def test_shapes_and_types() -> None:
    uniform = HypersphericalUniform(3, dtype=torch.float64).expand((4, 2))
    assert (uniform.batch_shape, uniform.event_shape) == ((4, 2), (3,))
    x = uniform.sample((5,))
    assert (x.shape, x.dtype) == ((5, 4, 2, 3), torch.float64)
    assert uniform.log_prob(x).shape == (5, 4, 2)
    assert uniform.entropy().shape == (4, 2)
    assert uniform.mean.shape == uniform.variance.shape == (4, 2, 3)
    assert HypersphericalUniform(3).sample().dtype == torch.float32
    kl = kl_divergence(uniform, HypersphericalUniform(3, dtype=torch.float64))
    assert torch.equal(kl, torch.zeros(4, 2).double())


def test_values_beside_the_sphere_raise() -> None:
    with pytest.raises(ValueError, match="support"):
        HypersphericalUniform(3, validate_args=True).log_prob(torch.ones(3))


@pytest.mark.parametrize(
    ("dim", "error", "number"),
    [(0, ValueError, 0), (1, ValueError, 1), (2.0, TypeError, 0), (True, TypeError, 0)],
)
def test_wrong_dimension(dim: int, error: type[Exception], number: int) -> None:
    with pytest.raises(error, match=f"^dim: expected a whole number above {number}.*, got {dim}$"):
        HypersphericalUniform(dim)
