"""Tests of the per-datum log weights, the primitive under estimators and evaluation."""

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import log_weights
from ppl_vae.infer.log_weights import terms
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
# Float64 rounds at 1e-16; the sums here have fewer than 100 terms of order 1 to 10.
CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-12}


def vae_pair(latent: int = 2, data: int = 3) -> tuple[VAE, MeanFieldGuide]:
    """Return a small pair in float64 whose posterior is neither the prior nor symmetric."""
    model = VAE(StandardNormal(latent), Normal(MLP(latent, data, hidden=5), scale="learned"))
    return model.double(), MeanFieldGuide(MLP(data, hidden=5), latent).double()


def normal_pair(spread: float = 0.5, **plate: Any) -> tuple[Program, Program]:
    """Return z ~ N(0, 1), x ~ N(z, 1) and the guide N(0.3 x + 0.2, spread), in the plate described."""

    def data_plate(x: Tensor) -> Any:
        return pyro.plate(**({"name": "data", "size": len(x), "dim": -1} | plate))

    def model(x: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.3 * x + 0.2, spread).to_event(1))

    return model, guide


normal_model, normal_guide = normal_pair()


# Value


def test_weights_are_the_densities_of_the_draws() -> None:
    x, noise = torch.randn(4, 1).double(), torch.randn(6, 4, 1).double()
    with Draws(z=noise):
        weights = log_weights(normal_model, normal_guide, x, num_particles=6)
    z = 0.3 * x + 0.2 + 0.5 * noise
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    expected = (log_joint - dist.Normal(0.3 * x + 0.2, 0.5).log_prob(z)).squeeze(-1)
    assert weights.shape == (6, 4)
    torch.testing.assert_close(weights, expected, **CLOSE)


def test_terms_are_the_parts() -> None:
    x, noise = torch.randn(4, 1).double(), torch.randn(6, 4, 1).double()
    with Draws(z=noise):
        parts = terms(normal_model, normal_guide, x, num_particles=6)
    z = 0.3 * x + 0.2 + 0.5 * noise
    log_q, log_p = dist.Normal(0.3 * x + 0.2, 0.5).log_prob(z), dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(parts.reconstruction, dist.Normal(z, 1.0).log_prob(x).squeeze(-1), **CLOSE)
    torch.testing.assert_close(parts.kl["z"], (log_q - log_p).squeeze(-1), **CLOSE)
    torch.testing.assert_close(parts.log_weights(), parts.reconstruction - parts.kl["z"], **CLOSE)


def test_mean_is_the_elbo_and_the_log_mean_tends_to_the_evidence() -> None:
    x = 1.5 * torch.randn(10, 1).double()
    weights = log_weights(normal_model, normal_guide, x, num_particles=20_000)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(x).squeeze(-1)
    kl = 0.5 * ((0.3 * x + 0.2) ** 2 + 0.25 - 1 - math.log(0.25))
    reconstruction = -0.5 * ((0.7 * x - 0.2) ** 2 + 0.25) - 0.5 * math.log(2 * math.pi)
    elbo = (reconstruction - kl).squeeze(-1)
    error = weights.std(0) / math.sqrt(20_000)
    assert ((weights.mean(0) - elbo).abs() < 5 * error).all()
    ratio = (weights - evidence).exp()  # of mean 1
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / math.sqrt(20_000)).all()


def test_one_particle_is_the_elbo_of_pyro() -> None:
    model, guide = vae_pair()
    x = torch.randn(5, 3).double()
    torch.manual_seed(3)
    ours = log_weights(model, guide, x).sum()
    torch.manual_seed(3)
    loss = Trace_ELBO().loss(model, guide, x)
    assert float(ours.detach()) == pytest.approx(-loss, rel=1e-12)


# Per datum


@given(n=st.integers(1, 5), k=st.integers(1, 4), latent=st.integers(1, 3), data=st.integers(1, 4))
def test_batch_is_its_data_one_by_one(n: int, k: int, latent: int, data: int) -> None:
    model, guide = vae_pair(latent, data)
    x, noise = torch.randn(n, data).double(), torch.randn(k, n, latent).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=k)
    assert weights.shape == (k, n)
    for i in range(n):
        with Draws(z=noise[:, i : i + 1]):
            alone = log_weights(model, guide, x[i : i + 1], num_particles=k)
        torch.testing.assert_close(weights[:, i : i + 1], alone, **CLOSE)


@given(data=st.data(), n=st.integers(1, 6))
def test_permuted_data_have_permuted_weights(data: st.DataObject, n: int) -> None:
    order = torch.tensor(data.draw(st.permutations(range(n))))
    model, guide = vae_pair()
    x, noise = torch.randn(n, 3).double(), torch.randn(4, n, 2).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=4)
    with Draws(z=noise[:, order]):
        permuted = log_weights(model, guide, x[order], num_particles=4)
    torch.testing.assert_close(permuted, weights[:, order], **CLOSE)


