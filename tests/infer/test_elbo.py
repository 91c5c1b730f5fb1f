"""Tests of KL control and of sticking the landing: values and gradients against formulas by hand."""

import functools
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, STL_ELBO, SVI, CyclicalWarmup, LinearWarmup
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models import VAE
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal

Program = Callable[..., Any]
# Float64 rounds at 1e-16; the sums here have fewer than 100 terms of order 1 to 100.
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}
analytic_or_not = pytest.mark.parametrize("analytic", [True, False], ids=["analytic", "sampled"])
particles = pytest.mark.parametrize("k", [1, 3])


def vae_pair(latent: int = 2, data: int = 3) -> tuple[VAE, MeanFieldGuide]:
    """Return a small pair in float64 whose posterior is neither the prior nor symmetric."""
    model = VAE(StandardNormal(latent), Normal(MLP(latent, data, hidden=5), scale="learned"))
    return model.double(), MeanFieldGuide(MLP(data, hidden=5), latent).double()


def data(n: int = 6, k: int = 1, latent: int = 2) -> tuple[Tensor, Tensor]:
    """Return data and noise for ``k`` draws."""
    noise = torch.randn(k, n, latent).double()
    return 2 * torch.randn(n, 3).double(), noise[0] if k == 1 else noise


def by_hand(
    model: VAE, guide: MeanFieldGuide, x: Tensor, noise: Tensor, *, analytic: bool
) -> tuple[Tensor, Tensor]:
    """Return log p(x | z), ``[n]``, and the KL per datum and dimension, ``[n, latent]``, means over draws."""
    q = guide.posterior(x).base_dist
    noise = noise.view(-1, len(x), q.mean.shape[-1])
    z = q.mean + q.stddev * noise
    if analytic:
        kl = 0.5 * (q.mean**2 + q.stddev**2 - 1) - q.stddev.log()
    else:
        kl = (0.5 * z**2 - 0.5 * noise**2 - q.stddev.log()).mean(0)
    return model.likelihood(z).log_prob(x).mean(0), kl


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    parameters = [p for module in modules for p in module.parameters()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def check_loss(
    elbo: ELBO, model: VAE, guide: MeanFieldGuide, x: Tensor, noise: Tensor, expected: Tensor
) -> None:
    """Check an estimator's value and the gradients of both programs on given noise."""
    with Draws(z=noise):
        loss = elbo.differentiable_loss(model, guide, x)  # type: ignore[attr-defined]
    torch.testing.assert_close(loss, expected, **CLOSE)
    ours, theirs = gradients(loss, model, guide), gradients(expected, model, guide)
    assert all(g.abs().max() > 0 for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# The ELBO


def test_analytic_elbo_is_that_of_pyro_on_the_same_noise() -> None:
    model, guide = vae_pair()
    x, noise = data()
    with Draws(z=noise):
        expected = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    check_loss(KL_ELBO(), model, guide, x, noise, expected)


@particles
@pytest.mark.parametrize("elbo", [functools.partial(KL_ELBO, analytic_kl=False), KL_ELBO, STL_ELBO])
def test_value_on_the_same_noise_is_that_of_pyro(elbo: Callable[..., ELBO], k: int) -> None:
    model, guide = vae_pair()
    x, noise = data(k=k)
    reference = TraceMeanField_ELBO if elbo is KL_ELBO else Trace_ELBO
    vectorized = reference(num_particles=k, vectorize_particles=k > 1, max_plate_nesting=1)
    with Draws(z=noise):
        ours = elbo(num_particles=k).loss(model, guide, x)
        theirs = vectorized.differentiable_loss(model, guide, x)
    torch.testing.assert_close(ours, theirs.detach(), **CLOSE)


@particles
def test_sampled_gradient_is_that_of_pyro_on_the_same_noise(k: int) -> None:
    model, guide = vae_pair()
    x, noise = data(k=k)
    vectorized = Trace_ELBO(num_particles=k, vectorize_particles=k > 1, max_plate_nesting=1)
    with Draws(z=noise):
        expected = vectorized.differentiable_loss(model, guide, x)
    check_loss(KL_ELBO(k, analytic_kl=False), model, guide, x, noise, expected)


@analytic_or_not
def test_expectation_is_the_exact_elbo(analytic: bool) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3 * x + 0.2, 0.5).to_event(1))

    x, k = 1.5 * torch.randn(10, 1).double(), 20_000
    elbo = KL_ELBO(k, analytic_kl=analytic)
    ours = -elbo.loss(model, guide, x)
    kl = 0.5 * ((0.3 * x + 0.2) ** 2 + 0.25 - 1 - math.log(0.25))
    reconstruction = -0.5 * ((0.7 * x - 0.2) ** 2 + 0.25) - 0.5 * math.log(2 * math.pi)
    assert elbo.terms is not None
    draws = elbo.terms.reconstruction if analytic else elbo.terms.log_weights()
    error = draws.sum(1).std() / math.sqrt(k)
    assert error < 0.05
    assert abs(ours - (reconstruction - kl).sum()) < 4 * error


