"""Tests of the likelihoods of values on levels: categorical and discretised logistic."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.data import load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, SVI, log_weights
from ppl_vae.likelihoods.categorical import Categorical
from ppl_vae.likelihoods.discretized_logistic import DiscretizedLogistic
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvDecoder
from ppl_vae.priors import StandardNormal


def images(*batch: int, levels: int = 5, channels: int = 2) -> Tensor:
    return torch.randint(levels, (*batch, channels, 3, 4)).double() / (levels - 1)


def zero_weights(decoder: nn.Module) -> nn.Module:
    for name, parameter in decoder.named_parameters():
        if name.endswith("weight"):
            nn.init.zeros_(parameter)
    return decoder.double()


def test_categorical_takes_the_logits_level_by_level() -> None:
    likelihood = Categorical(MLP(2, (5 * 2, 3, 4), hidden=4), levels=5).double()
    z, x = torch.randn(3, 6, 2).double(), images(6)
    out = likelihood.decoder(z)
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 6), (2, 3, 4))
    expected = torch.zeros(3, 6).double()
    for c in range(2):
        logits = out[..., c::2, :, :]  # output k * C + c is level k of channel c
        index = (4 * x[:, c]).round().long()[None, :, None].expand(3, 6, 1, 3, 4)
        expected += logits.log_softmax(-3).gather(-3, index).sum((2, 3, 4))
    torch.testing.assert_close(distribution.log_prob(x), expected)


@pytest.mark.parametrize("components", [1, 3])
def test_discretized_logistic_takes_the_parameters_component_by_component(components: int) -> None:
    count = 2 if components == 1 else 3 * components
    likelihood = DiscretizedLogistic(MLP(2, (count * 2, 3, 4), hidden=4), components, levels=5).double()
    z, x = torch.randn(3, 6, 2).double(), images(6)
    out = likelihood.decoder(z).unflatten(-3, (count, 2))
    logits = torch.zeros(3, 6, 1, 2, 3, 4) if components == 1 else out[:, :, :components]
    loc, log_scale = out[:, :, -2 * components : -components or None], out[:, :, -components:]
    a, b = (((x.unsqueeze(-4) + h - loc) / log_scale.exp()) for h in (-1 / 8, 1 / 8))
    below = torch.where(x.unsqueeze(-4) == 0, 0.0, a.sigmoid())
    above = torch.where(x.unsqueeze(-4) == 1, 1.0, b.sigmoid())
    expected = (logits.softmax(-4) * (above - below)).sum(-4).log().sum((2, 3, 4))
    distribution = likelihood(z)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 6), (2, 3, 4))
    torch.testing.assert_close(distribution.log_prob(x), expected)


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped_and_gradients_are_finite_there(start: float, clamped: float) -> None:
    likelihood = DiscretizedLogistic(nn.Identity())
    out = torch.tensor([[0.5, start]], requires_grad=True)
    distribution = likelihood(out)
    torch.testing.assert_close(distribution.base_dist.scale.log(), torch.tensor([[[clamped]]]))
    distribution.log_prob(torch.tensor([[1.0]])).backward()
    assert out.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Categorical(MLP(2, (7, 3, 4)), levels=4)(torch.zeros(5, 2)),
            "decoder: expected a multiple of 4 in the first event dimension (one for each of the levels), "
            "got output shape (7, 3, 4)",
        ),
        (
            lambda: DiscretizedLogistic(MLP(2, 7), components=2)(torch.zeros(5, 2)),
            "decoder: expected a multiple of 6 in the first event dimension "
            "(log-weight, mean, log-scale of each component), got output shape (7,)",
        ),
        (lambda: Categorical(MLP(2, 3), levels=1), "levels: expected at least 2, got 1"),
        (lambda: DiscretizedLogistic(MLP(2, 3), levels=0), "levels: expected a whole number above 0, got 0"),
        (lambda: DiscretizedLogistic(MLP(2, 3), 0), "components: expected a whole number above 0, got 0"),
    ],
)
def test_refuses(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


@pytest.mark.parametrize("levels", [17, 256])
def test_data_that_are_no_levels_are_refused_with_one_line(levels: int) -> None:
    digits = load_dataset("digits")  # 17 levels
    model = VAE(StandardNormal(2), DiscretizedLogistic(MLP(2, (2, 8, 8)), levels=levels))
    guide = MeanFieldGuide(MLP((1, 8, 8)), 2)
    if levels == 17:
        fit(model, guide, digits.train.x[:20], epochs=1)
        return
    message = (
        r"^data: datum 0 is outside the support of site 'x', .*Levels\(k / 255 for whole k from 0 to 255\).*"
    )
    with pytest.raises(ValueError, match=message):
        fit(model, guide, digits.train.x[:20], epochs=1)


# Starting at the data


def test_categorical_starts_at_the_frequencies_of_each_value() -> None:
    x = images(50)
    likelihood = Categorical(zero_weights(MLP(2, (5 * 2, 3, 4), hidden=4)), levels=5)
    likelihood.init_bias(x)
    distribution = likelihood(torch.randn(2).double())
    for k in range(5):
        frequency = (x == k / 4).double().mean(0)
        found = distribution.base_dist.log_prob(torch.full((2, 3, 4), k / 4).double()).exp()
        torch.testing.assert_close(found, 0.999 * frequency + 0.001 / 5)


def test_categorical_convolution_starts_at_the_frequencies_of_each_channel() -> None:
    x = images(1500)
    likelihood = Categorical(zero_weights(ConvDecoder(2, (10, 3, 4), 8, (4,))), levels=5)
    likelihood.init_bias(x)
    mean = likelihood(torch.randn(2).double()).mean
    expected = 0.999 * x.mean((0, 2, 3)) + 0.001 / 2
    torch.testing.assert_close(mean, expected[:, None, None].expand(2, 3, 4))


@pytest.mark.parametrize("components", [1, 4])
def test_discretized_logistic_starts_at_mean_and_spread(components: int) -> None:
    x = images(200, levels=256, channels=1)
    count = 2 if components == 1 else 3 * components
    decoder = zero_weights(MLP(2, (count, 3, 4), hidden=4))
    likelihood = DiscretizedLogistic(decoder, components)
    likelihood.init_bias(x)
    base = likelihood(torch.randn(2).double()).base_dist
    torch.testing.assert_close(base.loc.mean(-1), x.mean(0))
    deviation = x.std(0, correction=0)[..., None].expand_as(base.scale)
    torch.testing.assert_close(base.scale * torch.pi / 3**0.5, deviation)
    assert (base.loc.diff(dim=-1) > 0).all()
    assert torch.equal(base.logits, torch.zeros_like(base.logits))


def test_start_refuses_data_of_another_size() -> None:
    message = "x: expected data of the decoder's 48 outputs, 2 for each value, got shape (7, 1, 3, 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DiscretizedLogistic(MLP(2, (4, 3, 4))).init_bias(torch.rand(7, 1, 3, 5))


# Training


@pytest.mark.parametrize("name", ["categorical", "logistic", "mixture"])
def test_training_on_the_digits_beats_the_frequencies_of_each_pixel(name: str) -> None:
    digits = load_dataset("digits")
    count = {"categorical": 17, "logistic": 2, "mixture": 9}[name]
    decoder = MLP(4, (count, 8, 8), hidden=64)
    likelihood = (
        Categorical(decoder, 17)
        if name == "categorical"
        else DiscretizedLogistic(decoder, count // 3 or 1, 17)
    )
    likelihood.init_bias(digits.train.x)
    model, guide = VAE(StandardNormal(4), likelihood), MeanFieldGuide(MLP((1, 8, 8), hidden=64), 4)
    svi = SVI(model, guide, lambda p: torch.optim.Adam(p, 3e-3), KL_ELBO())
    frequencies = Categorical(zero_weights(MLP(4, (17, 8, 8), hidden=4)).float(), 17)
    frequencies.init_bias(digits.train.x)
    x = digits.test.x
    baseline = frequencies(torch.zeros(len(x), 4)).log_prob(x)
    torch.manual_seed(0)
    for step in range(150):
        svi.step(digits.train.x[step % 10 * 100 :][:100])
    with torch.no_grad():
        gain = log_weights(model, guide, x).mean(0) - baseline
    # Gains of two seeds: 6.8 and 7.4 categorical, 8.3 and 7.9 logistic, 10.4 and 10.9 mixture; se 0.4.
    assert float(gain.mean()) > 5 + 4 * float(gain.std() / len(x) ** 0.5)
