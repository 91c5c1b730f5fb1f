"""Tests of denoising: against closed forms of the linear-Gaussian model, sums over bits, and digits."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream, function_pair
from hypothesis import given
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ppl_vae import fit
from ppl_vae.data import load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.tasks import _passes
from ppl_vae.tasks.denoising import Denoised, denoise

QUIET: dict[str, Any] = {"progress": False}


def linear() -> LinearGaussian:
    torch.manual_seed(0)
    model = LinearGaussian(2, 5, scale=0.6).double()
    with torch.no_grad():
        model.bias.copy_(torch.linspace(-1, 1, 5))
    return model


def guide_of(model: LinearGaussian, spread: float = 1.0, extra: float = 0.0) -> Callable[[Tensor], None]:
    """Return the posterior at noise ``extra`` on top of the model's, widened, as a plain function."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), torch.no_grad():
            variance = (2 * model.log_scale).exp() + extra**2
            precision = model.weight.mT @ model.weight / variance + torch.eye(2).double()
            loc = (x - model.bias) @ model.weight @ precision.inverse() / variance
            pyro.sample("z", dist.MultivariateNormal(loc, spread**2 * precision.inverse()))

    return guide


def noisy_data(model: LinearGaussian, n: int = 8, noise: float = 0.8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        clean = model(None, size=n)
    return clean, clean + noise * torch.randn_like(clean)


def assert_within_errors(result: Denoised, expected: Tensor) -> None:
    """The mean is within four of its standard errors, none of which is large (of some 40 elements)."""
    assert float(result.monte_carlo_error.max()) < 0.05
    assert float(((result.mean - expected).abs() / result.monte_carlo_error).max()) < 4


def test_without_a_noise_model_the_mean_is_the_closed_form_of_the_posterior_predictive() -> None:
    model = linear()
    _, noisy = noisy_data(model)
    result = denoise(model, guide_of(model, 1.3), noisy, num_particles=5000, **QUIET)
    with torch.no_grad():
        expected = model.posterior(noisy).mean @ model.weight.mT + model.bias
    assert_within_errors(result, expected)
    assert result.mean.shape == noisy.shape and result.num_particles == 5000


@pytest.mark.parametrize("as_function", [False, True])
def test_with_normal_noise_the_mean_is_the_closed_form_of_clean_data(as_function: bool) -> None:
    model = linear()
    _, noisy = noisy_data(model)
    noise: Any = (lambda x: dist.Normal(x, 0.8)) if as_function else 0.8
    # a guide near the posterior under both noises; draws of x for each z where there is no closed form
    guide = guide_of(model, 1.2, extra=0.8)
    result = denoise(model, guide, noisy, noise=noise, num_particles=4000, inner_draws=20, **QUIET)
    with torch.no_grad():
        covariance = model.weight @ model.weight.mT + (2 * model.log_scale).exp() * torch.eye(5)
        gain = covariance @ (covariance + 0.64 * torch.eye(5)).inverse()
        expected = model.bias + (noisy - model.bias) @ gain.mT
    assert_within_errors(result, expected)


def test_monte_carlo_errors_are_the_spread_over_seeds() -> None:
    model = linear()
    _, noisy = noisy_data(model)
    runs = [
        denoise(model, guide_of(model, 1.3), noisy, num_particles=200, seed=seed, **QUIET)
        for seed in range(60)
    ]
    found = torch.stack([run.mean for run in runs]).std(0)
    claimed = torch.stack([run.monte_carlo_error for run in runs]).mean(0)
    # a standard deviation of 60 is known to 9 %; 40 of them, correlated, to some 4 % on average
    assert float((claimed / found).mean()) == pytest.approx(1, abs=0.15)


def test_the_exact_posterior_uses_every_draw() -> None:
    model = linear()
    _, noisy = noisy_data(model)
    result = denoise(model, guide_of(model), noisy, num_particles=50, **QUIET)
    torch.testing.assert_close(result.effective_sample_size, torch.full((8,), 50.0).double())
    wide = denoise(model, guide_of(model, 2.0), noisy, num_particles=4000, **QUIET)
    # E[w]^2 / E[w^2] of N(0, 1) under N(0, 2^2), in two dimensions
    share = (2 * 2**2 - 1) / 2**4
    assert float(wide.effective_sample_size.mean()) / 4000 == pytest.approx(share, rel=0.05)


def bits_pair() -> tuple[Callable[[Tensor], None], Callable[[Tensor], None], nn.Linear]:
    """Return plain functions over three bits and a latent in one dimension."""
    torch.manual_seed(0)
    decoder = nn.Linear(1, 3).double()
    with torch.no_grad():
        decoder.weight.mul_(3)

    def model(x: Tensor) -> None:
        pyro.module("net", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x[:, :1] - 0.1, 1.2).to_event(1))

    return model, guide, decoder