# The KL's weight


@particles
@analytic_or_not
@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
def test_kl_weight_multiplies_the_kl(weight: float, analytic: bool, k: int) -> None:
    model, guide = vae_pair()
    x, noise = data(k=k)
    reconstruction, kl = by_hand(model, guide, x, noise, analytic=analytic)
    expected = -(reconstruction - weight * kl.sum(-1)).sum()
    check_loss(KL_ELBO(k, kl_weight=weight, analytic_kl=analytic), model, guide, x, noise, expected)


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
def test_sticking_the_landing_has_the_weighted_value(weight: float) -> None:
    model, guide = vae_pair()
    x, noise = data(k=3)
    reconstruction, kl = by_hand(model, guide, x, noise, analytic=False)
    with Draws(z=noise):
        loss = STL_ELBO(3, kl_weight=weight).loss(model, guide, x)
    expected = -(reconstruction - weight * kl.sum(-1)).sum().detach()
    torch.testing.assert_close(loss, expected, **CLOSE)


@given(n=st.integers(1, 4), k=st.integers(1, 3), latent=st.integers(1, 3), weight=st.floats(0, 5))
def test_every_shape(n: int, k: int, latent: int, weight: float) -> None:
    model, guide = vae_pair(latent)
    x, noise = data(n, k, latent)
    for analytic in (True, False):
        reconstruction, kl = by_hand(model, guide, x, noise, analytic=analytic)
        expected = -(reconstruction - weight * kl.sum(-1)).sum().detach()
        for free in ({}, {"capacity": 0.0}, {"free_bits": 0.0}, {"free_bits": 0.0, "free_bits_per": "site"}):
            elbo = KL_ELBO(k, kl_weight=weight, analytic_kl=analytic, **free)
            with Draws(z=noise):
                loss = elbo.loss(model, guide, x)
            if analytic or not free:  # a closed form is above 0, where neither changes it
                torch.testing.assert_close(loss, expected, **CLOSE)
            assert elbo.terms is not None and elbo.terms.reconstruction.shape == (k, n)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LinearWarmup(4), [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (LinearWarmup(2, start=3.0, end=1.0), [3.0, 2.0, 1.0, 1.0]),
        (CyclicalWarmup(4, ramp=0.5, end=2.0), [0.0, 1.0, 2.0, 2.0, 0.0, 1.0]),
    ],
)
def test_scheduled_weight_changes_with_each_gradient_and_with_nothing_else(
    schedule: Any, expected: list[float]
) -> None:
    model, guide = vae_pair()
    x, noise = data()
    reconstruction, kl = (part.detach() for part in by_hand(model, guide, x, noise, analytic=True))
    elbo = KL_ELBO(kl_weight=schedule)
    svi = SVI(model, guide, functools.partial(torch.optim.SGD, lr=0.0), elbo)
    with Draws(z=noise):
        for step, weight in enumerate(expected):
            now = -(reconstruction - weight * kl.sum(-1)).sum()
            for _ in range(2):
                torch.testing.assert_close(svi.evaluate_loss(x), now, **CLOSE)
            with torch.no_grad():
                torch.testing.assert_close(elbo.differentiable_loss(model, guide, x), now, **CLOSE)
            assert int(elbo.step) == step
            torch.testing.assert_close(svi.step(x), now, **CLOSE)
    assert int(elbo.step) == len(expected)


