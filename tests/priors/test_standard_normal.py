"""Tests of the standard normal prior."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppl_vae.priors import StandardNormal


@given(batch=st.lists(st.integers(1, 3), max_size=3), latent=st.integers(1, 5))
def test_log_prob_is_the_formula(batch: list[int], latent: int) -> None:
    z = torch.randn(*batch, latent).double()
    expected = -0.5 * (z**2).sum(-1) - 0.5 * latent * math.log(2 * math.pi)
    torch.testing.assert_close(StandardNormal(latent).double()().log_prob(z), expected)


def test_shapes_and_moments() -> None:
    prior = StandardNormal(3)()
    assert prior.batch_shape == ()
    assert prior.event_shape == (3,)
    assert torch.equal(prior.mean, torch.zeros(3))
    assert torch.equal(prior.variance, torch.ones(3))


def test_has_no_parameter_and_follows_the_module() -> None:
    prior = StandardNormal(3)
    assert list(prior.parameters()) == []
    assert prior.double()().mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("latent_dim", "error"), [(0, ValueError), (-2, ValueError), (2.0, TypeError), ("2", TypeError)]
)
def test_wrong_size(latent_dim: int, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^latent_dim: expected a whole number above 0, got "):
        StandardNormal(latent_dim)