@pytest.mark.parametrize("n", [1, 6])
def test_trap_7_particles_equal_one_by_one_when_a_width_is_the_batch_size(n: int) -> None:
    # Batch normalisation on [particles, n, width] takes dim 1 for the features: silently when n is the width.
    decoder = MLP(2, 3, hidden=6, normalization="batch")
    model = VAE(StandardNormal(2), Normal(decoder)).double().eval()
    guide = MeanFieldGuide(MLP(3, hidden=6, normalization="batch"), 2).double().eval()
    for layer in (*decoder.modules(), *guide.modules()):
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    x, noise = torch.randn(n, 3).double(), torch.randn(4, n, 2).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=4)
    for k in range(4):
        with Draws(z=noise[k : k + 1]):
            torch.testing.assert_close(weights[k : k + 1], log_weights(model, guide, x), **CLOSE)


def test_trap_7_convolutions_with_particles() -> None:
    model = VAE(StandardNormal(2), Bernoulli(ConvDecoder(2, (1, 5, 4), 6, (3,)))).double()
    guide = MeanFieldGuide(ConvEncoder((1, 5, 4), 6, (3,)), 2).double()
    x, noise = torch.bernoulli(torch.full((3, 1, 5, 4), 0.5)).double(), torch.randn(4, 3, 2).double()
    with Draws(z=noise):
        weights = log_weights(model, guide, x, num_particles=4)
    for k in range(4):
        with Draws(z=noise[k : k + 1]):
            torch.testing.assert_close(weights[k : k + 1], log_weights(model, guide, x), **CLOSE)


@pytest.mark.parametrize("k", [1, 7])
def test_encoder_runs_once_per_datum(k: int) -> None:
    model, guide = vae_pair()
    encoded, decoded = [], []
    guide.encoder.register_forward_hook(lambda module, args, out: encoded.append(tuple(args[0].shape)))
    decoder = model.likelihood.decoder
    decoder.register_forward_hook(lambda module, args, out: decoded.append(tuple(args[0].shape)))
    log_weights(model, guide, torch.randn(5, 3).double(), num_particles=k)
    assert encoded == [(5, 3)]
    assert decoded == [(k, 5, 2)]


# Scale and mask


@pytest.mark.parametrize("n_data", [10, 1000])
def test_trap_4_weights_are_unscaled_in_a_subsampling_plate(n_data: int) -> None:
    x, noise = torch.randn(10, 1).double(), torch.randn(50, 10, 1).double()
    with Draws(z=noise):
        plain = log_weights(normal_model, normal_guide, x, num_particles=50)
        scaled = log_weights(*normal_pair(size=n_data, subsample_size=10), x, num_particles=50)
    torch.testing.assert_close(scaled, plain, **CLOSE)


def test_trap_4_importance_weighted_bound_scales_outside_the_logarithm() -> None:
    # Of 1000 data 10 are seen. A guide wider than the posterior (variance 1/2) has weights of finite
    # variance; the bound then lies within its error of 100 times the evidence of the batch. With the scale
    # inside, the log of a mean of 100th powers is far above it: no bound at all.
    particles = 2000
    x = 1.4 * torch.randn(10, 1).double()
    pair = normal_pair(0.9, size=1000, subsample_size=10)
    weights = log_weights(*pair, x, num_particles=particles)
    bound = 100 * (weights.logsumexp(0) - math.log(particles)).sum()
    exact = 100 * dist.Normal(0.0, math.sqrt(2)).log_prob(x).sum()
    relative = (weights - weights.logsumexp(0) + math.log(particles)).exp().var(0)
    error = 100 * (relative.sum() / particles).sqrt()
    assert 0 < error < 0.01 * exact.abs()
    assert (bound - exact).abs() < 5 * error
    inside = (100 * weights).logsumexp(0).sum() - 10 * math.log(particles)
    assert inside - exact > 20 * error


@pytest.mark.parametrize("scaled", ["both", "model", "guide"])
def test_trap_3_scale_of_a_program_does_not_reach_the_weights(scaled: str) -> None:
    # A KL weight on one side is silently wrong in Pyro; here no scale counts.
    x, noise = torch.randn(4, 1).double(), torch.randn(6, 4, 1).double()
    model = poutine.scale(normal_model, scale=0.1) if scaled != "guide" else normal_model
    guide = poutine.scale(normal_guide, scale=0.1) if scaled != "model" else normal_guide
    with Draws(z=noise):
        expected = log_weights(normal_model, normal_guide, x, num_particles=6)
        torch.testing.assert_close(log_weights(model, guide, x, num_particles=6), expected, **CLOSE)