def test_sticking_the_landing_follows_a_schedule() -> None:
    model, guide = vae_pair()
    x, noise = data()
    reconstruction, kl = (part.detach() for part in by_hand(model, guide, x, noise, analytic=False))
    svi = SVI(model, guide, functools.partial(torch.optim.SGD, lr=0.0), STL_ELBO(kl_weight=LinearWarmup(2)))
    with Draws(z=noise):
        for weight in (0.0, 0.5, 1.0, 1.0):
            torch.testing.assert_close(svi.step(x), -(reconstruction - weight * kl.sum(-1)).sum(), **CLOSE)


# Capacity and free bits


@particles
@analytic_or_not
@pytest.mark.parametrize("share", [0.5, 1.5], ids=["above", "below"])
def test_capacity_is_the_distance_of_the_batch_mean(share: float, analytic: bool, k: int) -> None:
    model, guide = vae_pair()
    x, noise = data(k=k)
    reconstruction, kl = by_hand(model, guide, x, noise, analytic=analytic)
    total = kl.sum(-1).mean()
    capacity = abs(float(total.detach())) * share
    expected = -(reconstruction - 3.0 * (total - capacity).abs()).sum()
    elbo = KL_ELBO(k, kl_weight=3.0, capacity=capacity, analytic_kl=analytic)
    check_loss(elbo, model, guide, x, noise, expected)


def test_capacity_can_be_scheduled() -> None:
    model, guide = vae_pair()
    x, noise = data()
    reconstruction, kl = (part.detach() for part in by_hand(model, guide, x, noise, analytic=True))
    elbo = KL_ELBO(kl_weight=2.0, capacity=LinearWarmup(4, end=8.0))
    svi = SVI(model, guide, functools.partial(torch.optim.SGD, lr=0.0), elbo)
    with Draws(z=noise):
        for capacity in (0.0, 2.0, 4.0, 6.0, 8.0, 8.0):
            expected = -(reconstruction - 2.0 * (kl.sum(-1).mean() - capacity).abs()).sum()
            torch.testing.assert_close(svi.step(x), expected, **CLOSE)


@particles
@analytic_or_not
def test_free_bits_per_dimension(analytic: bool, k: int) -> None:
    """One dimension is above, the others below."""
    model, guide = vae_pair(latent=3)
    x, noise = data(k=k, latent=3)
    reconstruction, kl = by_hand(model, guide, x, noise, analytic=analytic)
    means = kl.mean(0)
    low, high = means.detach().sort().values[1:].tolist()
    free = (low + high) / 2
    assert free > 0
    expected = -(reconstruction - 2.0 * torch.where(means > free, means, free).sum()).sum()
    elbo = KL_ELBO(k, kl_weight=2.0, free_bits=free, analytic_kl=analytic)
    check_loss(elbo, model, guide, x, noise, expected)


@particles
@analytic_or_not
@pytest.mark.parametrize("share", [0.5, 1.5], ids=["above", "below"])
def test_free_bits_per_site(share: float, analytic: bool, k: int) -> None:
    model, guide = vae_pair()
    x, noise = data(k=k)
    reconstruction, kl = by_hand(model, guide, x, noise, analytic=analytic)
    total = kl.sum(-1).mean()
    free = abs(float(total.detach())) * share
    expected = -(reconstruction - 2.0 * torch.where(total > free, total, free)).sum()
    elbo = KL_ELBO(k, kl_weight=2.0, free_bits=free, free_bits_per="site", analytic_kl=analytic)
    check_loss(elbo, model, guide, x, noise, expected)


