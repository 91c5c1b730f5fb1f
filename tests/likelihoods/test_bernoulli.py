"""Tests of the Bernoulli likelihood."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from ppl_vae.likelihoods import Bernoulli
from ppl_vae.networks import MLP, ConvDecoder

SIZES = st.integers(1, 3)


@given(batch=st.lists(SIZES, min_size=1, max_size=3), event=st.lists(SIZES, min_size=1, max_size=3))
def test_log_prob_is_the_formula_for_any_batch_shape(batch: list[int], event: list[int]) -> None:
    likelihood = Bernoulli(MLP(2, event, hidden=4)).double()
    z = 3 * torch.randn(*batch, 2).double()
    x = torch.bernoulli(torch.full((*batch, *event), 0.5).double())
    distribution = likelihood(z)
    assert distribution.batch_shape == tuple(batch)
    assert distribution.event_shape == tuple(event)
    probs = likelihood.decoder(z).sigmoid().detach()
    expected = torch.as_tensor(stats.bernoulli.logpmf(x.numpy(), probs.numpy()))
    torch.testing.assert_close(distribution.log_prob(x), expected.flatten(len(batch)).sum(-1))


def test_takes_one_latent_without_a_batch() -> None:
    distribution = Bernoulli(MLP(2, (1, 4, 5)))(torch.zeros(2))
    assert distribution.batch_shape == ()
    assert distribution.event_shape == (1, 4, 5)


def test_log_prob_of_certain_pixels_is_finite() -> None:
    # log sigmoid(100) is -4e-44: nothing overflows between logits and log-probability.
    likelihood = Bernoulli(nn.Identity())
    logits = torch.tensor([[100.0, -100.0]])
    assert abs(float(likelihood(logits).log_prob(torch.tensor([[1.0, 0.0]])))) < 1e-40
    assert float(likelihood(logits).log_prob(torch.tensor([[0.0, 0.0]]))) == -100


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_float32_keeps_the_precision_of_the_logit(value: float) -> None:
    # The difference of two numbers of the logit's size is right to that size's rounding.
    logits = torch.linspace(-100, 100, 2001)[:, None]
    x = torch.full_like(logits, value)
    likelihood = Bernoulli(nn.Identity())
    exact = -nn.functional.softplus((1 - 2 * x.double()) * logits.double(), threshold=1e3).squeeze(-1)
    error = (likelihood(logits).log_prob(x).double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * logits.squeeze(-1).abs().clamp(min=1)).all()


def test_grey_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="support"):
        Bernoulli(MLP(2, 3))(torch.zeros(1, 2)).log_prob(torch.full((1, 3), 0.5))


# Starting at the data mean


def zero_weights(decoder: nn.Module) -> nn.Module:
    for name, parameter in decoder.named_parameters():
        if name.endswith("weight"):
            nn.init.zeros_(parameter)
    return decoder.double()


@given(pixels=st.lists(st.lists(st.floats(0.01, 0.99), min_size=6, max_size=6), min_size=1, max_size=4))
def test_init_bias_gives_the_data_mean_at_zero_weights(pixels: list[list[float]]) -> None:
    x = torch.tensor(pixels, dtype=torch.float64).reshape(-1, 1, 2, 3)
    likelihood = Bernoulli(zero_weights(MLP(2, (1, 2, 3), hidden=4)))
    likelihood.init_bias(x)
    mean = likelihood(torch.randn(5, 2).double()).mean
    torch.testing.assert_close(mean, x.mean(0).expand(5, 1, 2, 3))


def test_init_bias_of_a_convolution_is_the_mean_of_each_channel() -> None:
    x = torch.rand(7, 3, 6, 5).double()
    likelihood = Bernoulli(zero_weights(ConvDecoder(2, (3, 6, 5), 8, (4,))))
    likelihood.init_bias(x)
    mean = likelihood(torch.randn(4, 2).double()).mean
    expected = x.mean((0, 2, 3))[:, None, None].expand(4, 3, 6, 5)
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(("value", "start"), [(0.0, 0.001), (1.0, 0.999)])
def test_init_bias_of_constant_pixels_is_clipped(value: float, start: float) -> None:
    likelihood = Bernoulli(MLP(2, 3).double())
    likelihood.init_bias(torch.full((5, 3), value))
    torch.testing.assert_close(likelihood.decoder.output_bias.sigmoid(), torch.full((3,), start).double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float64])
def test_init_bias_takes_bits_of_any_dtype(dtype: torch.dtype) -> None:
    likelihood = Bernoulli(MLP(2, 2))
    likelihood.init_bias(torch.tensor([[0, 1], [1, 1], [0, 1], [0, 0]]).to(dtype))
    torch.testing.assert_close(likelihood.decoder.output_bias.sigmoid(), torch.tensor([0.25, 0.75]))


def test_init_bias_keeps_the_parameter() -> None:
    likelihood = Bernoulli(MLP(2, 3))
    bias, weights = likelihood.decoder.output_bias, [p.clone() for p in likelihood.parameters()]
    likelihood.init_bias(torch.rand(5, 3))
    assert likelihood.decoder.output_bias is bias
    assert bias.requires_grad
    changed = [not torch.equal(p, old) for p, old in zip(likelihood.parameters(), weights, strict=True)]
    assert sum(changed) == 1


@pytest.mark.parametrize(
    ("decoder", "x", "error", "message"),
    [
        (
            nn.Linear(2, 3),
            torch.zeros(5, 3),
            TypeError,
            "decoder: expected a network with an `output_bias` parameter to start at the data mean, "
            "got Linear",
        ),
        (
            MLP(2, (1, 2, 3)),
            torch.zeros(5, 1, 2, 2),
            ValueError,
            "x: expected data of the decoder's 6 outputs, got shape (5, 1, 2, 2)",
        ),
        (
            ConvDecoder(2, (3, 6, 5)),
            torch.zeros(5, 2, 6, 5),
            ValueError,
            "x: expected data of the decoder's 3 outputs, got shape (5, 2, 6, 5)",
        ),
    ],
)
def test_init_bias_refuses(decoder: Any, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Bernoulli(decoder).init_bias(x)
