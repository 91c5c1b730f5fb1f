"""Tests of the normal likelihood."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from ppl_vae.likelihoods import Normal
from ppl_vae.networks import MLP

SIZES = st.integers(1, 3)
MODES = st.one_of(st.floats(0.1, 3.0), st.sampled_from(["learned", "network"]))


@given(
    batch=st.lists(SIZES, min_size=1, max_size=3), event=st.lists(SIZES, min_size=1, max_size=3), scale=MODES
)
def test_log_prob_is_the_formula_for_any_batch_shape(batch: list[int], event: list[int], scale: Any) -> None:
    channels = (2 if scale == "network" else 1) * event[0]
    likelihood = Normal(MLP(2, (channels, *event[1:]), hidden=4), scale=scale).double()
    z, x = torch.randn(*batch, 2).double(), torch.randn(*batch, *event).double()
    out = likelihood.decoder(z)
    if scale == "network":
        loc, log_scale = out.split(event[0], len(batch))
        sigma = log_scale.exp()
    elif scale == "learned":
        nn.init.constant_(likelihood.log_scale, -0.5)
        loc, sigma = out, torch.full_like(out, math.exp(-0.5))
    else:
        loc, sigma = out, torch.full_like(out, scale)
    distribution = likelihood(z)
    assert distribution.batch_shape == tuple(batch)
    assert distribution.event_shape == tuple(event)
    log_pdf = stats.norm.logpdf(x.numpy(), loc.detach().numpy(), sigma.detach().numpy())
    torch.testing.assert_close(distribution.log_prob(x), torch.as_tensor(log_pdf).flatten(len(batch)).sum(-1))


def test_fixed_scale_has_no_parameter() -> None:
    decoder = MLP(2, 3)
    assert len(list(Normal(decoder, scale=0.3).parameters())) == len(list(decoder.parameters()))


def test_learned_scale_is_one_number_from_one() -> None:
    likelihood = Normal(MLP(2, (3, 4)), scale="learned")
    assert likelihood.log_scale.shape == ()
    assert torch.equal(likelihood(torch.zeros(5, 2)).stddev, torch.ones(5, 3, 4))


def test_elementwise_scale_has_one_number_for_each_element_from_one() -> None:
    likelihood = Normal(MLP(2, (3, 4)), scale="elementwise")
    assert likelihood.log_scale.shape == (3, 4)
    assert torch.equal(likelihood(torch.zeros(5, 2)).stddev, torch.ones(5, 3, 4))
    with torch.no_grad():
        likelihood.log_scale.copy_(torch.arange(12.0).reshape(3, 4).log1p())
    scale = likelihood(torch.zeros(6, 5, 2)).stddev
    torch.testing.assert_close(scale, torch.arange(1.0, 13.0).reshape(3, 4).expand(6, 5, 3, 4))


def test_elementwise_scale_needs_the_shape_of_x() -> None:
    message = r"^scale: needs a decoder with an `out_shape`, the shape of x, got Linear$"
    with pytest.raises(TypeError, match=message):
        Normal(nn.Linear(2, 3), scale="elementwise")


def test_learned_scale_has_its_maximum_at_the_residual() -> None:
    likelihood = Normal(nn.Identity(), scale="learned").double()
    x = torch.randn(10, 4).double()
    with torch.no_grad():
        likelihood.log_scale.copy_(x.square().mean().sqrt().log())
    likelihood(torch.zeros(10, 4).double()).log_prob(x).sum().backward()
    assert abs(float(likelihood.log_scale.grad)) < 1e-12


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_of_the_network_is_clamped(start: float, clamped: float) -> None:
    decoder = nn.Linear(2, 6)
    nn.init.constant_(decoder.bias, start)
    scale = Normal(decoder, scale="network")(torch.zeros(1, 2)).stddev
    torch.testing.assert_close(scale, torch.full((1, 3), math.exp(clamped)))


def test_odd_output_of_the_network() -> None:
    message = (
        r"^decoder: expected a multiple of 2 in the first event dimension \(mean, log-scale\), "
        r"got output shape \(3, 4\)$"
    )
    with pytest.raises(ValueError, match=message):
        Normal(MLP(2, (3, 4)), scale="network")(torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (
            "learnt",
            ValueError,
            r"^scale: unknown 'learnt' \(did you mean 'learned'\?\); expected one of 'learned', ",
        ),
        (0.0, ValueError, r"^scale: expected a finite number above 0, got 0.0$"),
        (-1, ValueError, r"^scale: expected a finite number above 0, got -1$"),
        (math.nan, ValueError, r"^scale: expected a finite number above 0, got nan$"),
        (None, TypeError, r"^scale: expected a number above 0, got None$"),
        (True, TypeError, r"^scale: expected a number above 0, got True$"),
    ],
)
def test_wrong_scale(scale: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Normal(MLP(2, 3), scale=scale)


def test_mean_is_the_decoder() -> None:
    likelihood = Normal(MLP(2, (1, 4, 5)))
    z: Tensor = torch.randn(7, 3, 2)
    torch.testing.assert_close(likelihood(z).mean, likelihood.decoder(z))