@analytic_or_not
@pytest.mark.parametrize("per", ["dimension", "site"])
def test_free_kl_has_no_gradient(per: Any, analytic: bool) -> None:
    model, guide = vae_pair()
    x, noise = data()
    reconstruction, _ = by_hand(model, guide, x, noise, analytic=analytic)
    with Draws(z=noise):
        elbo = KL_ELBO(free_bits=1e3, free_bits_per=per, analytic_kl=analytic)
        loss = elbo.differentiable_loss(model, guide, x)
    free = 2e3 if per == "dimension" else 1e3
    torch.testing.assert_close(loss, free * len(x) - reconstruction.sum(), **CLOSE)
    for a, b in zip(gradients(loss, guide), gradients(-reconstruction.sum(), guide), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def two_site_pair() -> tuple[Program, Program]:
    """Return a model and guide of two independent sites, 1 and 2 dimensions."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.cat([a, b], -1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("a", dist.Normal(0.1 * x[:, :1], 0.9).to_event(1))
            pyro.sample("b", dist.Normal(x[:, 1:], 0.2).to_event(1))

    return model, guide


def test_sites_are_freed_one_by_one_and_capped_together() -> None:
    model, guide = two_site_pair()
    x = 2 * torch.randn(6, 3).double()
    noise = {"a": torch.randn(6, 1).double(), "b": torch.randn(6, 2).double()}
    loc = torch.cat([0.1 * x[:, :1], x[:, 1:]], -1)
    scale = torch.tensor([0.9, 0.2, 0.2], dtype=torch.float64)
    z = loc + scale * torch.cat([noise["a"], noise["b"]], -1)
    reconstruction = dist.Normal(z, 1.0).log_prob(x).sum()
    kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).mean(0)
    a, b = float(kl[0]), float(kl[1:].sum())
    assert a < 1 < b
    with Draws(**noise):
        freed = KL_ELBO(free_bits=1.0, free_bits_per="site").loss(model, guide, x)
        capped = KL_ELBO(capacity=1.0, kl_weight=5.0).loss(model, guide, x)
    torch.testing.assert_close(freed, -(reconstruction - 6 * (1 + b)), **CLOSE)
    torch.testing.assert_close(capped, -(reconstruction - 6 * 5 * abs(a + b - 1)), **CLOSE)


def test_free_bits_per_dimension_needs_dimensions() -> None:
    model, guide = full_rank_pair("full", torch.randn(5, 3).double())
    with pytest.raises(ValueError, match=r"free_bits: expected .* at site 'z'.*per='site'"):
        KL_ELBO(free_bits=0.1).loss(model, guide, torch.randn(5, 3).double())


@analytic_or_not
@pytest.mark.parametrize("masked", ["model", "guide"])
def test_free_bits_per_dimension_refuse_a_mask(masked: str, analytic: bool) -> None:
    pair = dict(zip(("model", "guide"), two_site_pair(), strict=True))
    pair[masked] = poutine.mask(pair[masked], mask=torch.tensor([True, False, True]))
    x = torch.randn(3, 3).double()
    with pytest.raises(ValueError, match=r"free_bits: expected .* no mask at site 'a'.*per='site'"):
        KL_ELBO(free_bits=0.1, analytic_kl=analytic).loss(pair["model"], pair["guide"], x)
    assert KL_ELBO(free_bits=0.1, free_bits_per="site").loss(pair["model"], pair["guide"], x).isfinite()


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 1.0, "free_bits": 0.1}, ValueError, "expected None beside a capacity, got 0.1"),
        ({"capacity": 0.0, "free_bits": 0.0}, ValueError, "free_bits: expected None beside a capacity"),
        ({"capacity": -1.0}, ValueError, "capacity: expected a finite number from 0, got -1.0"),
        ({"free_bits": -1.0}, ValueError, "free_bits: expected a finite number from 0, got -1.0"),
        ({"free_bits": math.nan}, ValueError, "free_bits: expected a finite number from 0, got nan"),
        ({"free_bits": "1"}, TypeError, "free_bits: expected a number from 0, got '1'"),
        ({"kl_weight": -0.5}, ValueError, "kl_weight: expected a finite number from 0, got -0.5"),
        ({"kl_weight": None}, TypeError, "kl_weight: expected a number from 0, got None"),
        ({"num_particles": 0}, ValueError, "num_particles: expected a whole number above 0, got 0"),
        ({"free_bits_per": "sites"}, ValueError, "free_bits_per: unknown 'sites' (did you mean 'site'?)"),
    ],
)
def test_wrong_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        KL_ELBO(**options)


# Closed forms


def full_rank_pair(kind: str, x: Tensor) -> tuple[Program, Program]:
    """Return a model with prior Normal(m, s).to_event(1) and a guide with dependent dimensions."""
    loc, scale = torch.tensor([[0.3, -0.5], [1.2, 0.7]]).double()
    weight, tril = torch.randn(3, 2).double(), torch.tensor([[0.6, 0.0], [0.4, 0.3]]).double()
    factor, diagonal = torch.tensor([[0.5], [-0.4]]).double(), torch.tensor([0.2, 0.3]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean = 0.2 * x @ weight
        with pyro.plate("data", len(x), dim=-1):
            if kind == "full":
                pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=tril))
            else:
                pyro.sample("z", dist.LowRankMultivariateNormal(mean, factor.expand(len(x), 2, 1), diagonal))

    return model, guide


@particles
@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_full_rank_guide_has_a_closed_form(kind: str, k: int) -> None:
    x, many = torch.randn(5, 3).double(), 40_000
    model, guide = full_rank_pair(kind, x)
    elbo, sampled = KL_ELBO(k, kl_weight=1.0), KL_ELBO(many, analytic_kl=False)
    loss = elbo.loss(model, guide, x)
    sampled.loss(model, guide, x)
    assert elbo.terms is not None and sampled.terms is not None
    assert (elbo.analytic, sampled.analytic) == ({"z": True}, {"z": False})
    ours = loss + elbo.terms.reconstruction.mean(0).sum()  # the KL alone
    draws = sampled.terms.kl["z"].sum(1)
    error = draws.std() / math.sqrt(many)
    assert error < 0.02 * draws.mean()
    assert abs(ours - draws.mean()) < 4 * error


def test_each_site_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ppl_vae")
    model, guide = two_site_pair()
    x, elbo = torch.randn(6, 3).double(), KL_ELBO()
    assert elbo.analytic == {}
    for _ in range(3):
        elbo.loss(model, guide, x)
    assert elbo.analytic == {"a": True, "b": True}
    assert caplog.messages == ["KL of site 'a': closed form", "KL of site 'b': closed form"]


class FlowGuide(nn.Module):
    """A guide with one autoregressive step after a diagonal normal."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4).double()
        self.flow = dist.transforms.affine_autoregressive(2, hidden_dims=[4]).double()

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.head(x).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


class MixturePrior(nn.Module):
    """Two components of two dimensions."""

    def forward(self, context: Tensor | None = None) -> Any:
        loc = torch.tensor([[-1.0, 0.0], [2.0, 1.0]]).double()
        weights = torch.tensor([0.3, 0.7]).double()
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 0.8).to_event(1))