def masked_pair(mask: Tensor) -> tuple[Program, Program]:
    """Return the normal pair with masked distributions in place of a mask around the programs."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(mask), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x + 0.2, 0.5).to_event(1).mask(mask))

    return model, guide


@pytest.mark.parametrize("way", ["handler", "distribution"])
def test_masked_data_weigh_nothing(way: str) -> None:
    x = torch.randn(4, 1).double()
    mask = torch.tensor([True, False, True, True])
    pair = masked_pair(mask)
    if way == "handler":
        pair = poutine.mask(normal_model, mask=mask), poutine.mask(normal_guide, mask=mask)
    torch.manual_seed(1)
    expected = log_weights(normal_model, normal_guide, x, num_particles=6) * mask
    torch.manual_seed(1)
    weights = log_weights(*pair, x, num_particles=6)
    torch.testing.assert_close(weights, expected, **CLOSE)
    assert (weights[:, 1] == 0).all()
    assert (weights[:, [0, 2, 3]] != 0).all()


def test_masked_data_give_no_gradient() -> None:
    model, guide = vae_pair()
    x, noise = torch.randn(4, 3).double(), torch.randn(2, 4, 2).double()
    mask = torch.tensor([True, True, False, True])
    parameters = [*model.parameters(), *guide.parameters()]
    handled = poutine.mask(model, mask=mask), poutine.mask(guide, mask=mask)
    with Draws(z=noise):
        masked = torch.autograd.grad(log_weights(*handled, x, num_particles=2).sum(), parameters)
    with Draws(z=noise[:, mask]):
        kept = torch.autograd.grad(log_weights(model, guide, x[mask], num_particles=2).sum(), parameters)
    torch.testing.assert_close(masked, kept, **CLOSE)


# Other sites


def test_auxiliary_sites_of_the_guide_count_as_its_density() -> None:
    # z = loc + scale u with u drawn first, and z a point mass whose log density is the change of variables.
    x, noise = torch.randn(4, 1).double(), torch.randn(6, 4, 1).double()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            start = dist.Normal(torch.zeros_like(x), torch.ones_like(x)).to_event(1)
            u = pyro.sample("u", start, infer={"is_auxiliary": True})
            density = torch.full(u.shape[:-1], -math.log(0.5), dtype=u.dtype)
            pyro.sample("z", dist.Delta(0.3 * x + 0.2 + 0.5 * u, density, event_dim=1))

    with Draws(z=noise):
        expected = log_weights(normal_model, normal_guide, x, num_particles=6)
    with Draws(u=noise):
        parts = terms(normal_model, guide, x, num_particles=6)
    assert sorted(parts.kl) == ["u", "z"]
    torch.testing.assert_close(parts.log_weights(), expected, **CLOSE)


def test_two_latent_sites_and_two_observed_ones() -> None:
    noise = {name: torch.randn(5, 4, 1).double() for name in ("z1", "z2")}
    x, y = torch.randn(2, 4, 1).double()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(z2, 2.0).to_event(1), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(x, 0.5).to_event(1))
            pyro.sample("z2", dist.Normal(z1 + y, 0.7).to_event(1))

    with Draws(**noise):
        parts = terms(model, guide, x, y, num_particles=5)
    z1 = x + 0.5 * noise["z1"]
    z2 = z1 + y + 0.7 * noise["z2"]
    kl = {
        "z1": dist.Normal(x, 0.5).log_prob(z1) - dist.Normal(z2, 1.0).log_prob(z1),
        "z2": dist.Normal(z1 + y, 0.7).log_prob(z2) - dist.Normal(0.0, 1.0).log_prob(z2),
    }
    reconstruction = dist.Normal(z1, 1.0).log_prob(x) + dist.Normal(z2, 2.0).log_prob(y)
    assert sorted(parts.kl) == ["z1", "z2"]
    for name in kl:
        torch.testing.assert_close(parts.kl[name], kl[name].squeeze(-1), **CLOSE)
    torch.testing.assert_close(parts.reconstruction, reconstruction.squeeze(-1), **CLOSE)


def test_model_without_latent_sites() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    x = torch.randn(4, 3)
    weights = log_weights(model, lambda x: None, x, num_particles=2)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum(-1).expand(weights.shape)
    torch.testing.assert_close(weights, expected)


# Gradients


def test_gradients_reach_every_parameter_of_both() -> None:
    model, guide = vae_pair()
    x = torch.randn(4, 3).double()
    log_weights(model, guide, x, num_particles=3).sum().backward()
    for name, parameter in (*model.named_parameters(), *guide.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradients_are_those_of_the_weights() -> None:
    # A central difference along a random direction, with the noise held.
    model, guide = vae_pair()
    x, noise = torch.randn(4, 3).double(), torch.randn(3, 4, 2).double()
    coefficients = torch.rand(3, 4).double()
    parameters = [*model.parameters(), *guide.parameters()]
    start = [p.detach().clone() for p in parameters]
    direction = [torch.randn_like(p) for p in start]

    def value(step: float) -> Tensor:
        with torch.no_grad():
            for p, s, d in zip(parameters, start, direction, strict=True):
                p.copy_(s + step * d)
        with Draws(z=noise):
            return (coefficients * log_weights(model, guide, x, num_particles=3)).sum()

    gradients = torch.autograd.grad(value(0.0), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    step = 1e-6  # truncation is 1e-12 of the third derivative, rounding 1e-16 / 1e-6 of the value
    difference = float((value(step) - value(-step)).detach()) / (2 * step)
    assert difference == pytest.approx(slope, rel=1e-6)


# What it leaves alone


def test_leaves_store_and_modes_alone() -> None:
    pyro.param("kept", torch.ones(3))
    model, guide = vae_pair()
    model.eval()
    log_weights(model, guide, torch.randn(4, 3).double(), num_particles=2)
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert [model.training, guide.training] == [False, True]
    assert torch.is_grad_enabled()


def test_trap_1_pairs_with_equal_names_do_not_meet() -> None:
    # Both register "net"; in Pyro's store the second pair's guide and model would be the first's.
    def pair(start: float) -> tuple[Program, Program, nn.Module]:
        network = nn.Linear(1, 1).double()
        nn.init.constant_(network.weight, start)
        nn.init.zeros_(network.bias)

        def guide(x: Tensor) -> None:
            pyro.module("net", network)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(network(x), 0.5).to_event(1))

        return normal_model, guide, network

    x, noise = torch.randn(4, 1).double(), torch.randn(6, 4, 1).double()
    for start in (0.3, 0.6):
        model, guide, network = pair(start)
        with Draws(z=noise):
            weights = log_weights(model, guide, x, num_particles=6)
        z = start * x + 0.5 * noise
        log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        expected = (log_joint - dist.Normal(start * x, 0.5).log_prob(z)).squeeze(-1)
        torch.testing.assert_close(weights, expected, **CLOSE)
        weights.sum().backward()
        assert network.weight.grad is not None


# Errors


def guide_of(*names: str) -> Program:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for name in names:
                pyro.sample(name, dist.Normal(torch.zeros(1), 1.0).to_event(1))

    return guide


def global_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


def model_with_global_scale(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, scale[..., None]).to_event(1), obs=x)


def guide_with_global_scale(x: Tensor) -> None:
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    guide_of("z")(x)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (normal_model, guide_of(), "guide: lacks the model's latent site 'z'; it has []"),
        (normal_model, guide_of("z", "w"), "guide: site 'w' is no latent site of the model: ['x', 'z']"),
        (
            normal_model,
            global_guide,
            "site 'z': expected per-datum randomness in `pyro.plate(\"data\", n, dim=-1)`, "
            "got plates [('num_particles', -2)] (name, dim)",
        ),
        (
            model_with_global_scale,
            guide_with_global_scale,
            "site 'scale': expected per-datum randomness in `pyro.plate(\"data\", n, dim=-1)`, "
            "got plates [('num_particles', -2)] (name, dim)",
        ),
        (guide_of("z"), guide_of("z"), "model: expected an observed site (`obs=x`), found none"),
    ],
)
def test_pairs_that_have_no_weights(model: Program, guide: Program, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        log_weights(model, guide, torch.zeros(4, 1), num_particles=2)


def test_dimension_left_of_the_data_plate_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("pixels", 3, dim=-3), pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x.T[:, None, :])

    message = (
        r"^site 'x': expected a log-probability of shape \[num_particles, 4\], got \[3, 2, 4\]; "
        r"everything right of the data plate is an event \(`.to_event`\)$"
    )
    with pytest.raises(ValueError, match=message):
        log_weights(model, lambda x: None, torch.zeros(4, 3), num_particles=2)


@pytest.mark.parametrize(
    ("k", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_wrong_number_of_particles(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^num_particles: expected a whole number above 0, got {k}$"):
        log_weights(normal_model, normal_guide, torch.zeros(4, 1), num_particles=k)


def test_parameter_of_no_module_is_refused() -> None:
    # A fresh store would start it anew on every call.
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"^parameter 'loc': expected a parameter of a module"):
        log_weights(normal_model, guide, torch.zeros(4, 1))


def test_linear_gaussian_runs_in_float32_and_64() -> None:
    for dtype in (torch.float32, torch.float64):
        model, guide = LinearGaussian(2, 3).to(dtype), MeanFieldGuide(MLP(3), 2).to(dtype)
        assert log_weights(model, guide, torch.zeros(4, 3, dtype=dtype)).dtype == dtype
