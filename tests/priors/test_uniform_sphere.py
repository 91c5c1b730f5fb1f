"""Tests of the uniform prior on a sphere."""

import math

import pytest
import torch

from ppl_vae.distributions import HypersphericalUniform
from ppl_vae.priors.uniform_sphere import UniformSphere


def test_is_the_uniform_distribution() -> None:
    prior = UniformSphere(3)()
    assert isinstance(prior, HypersphericalUniform)
    assert prior.batch_shape == ()
    assert prior.event_shape == (3,)
    torch.testing.assert_close(prior.log_prob(prior.sample((5,))), torch.full((5,), -math.log(4 * math.pi)))


def test_has_no_parameter_and_follows_the_module() -> None:
    prior = UniformSphere(3)
    assert list(prior.parameters()) == []
    assert prior.double()().mean.dtype == prior().sample().dtype == torch.float64


@pytest.mark.parametrize(
    ("latent_dim", "error", "number"), [(0, ValueError, 0), (1, ValueError, 1), (2.0, TypeError, 0)]
)
def test_wrong_size(latent_dim: int, error: type[Exception], number: int) -> None:
    with pytest.raises(
        error, match=f"^latent_dim: expected a whole number above {number}.*, got {latent_dim}$"
    ):
        UniformSphere(latent_dim)