@pytest.mark.parametrize("which", ["flow guide", "mixture prior"])
def test_unknown_closed_form_is_sampled_and_said(which: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ppl_vae")
    model, guide = vae_pair()
    pair: tuple[Program, Program] = (model, FlowGuide())
    if which == "mixture prior":
        pair = VAE(MixturePrior(), model.likelihood), guide
    x, _ = data()
    elbo = KL_ELBO(kl_weight=1.0)
    torch.manual_seed(5)
    ours = elbo.differentiable_loss(*pair, x)
    torch.manual_seed(5)
    theirs = Trace_ELBO().differentiable_loss(*pair, x)
    assert elbo.analytic == {"z": False}
    assert caplog.messages == ["KL of site 'z': estimated from draws"]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for a, b in zip(gradients(ours, *pair), gradients(theirs, *pair), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def ladder_pair(*, bottom_up: bool) -> tuple[Program, Program]:
    """Return a model z2, z1 given z2, x given z1, and a guide in the same or the other order."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(0.9 * z2, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if bottom_up:
                z1 = pyro.sample("z1", dist.Normal(0.5 * x, 0.6).to_event(1))
                pyro.sample("z2", dist.Normal(0.7 * z1, 0.5).to_event(1))
            else:
                z2 = pyro.sample("z2", dist.Normal(0.3 * x, 0.7).to_event(1))
                pyro.sample("z1", dist.Normal(0.5 * z2 + 0.3 * x, 0.4).to_event(1))

    return model, guide


def test_closed_form_is_refused_where_it_is_wrong() -> None:
    model, guide = ladder_pair(bottom_up=True)
    message = r"site 'z1': the closed form .* model draws it after \['z2'\], .*analytic_kl=False"
    with pytest.raises(ValueError, match=message):
        KL_ELBO().loss(model, guide, torch.randn(4, 1).double())


@pytest.mark.parametrize(("bottom_up", "analytic"), [(True, False), (False, True), (False, False)])
def test_ladder(bottom_up: bool, analytic: bool) -> None:
    model, guide = ladder_pair(bottom_up=bottom_up)
    x, k = torch.randn(4, 1).double() + 1, 20_000
    elbo = KL_ELBO(k, analytic_kl=analytic)
    ours = elbo.loss(model, guide, x)
    theirs = Trace_ELBO(num_particles=k, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x)
    assert elbo.terms is not None and elbo.analytic == {"z1": analytic, "z2": analytic}
    # a closed form has less variance than the draws
    error = elbo.terms.log_weights().sum(1).std() * math.sqrt(2 / k)
    assert error < 0.05
    assert abs(float(ours) - theirs) < 4 * error


# Training


def bits(n: int = 60) -> Tensor:
    return torch.bernoulli(torch.full((n, 4), 0.4), generator=torch.Generator().manual_seed(7))


def bits_pair(seed: int = 0) -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(seed)
    return VAE(StandardNormal(2), Bernoulli(MLP(2, 4, hidden=3))), MeanFieldGuide(MLP(4, hidden=3), 2)


QUIET: dict[str, Any] = {"progress": False, "batch_size": 20, "learning_rate": 1e-2}  # 3 steps per epoch


def values(run: Any) -> list[Tensor]:
    return [v.detach().clone() for program in (run.model, run.guide) for v in program.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def test_records_hold_the_true_elbo_beside_the_objective() -> None:
    elbo = KL_ELBO(kl_weight=4.0, analytic_kl=False)
    run = fit(*bits_pair(), bits(), validation=bits(20), elbo=elbo, epochs=2, **QUIET)
    for record in run.history:
        assert "kl_weight" not in record
        for side in ("train", "validation"):
            reconstruction, kl = record[f"{side}_reconstruction"], record[f"{side}_kl_z"]
            assert record[f"{side}_elbo"] == pytest.approx(reconstruction - kl, rel=1e-5)
        weighted = record["train_reconstruction"] - 4 * record["train_kl_z"]
        assert record["train_loss"] == pytest.approx(-weighted, rel=1e-5)
        assert abs(record["train_loss"] + record["train_elbo"]) > 1e-3


def test_records_hold_the_weight_that_a_schedule_gives() -> None:
    run = fit(*bits_pair(), bits(), elbo=KL_ELBO(kl_weight=LinearWarmup(8)), epochs=3, **QUIET)
    assert [record["kl_weight"] for record in run.history] == pytest.approx([2 / 8, 5 / 8, 1.0])
    run = fit(*bits_pair(), bits(), elbo=STL_ELBO(kl_weight=CyclicalWarmup(8)), epochs=3, **QUIET)
    assert [record["kl_weight"] for record in run.history] == pytest.approx([2 / 4, 1.0, 0.0])


def test_settings_describe_the_estimator_and_its_schedule() -> None:
    elbo = KL_ELBO(2, kl_weight=LinearWarmup(8, end=2.0), capacity=CyclicalWarmup(10, ramp=0.3))
    run = fit(*bits_pair(), bits(), elbo=elbo, epochs=1, **QUIET)
    described = run.config["elbo"]
    assert described.pop("class").endswith("KL_ELBO")
    weight, capacity = described.pop("kl_weight"), described.pop("capacity")
    assert weight.pop("class").endswith("LinearWarmup") and capacity.pop("class").endswith("CyclicalWarmup")
    assert weight == {"steps": 8, "start": 0.0, "end": 2.0}
    assert capacity == {"period": 10, "ramp": 0.3, "start": 0.0, "end": 1.0}
    assert described == {
        "num_particles": 2,
        "analytic_kl": True,
        "free_bits": None,
        "free_bits_per": "dimension",
    }


def test_a_schedule_starts_anew_with_each_fit() -> None:
    elbo = KL_ELBO(kl_weight=LinearWarmup(7, end=3.0))
    first = fit(*bits_pair(), bits(), elbo=elbo, epochs=2, **QUIET)
    start = values(first)
    assert int(elbo.step) == 6
    second = fit(*bits_pair(), bits(), elbo=elbo, epochs=2, **QUIET)
    assert int(elbo.step) == 6
    assert same(start, values(second))
    assert without_time(first.history) == without_time(second.history)


class Interrupts:
    """Stops the training in the middle of an epoch, at the guide's n-th call."""

    def __init__(self, call: int) -> None:
        self.left = call

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.left -= 1 if module.training and torch.is_grad_enabled() else 0
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", [LinearWarmup(7, end=3.0), CyclicalWarmup(5, end=3.0)])
@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_a_resumed_run_takes_the_schedule_up(end: str, schedule: Any, tmp_path: Path) -> None:
    """Ended after 4 of 12 steps, in its second epoch, and taken up by another estimator object.

    A kill leaves the folder as it was after the last epoch.
    """

    def elbo() -> KL_ELBO:
        return KL_ELBO(kl_weight=schedule)

    def keep(run: Any) -> None:
        if end == "killed" and len(run.history) == 1:
            shutil.copytree(run.path, tmp_path / "parts")

    whole = fit(
        *bits_pair(), bits(), elbo=elbo(), epochs=4, output=tmp_path / "whole", callbacks=[keep], **QUIET
    )
    options: dict[str, Any] = {"epochs": 4, "output": tmp_path / "parts", "resume": True, **QUIET}
    if end == "interrupted":
        model, guide = bits_pair()
        guide.register_forward_pre_hook(Interrupts(5))
        with pytest.warns(UserWarning, match="interrupted: 1 of 4 epochs"):
            fit(model, guide, bits(), elbo=elbo(), **options)
    used = elbo()
    used.step += 100
    run = fit(*bits_pair(seed=9), bits(), elbo=used, **options)
    assert int(used.step) == 12
    assert same(values(run), values(whole))
    assert without_time(run.history) == without_time(whole.history)
    constant = fit(*bits_pair(), bits(), elbo=KL_ELBO(kl_weight=3.0), epochs=4, **QUIET)
    assert not same(values(constant), values(whole))  # the weight matters


def test_resuming_with_another_schedule_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output": tmp_path / "run", "resume": True, **QUIET}
    fit(*bits_pair(), bits(), elbo=KL_ELBO(kl_weight=LinearWarmup(7)), epochs=1, **options)
    with pytest.raises(ValueError, match=r"resume: elbo differs .*'steps': 7.*'steps': 8"):
        fit(*bits_pair(), bits(), elbo=KL_ELBO(kl_weight=LinearWarmup(8)), epochs=2, **options)


# Mean gradients


def conv_pair() -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(1)
    network: dict[str, Any] = {"hidden": 6, "channels": (2, 3)}
    model = VAE(StandardNormal(2), Bernoulli(ConvDecoder(2, (1, 8, 8), **network)))
    return model, MeanFieldGuide(ConvEncoder((1, 8, 8), **network), 2)


def small_pair() -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(1)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8), hidden=4)))
    return model, MeanFieldGuide(MLP((1, 8, 8), hidden=4), 2)