@pytest.mark.parametrize("kind", ["flips", "normal", "without"])
def test_bits_have_the_mean_of_a_sum_over_all_clean_data(kind: str) -> None:
    model, guide, decoder = bits_pair()
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * 3)
    noisy = bits if kind != "normal" else 1.4 * bits - 0.3
    noise: Any = {"flips": lambda x: dist.Bernoulli(0.2 + 0.6 * x), "normal": 0.7, "without": None}[kind]
    result = denoise(model, guide, noisy, noise=noise, num_particles=20_000, **QUIET)
    z = torch.linspace(-8, 8, 2001).double()[:, None]
    with torch.no_grad():
        probabilities = decoder(z).sigmoid()
        prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0]).exp()
        likelihood = torch.where(bits[:, None] > 0, probabilities, 1 - probabilities).prod(-1)  # [x, z]
        if kind == "without":
            weights = prior * likelihood
            expected = (weights[..., None] * probabilities).sum(1) / weights.sum(1)[:, None]
        else:
            evidence = (prior * likelihood).sum(1)  # of each clean x
            fn = dist.Bernoulli(0.2 + 0.6 * bits) if kind == "flips" else dist.Normal(bits, 0.7)
            joint = evidence * fn.log_prob(noisy[:, None]).sum(-1).exp()  # [noisy, clean]
            expected = joint @ bits / joint.sum(1, keepdim=True)
    assert_within_errors(result, expected)


def test_small_passes_have_the_same_mean_within_errors() -> None:
    model = linear()
    _, noisy = noisy_data(model)
    with torch.no_grad():
        expected = model.posterior(noisy).mean @ model.weight.mT + model.bias
    result = denoise(model, guide_of(model, 1.3), noisy, num_particles=5000, memory=300_000, **QUIET)
    assert_within_errors(result, expected)


@given(
    cuts=st.lists(st.integers(1, 19), max_size=4),
    offset=st.sampled_from([-1e4, -800.0, 0.0, 900.0]),
    event=st.sampled_from([(), (3,), (2, 2)]),
)
def test_weighted_moments_of_chunks_are_those_of_all_draws(
    cuts: list[int], offset: float, event: tuple[int, ...]
) -> None:
    torch.manual_seed(len(cuts))
    log_weights = offset + 3 * torch.randn(20, 4).double()
    value, variance = torch.randn(20, 4, *event).double(), torch.rand(20, 4, *event).double()
    moments = _passes.WeightedMoments()
    edges = [0, *sorted(set(cuts)), 20]
    for start, end in itertools.pairwise(edges):
        moments.add(log_weights[start:end], value[start:end], variance[start:end])
    shares = log_weights.softmax(0)
    wide = shares.reshape(20, 4, *(1 for _ in event))
    mean = (wide * value).sum(0)
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.variance, (wide * (variance + value.square())).sum(0) - mean.square())
    torch.testing.assert_close(moments.standard_error, (wide * (value - mean)).square().sum(0).sqrt())
    torch.testing.assert_close(moments.effective_sample_size, 1 / shares.square().sum(0))
    torch.testing.assert_close(moments.log_total, log_weights.logsumexp(0))


@pytest.mark.parametrize("offset", [-900.0, 900.0])
def test_weights_of_zero_in_the_first_chunks_change_no_moment(offset: float) -> None:
    torch.manual_seed(0)
    log_weights, value = offset + torch.randn(6, 2).double(), torch.randn(6, 2, 3).double()
    log_weights[:4, 0] = -math.inf
    moments = _passes.WeightedMoments()
    for rows in (slice(2), slice(2, 4), slice(4, 6)):
        moments.add(log_weights[rows], value[rows])
    torch.testing.assert_close(moments.mean, (log_weights.softmax(0)[..., None] * value).sum(0))
    torch.testing.assert_close(moments.log_total, log_weights.logsumexp(0))


def test_errors_are_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    clean, noisy, mean = generator.random((3, 6, 1, 4, 4)).astype(np.float32)
    result = Denoised(*map(torch.from_numpy, (noisy, mean, mean)), torch.ones(6), 10, torch.from_numpy(clean))
    for values, of_noisy in ((mean, False), (noisy, True)):
        mse = ((values.astype(float) - clean) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(result.mean_squared_error(of_noisy=of_noisy), mse, rtol=1e-5)
        np.testing.assert_allclose(
            result.peak_signal_to_noise_ratio(peak=2.0, of_noisy=of_noisy), 10 * np.log10(4 / mse), rtol=1e-5
        )
        named = result.summary()[("noisy_" if of_noisy else "") + "mean_squared_error"]
        assert named["mean"] == pytest.approx(mse.mean(), rel=1e-5)
        assert named["standard_error"] == pytest.approx(mse.std(ddof=1) / math.sqrt(6), rel=1e-5)
    assert f"{result.summary()['peak_signal_to_noise_ratio']['mean']:.2f}" in str(result)
    unknown = Denoised(*map(torch.from_numpy, (noisy, mean, mean)), torch.ones(6), 10)
    with pytest.raises(ValueError, match="clean: expected the clean data"):
        unknown.mean_squared_error()
    assert "mean_squared_error" not in unknown.summary() and "effective sample size 1.0" in str(unknown)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: DataLoader(Rows(x), 3), lambda x: Stream(x, 3)])
