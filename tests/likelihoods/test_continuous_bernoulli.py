"""Tests of the continuous Bernoulli likelihood."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppl_vae.likelihoods import ContinuousBernoulli
from ppl_vae.networks import MLP, ConvDecoder

SIZES = st.integers(1, 3)


def log_norm(logit: torch.Tensor) -> torch.Tensor:
    """Return log C = log(2 artanh(1 - 2 lambda) / (1 - 2 lambda)), Loaiza-Ganem & Cunningham (2019)."""
    half = logit / 2
    return torch.where(half == 0, math.log(2), (logit / torch.tanh(half)).log())


@given(batch=st.lists(SIZES, min_size=1, max_size=3), event=st.lists(SIZES, min_size=1, max_size=3))
def test_log_prob_is_the_formula_for_any_batch_shape(batch: list[int], event: list[int]) -> None:
    likelihood = ContinuousBernoulli(MLP(2, event, hidden=4)).double()
    z, x = 3 * torch.randn(*batch, 2).double(), torch.rand(*batch, *event).double()
    distribution = likelihood(z)
    assert distribution.batch_shape == tuple(batch)
    assert distribution.event_shape == tuple(event)
    logits = likelihood.decoder(z)
    log_lambda, log_rest = nn.functional.logsigmoid(logits), nn.functional.logsigmoid(-logits)
    expected = log_norm(logits) + x * log_lambda + (1 - x) * log_rest
    # Within 0.001 of lambda = 1/2 torch takes a Taylor series; the next term is below 1e-11.
    torch.testing.assert_close(
        distribution.log_prob(x), expected.flatten(len(batch)).sum(-1), rtol=1e-7, atol=1e-9
    )


@given(logit=st.floats(-20, 20))
def test_density_integrates_to_one_and_has_the_mean(logit: float) -> None:
    distribution = ContinuousBernoulli(nn.Identity())(torch.tensor([logit], dtype=torch.float64))
    # Simpson's rule: its error is below (h logit)^4 / 180 = 1e-10 for 4000 steps.
    x = torch.linspace(0, 1, 4001, dtype=torch.float64)
    weight = torch.full((4001,), 2.0, dtype=torch.float64)
    weight[1::2] = 4
    weight[[0, -1]] = 1
    density = distribution.log_prob(x[:, None]).exp() * weight / 12_000
    assert float(density.sum()) == pytest.approx(1, abs=1e-8)
    # Beside the Taylor series torch's mean cancels up to eight digits.
    assert float((density * x).sum()) == pytest.approx(float(distribution.mean), abs=1e-7)


def test_draws_are_in_the_unit_interval_and_have_the_mean() -> None:
    likelihood = ContinuousBernoulli(nn.Identity())
    logits = torch.tensor([-5.0, 0.0, 0.001, 3.0]).double().expand(20_000, 4)
    x = likelihood(logits).sample()
    assert ((x >= 0) & (x <= 1)).all()
    error = likelihood(logits[:1]).variance[0].sqrt() / math.sqrt(20_000)
    assert ((x.mean(0) - likelihood(logits[:1]).mean[0]).abs() < 5 * error).all()


def test_values_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="support"):
        ContinuousBernoulli(MLP(2, 3))(torch.zeros(1, 2)).log_prob(torch.full((1, 3), 1.5))


def test_init_bias_starts_at_the_logit_of_the_data_mean() -> None:
    x = torch.rand(20, 1, 2, 3)
    likelihood = ContinuousBernoulli(MLP(2, (1, 2, 3), hidden=4))
    likelihood.init_bias(x)
    torch.testing.assert_close(likelihood.decoder.output_bias, x.mean(0).flatten().logit())
    convolution = ContinuousBernoulli(ConvDecoder(2, (1, 2, 3), 4, (3,)))
    convolution.init_bias(x)
    torch.testing.assert_close(convolution.decoder.output_bias, x.mean().logit()[None])


def test_init_bias_refuses_a_network_without_an_output_bias() -> None:
    with pytest.raises(TypeError, match=r"^decoder: expected a network with an `output_bias` parameter"):
        ContinuousBernoulli(nn.Linear(2, 3)).init_bias(torch.zeros(5, 3))