def mean_gradient(elbo: Any, make: Program, seed: int, repeats: int = 50) -> tuple[Tensor, Tensor]:
    """Return the mean, and its standard error, of the gradient along a fixed direction per parameter.

    Each repeat is a batch of 150 copies of two data.
    """
    model, guide = (program.double() for program in make())
    x = torch.bernoulli(torch.full((2, 1, 8, 8), 0.4).double()).repeat(150, 1, 1, 1)
    parameters = [p for program in (model, guide) for p in program.parameters()]
    directions = [torch.randn_like(p) for p in parameters]
    torch.manual_seed(seed)
    seen = []
    for _ in range(repeats):
        found = torch.autograd.grad(elbo.differentiable_loss(model, guide, x), parameters)
        seen.append(torch.stack([(g * d).sum() for g, d in zip(found, directions, strict=True)]))
    drawn = torch.stack(seen)
    return drawn.mean(0), drawn.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize("make", [conv_pair, small_pair], ids=["conv", "mlp"])
def test_mean_gradients_are_those_of_pyro(make: Program) -> None:
    with pyro.validation_enabled(False):  # for time
        expected, error = mean_gradient(Trace_ELBO(), make, seed=2)

        def deviations(elbo: Any, seed: int) -> Tensor:
            mean, own = mean_gradient(elbo, make, seed)
            return (mean - expected).abs() / (own**2 + error**2).sqrt()

        for seed, k in ((3, 1), (4, 4)):
            for elbo in (KL_ELBO(k), KL_ELBO(k, analytic_kl=False), STL_ELBO(k)):
                assert deviations(elbo, seed).max() < 4
        # the errors are small enough to see another objective
        assert deviations(KL_ELBO(4, kl_weight=0.5), 5).max() > 8