def test_every_kind_of_data_and_plain_functions_leave_the_caller_alone(wrap: Callable[[Tensor], Any]) -> None:
    model, guide, modules = function_pair()
    before = [[p.clone() for p in module.parameters()] for module in modules]
    x = torch.bernoulli(torch.full((8, 4), 0.5, dtype=torch.float64))
    state = get_rng_state()
    result = denoise(model, guide, wrap(x), num_particles=20, **QUIET)
    assert torch.equal(state["torch"], get_rng_state()["torch"])
    assert not list(pyro.get_param_store().keys())
    for module, values in zip(modules, before, strict=True):
        assert module.training and all(map(torch.equal, module.parameters(), values))
    assert torch.equal(result.noisy, x) and not result.mean.requires_grad
    assert torch.equal(result.mean, denoise(model, guide, x, num_particles=20, **QUIET).mean)


def test_flipped_bits_of_digits_come_back_with_less_error_under_their_noise() -> None:
    data = load_dataset("digits", binarization="threshold")
    torch.manual_seed(0)
    model = VAE(StandardNormal(6), Bernoulli(MLP(6, (1, 8, 8), hidden=64)))
    guide = MeanFieldGuide(MLP((1, 8, 8), hidden=64), 6)
    fit(model, guide, data.train.x, epochs=10, batch_size=50, learning_rate=5e-3, **QUIET)
    clean = data.test.x[:100]
    noisy = torch.bernoulli(0.1 + 0.8 * clean)

    def flips(x: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(0.1 + 0.8 * x)

    known = denoise(model, guide, noisy, clean=clean, noise=flips, num_particles=200, **QUIET)
    unknown = denoise(model, guide, noisy, clean=clean, num_particles=200, **QUIET)
    for better, worse in (
        (known.mean_squared_error(), known.mean_squared_error(of_noisy=True)),
        (known.mean_squared_error(), unknown.mean_squared_error()),
    ):
        gain = worse - better
        assert float(gain.mean()) > 4 * float(gain.std()) / 10


X = torch.zeros(4, 5).double()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"noise": 0.0}, ValueError, "noise: expected a finite number above 0"),
        ({"noise": True}, TypeError, "noise: expected a number"),
        ({"noise": "normal"}, TypeError, "noise: expected a number"),
        ({"noise": lambda x: x}, TypeError, "noise: expected a function that returns a Distribution"),
        (
            {"noise": lambda x: dist.MultivariateNormal(x, torch.eye(5).double())},
            ValueError,
            "noise: expected a distribution for each element",
        ),
        ({"clean": X[:3]}, ValueError, "clean: expected a tensor of the noisy data's shape"),
        ({"clean": [1.0]}, ValueError, "clean: expected a tensor"),
        ({"clean": X / 0}, ValueError, "clean: expected finite"),
        ({"noisy": X / 0}, ValueError, "noisy: expected finite"),
        ({"noisy": X[:, :4]}, ValueError, "noisy: model and guide can't run"),
        ({"noisy": 3}, TypeError, "noisy: expected a Split"),
        ({"num_particles": 1.5}, TypeError, "num_particles"),
        ({"inner_draws": 0}, ValueError, "inner_draws"),
        ({"memory": 0}, ValueError, "memory"),
        ({"seed": -3}, ValueError, "seed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = linear()
    with pytest.raises(error, match=message):
        denoise(model, guide_of(model), **{"noisy": X, **arguments}, **QUIET)


def test_data_outside_the_support_are_refused_without_a_noise_model() -> None:
    model, guide, _ = bits_pair()
    with pytest.raises(ValueError, match="noisy: datum 0 is outside the support of site 'x'"):
        denoise(model, guide, torch.full((2, 3), 0.4).double(), **QUIET)


def test_noise_that_cannot_make_the_data_is_refused() -> None:
    model = linear()
    for message, noise in (
        ("all importance weights of datum 0 are 0", lambda x: dist.Uniform(x + 90.0, x + 91.0)),
        ("datum 0 is outside the support of the noise", lambda x: dist.LogNormal(x, 1.0)),
    ):
        with pytest.raises(ValueError, match=f"noisy: {message}"):
            denoise(model, guide_of(model), X, noise=noise, **QUIET)


def test_a_noise_model_needs_elements_that_are_independent_given_the_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z, torch.eye(2)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    x = torch.zeros(3, 2)
    assert denoise(model, guide, x, **QUIET).mean.shape == (3, 2)  # the likelihood's own noise
    with pytest.raises(ValueError, match="model: expected a likelihood whose elements of x are independent"):
        denoise(model, guide, x, noise=0.5, **QUIET)
