"""Tests of the mixture guide and of the gradients of its draws."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from densities import (
    ELBOS,
    data,
    gradients_reach_every_parameter,
    integral,
    moments_agree,
    steps_compiled_and_plain,
)
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.distributions import NormalMixture
from ppl_vae.guides.full_rank import FullRankGuide
from ppl_vae.guides.mixture import MixtureGuide
from ppl_vae.infer import STL_ELBO, SVI, log_weights, tracing
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP

LOC = torch.tensor([[-1.0, 0.5], [1.2, -0.4], [0.3, 1.0]], dtype=torch.float64)
SCALE = torch.tensor([[0.5, 0.8], [0.9, 0.6], [0.7, 1.3]], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def make(latent: int = 2, components: int = 3, **options: Any) -> MixtureGuide:
    return MixtureGuide(MLP(4, hidden=5), latent, components, **{"weights": "network", **options}).double()


def mixture(loc: Tensor, scale: Tensor, logits: Tensor) -> NormalMixture:
    return NormalMixture(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))


def grid(dimensions: int, points: int = 601, half_width: float = 9.0) -> tuple[Tensor, float]:
    """Return a grid ``[points ** dimensions, dimensions]`` and the volume of a cell."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(*[axis] * dimensions, indexing="ij"), -1)
    return z.reshape(-1, dimensions), float(axis[1] - axis[0]) ** dimensions


def log_joint(z: Tensor) -> Tensor:
    """Return the log of an unnormalised density without symmetry."""
    return -0.5 * z.square().sum(-1) + torch.sin(2 * z[..., 0]) + 0.7 * z[..., 0] * z[..., -1].tanh()


# The posterior


@given(n=st.integers(1, 4), latent=st.integers(1, 3), components=st.integers(1, 4))
def test_posterior_is_the_mixture_of_the_head(n: int, latent: int, components: int) -> None:
    guide, x = make(latent, components), data(n)
    nn.init.normal_(guide.head.weight)
    out = guide.head(guide.encoder(x))
    locs, log_scales, logits = out.split([components * latent, components * latent, components], -1)
    posterior, z = guide.posterior(x), torch.randn(5, n, latent, dtype=torch.float64)
    assert (posterior.batch_shape, posterior.event_shape) == ((n,), (latent,))
    density, mean = 0, 0
    for c in range(components):
        part = slice(c * latent, (c + 1) * latent)
        weight = logits.softmax(-1)[:, c]
        normal = dist.Normal(locs[:, part], log_scales[:, part].exp()).to_event(1)
        density = density + weight * normal.log_prob(z).exp()
        mean = mean + weight.unsqueeze(-1) * locs[:, part]
    torch.testing.assert_close(posterior.log_prob(z).exp(), density)
    torch.testing.assert_close(posterior.mean, mean)
    assert posterior.rsample((5,)).shape == z.shape


def test_weights_are_equal_at_the_start_or_always() -> None:
    x = data()
    third = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    assert make().head.out_features == 3 * 5
    torch.testing.assert_close(make().posterior(x).mixture_distribution.probs, third)
    guide = make(weights="equal")
    assert guide.head.out_features == 3 * 4
    nn.init.normal_(guide.head.weight)
    nn.init.normal_(guide.head.bias)
    torch.testing.assert_close(guide.posterior(x).mixture_distribution.probs, third)


def test_one_component_is_the_normal() -> None:
    posterior, z = make(2, 1).posterior(data()), torch.randn(3, 2, dtype=torch.float64)
    normal = posterior.component_distribution.base_dist
    expected = dist.Normal(normal.loc[:, 0], normal.scale[:, 0]).to_event(1).log_prob(z)
    torch.testing.assert_close(posterior.log_prob(z), expected)
    drawn = posterior.rsample()
    (found,) = torch.autograd.grad(drawn.sum(), normal.loc)
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("weights", ["network", "equal"])
def test_density_integrates_to_one_and_draws_are_of_it(weights: str) -> None:
    guide = make(weights=weights)
    nn.init.normal_(guide.head.weight, std=0.3)
    posterior = guide.posterior(data())
    torch.testing.assert_close(integral(posterior), torch.ones(3).double(), atol=1e-3, rtol=0)
    assert moments_agree(posterior)


def test_gradients_reach_every_parameter() -> None:
    assert gradients_reach_every_parameter(make(), data()) == []
    assert gradients_reach_every_parameter(make(weights="equal"), data()) == []


def test_particles_and_batch_are_their_loop_and_the_encoder_runs_once() -> None:
    guide, x, rows = make(), data(), []
    guide.encoder.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    with pyro.plate("particles", 7, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    z = trace.nodes["z"]["value"]
    assert z.shape == (7, 3, 2)
    assert rows == [3]
    trace.compute_log_prob()
    log_prob = trace.nodes["z"]["log_prob"]
    for k in range(7):
        for i in range(3):
            torch.testing.assert_close(log_prob[k, i], guide.posterior(x[i : i + 1]).log_prob(z[k, i])[0])


@pytest.mark.parametrize("shape", [(), (4,), (4, 5)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_draws_of_any_shape(shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    q = mixture(LOC, SCALE, LOGITS)
    q = q.expand(batch) if batch else q
    torch.manual_seed(1)
    z = q.rsample(shape)
    assert z.shape == (*shape, *batch, 2) and z.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(q.sample(shape), z)
    assert q.log_prob(z).shape == (*shape, *batch)


@pytest.mark.parametrize(("start", "clamped"), [(-100.0, -7.0), (100.0, 7.0)])
def test_log_scale_is_clamped(start: float, clamped: float) -> None:
    guide = make()
    nn.init.zeros_(guide.head.weight)
    nn.init.constant_(guide.head.bias, start)
    scale = guide.posterior(data()).component_distribution.stddev
    torch.testing.assert_close(scale, torch.full((3, 3, 2), math.exp(clamped), dtype=torch.float64))


# Gradients of draws


def gradients(
    parameters: list[Tensor], value: Callable[[NormalMixture, Tensor], Tensor], draws: int = 100_000
) -> list[Tensor]:
    """Return the gradient of each draw's value by each parameter, ``[draws, ...]``."""
    own = [p.expand(draws, *p.shape).clone().requires_grad_() for p in parameters]
    q = mixture(*own)
    return list(torch.autograd.grad(value(q, q.rsample()).sum(), own))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_gradients_of_the_elbo_are_those_of_quadrature(dimensions: int) -> None:
    # 4 standard errors of 100 000 draws; of 3 * (1 + 2 * dimensions) numbers.
    parameters = [LOC[:, :dimensions], SCALE[:, :dimensions], LOGITS]
    z, volume = grid(dimensions)
    own = [p.clone().requires_grad_() for p in parameters]
    log_q = mixture(*own).log_prob(z)
    expected = torch.autograd.grad((log_q.exp() * (log_joint(z) - log_q)).sum() * volume, own)
    for gradient, exact in zip(
        gradients(parameters, lambda q, z: log_joint(z) - q.log_prob(z)), expected, strict=True
    ):
        error = gradient.std(0) / len(gradient) ** 0.5
        assert ((gradient.mean(0) - exact).abs() < 4 * error).all()
        assert (error < 0.02).all()


@pytest.mark.parametrize("dimensions", [1, 3, 12])
def test_gradients_of_moments_are_exact_ones(dimensions: int) -> None:
    torch.manual_seed(4)
    loc = torch.randn(4, dimensions, dtype=torch.float64)
    scale = 0.5 + torch.rand(4, dimensions, dtype=torch.float64)
    own = [p.clone().requires_grad_() for p in (loc, scale, torch.tensor([0.5, -0.5, 0.0, 0.2]).double())]
    moment = (own[2].softmax(-1).unsqueeze(-1) * (own[0].square() + own[1].square())).sum()
    expected = torch.autograd.grad(moment, own)
    found = gradients([p.detach() for p in own], lambda q, z: z.square().sum(-1), draws=50_000)
    for gradient, exact in zip(found, expected, strict=True):
        assert ((gradient.mean(0) - exact).abs() < 4 * gradient.std(0) / len(gradient) ** 0.5).all()


def test_weights_gradient_keeps_the_distribution_functions() -> None:
    # dF_i + sum over l of (dF_i / dz_l) dz_l = 0, with F_i the distribution of z_i given those before.
    logits = LOGITS.clone().requires_grad_()
    torch.manual_seed(3)
    z = mixture(LOC, SCALE, logits).rsample()
    dz = torch.stack([torch.autograd.grad(z[i], logits, retain_graph=True)[0] for i in range(2)])

    def functions(logits: Tensor, z: Tensor) -> Tensor:
        normal = dist.Normal(LOC, SCALE)
        first = logits.softmax(-1)
        second = (logits + normal.log_prob(z)[:, 0]).softmax(-1)
        return torch.stack([(first * normal.cdf(z)[:, 0]).sum(), (second * normal.cdf(z)[:, 1]).sum()])

    by_logits, by_z = torch.autograd.functional.jacobian(functions, (LOGITS, z.detach()))
    torch.testing.assert_close(by_logits + by_z @ dz, torch.zeros(2, 3).double(), atol=1e-12, rtol=0)


def test_locations_gradient_is_the_mean_of_the_components_own() -> None:
    # For f(z) = z the derivative through the component that made the draw is 1 or 0: variance w (1 - w).
    gradient = gradients([LOC, SCALE, LOGITS], lambda q, z: z.sum(-1))[0]
    weights = LOGITS.softmax(-1).unsqueeze(-1).expand(3, 2)
    torch.testing.assert_close(gradient.mean(0), weights, atol=0.01, rtol=0)
    assert (gradient.var(0) < 0.8 * weights * (1 - weights)).all()


@pytest.mark.parametrize("log_scale", [-7.0, 0.0, 7.0])
def test_gradients_are_finite_in_float32(log_scale: float) -> None:
    loc, logits = torch.randn(5, 40), torch.linspace(-20, 3, 5)
    scale = torch.full((5, 40), math.exp(log_scale))
    for distance in (0.0, 1.0, 100.0):
        for gradient in gradients([distance * loc, scale, logits], lambda q, z: z.sum(-1), draws=500):
            assert gradient.dtype == torch.float32
            assert gradient.isfinite().all()


def test_pyros_own_mixture_of_unequal_scales_is_biased() -> None:
    # The reason for a class of our own; if this fails, Pyro's may have become right.
    z, volume = grid(2)
    own = [p.clone().requires_grad_() for p in (LOC, SCALE, LOGITS)]
    value = (mixture(*own).log_prob(z).exp() * z.prod(-1)).sum() * volume
    exact = torch.autograd.grad(value, own)[2]
    batch = [p.detach().expand(50_000, *p.shape).clone().requires_grad_() for p in own]
    drawn = dist.MixtureOfDiagNormals(*batch).rsample().prod(-1).sum()
    gradient = torch.autograd.grad(drawn, batch)[2]
    error = gradient.std(0) / len(gradient) ** 0.5
    assert ((gradient.mean(0) - exact).abs() > 10 * error).any()


# Training


@pytest.mark.parametrize("name", ELBOS)
def test_trains_with_every_estimator(name: str) -> None:
    model, guide, x = LinearGaussian(2, 4).double(), make(), data(8)
    gap = [(model.log_prob(x) - log_weights(model, guide, x, num_particles=500)).mean()]
    svi = SVI(model, guide, torch.optim.Adam(guide.parameters(), lr=0.02), ELBOS[name]())
    for _ in range(80):
        svi.step(x)
    gap.append((model.log_prob(x) - log_weights(model, guide, x, num_particles=500)).mean())
    assert gap[1] < 0.6 * gap[0]


@pytest.mark.parametrize("elbo", ["DReG", "KL_ELBO", "Trace_ELBO"])
def test_compiled_steps_are_plain_steps(elbo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    for one, two in zip(*steps_compiled_and_plain(make, ELBOS[elbo]), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_is_traced() -> None:
    guide, x = make(), data()

    def run(x: Tensor) -> Tensor:
        z = guide.posterior(x).rsample((7,))
        return torch.autograd.grad(guide.posterior(x).log_prob(z).sum(), guide.head.weight)[0]

    with pyro.validation_enabled(False):
        graph, other = make_fx(run)(x), data()
        torch.manual_seed(2)
        found = graph(other)
        torch.manual_seed(2)
        torch.testing.assert_close(found, run(other))


def two_modes(x: Tensor) -> Tensor:
    """Run a program whose posterior has two modes, of weights 0.42 and 0.58."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        loc = torch.stack([z[..., 0] * (z[..., 0] + 0.2), z[..., 1] + 0.3 * z[..., 0]], -1)
        return pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def exact_log_evidence(x: Tensor) -> Tensor:
    z, volume = grid(2, half_width=6.0)
    trace = poutine.trace(poutine.condition(two_modes, {"z": z})).get_trace(x.expand(len(z), 2))
    trace.compute_log_prob()
    return (trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]).logsumexp(0) + math.log(volume)


@pytest.mark.parametrize("weights", ["network", "equal"])
def test_beats_full_rank_on_two_modes(weights: str) -> None:
    x = torch.tensor([[1.5, 0.2]], dtype=torch.float64)
    evidence, gaps = exact_log_evidence(x), []
    for guide in (
        FullRankGuide(nn.Linear(2, 8), 2).double(),
        MixtureGuide(nn.Linear(2, 8), 2, 2, weights=weights).double(),
    ):
        optim = torch.optim.Adam(guide.parameters(), lr=0.02)
        svi = SVI(two_modes, guide, optim, STL_ELBO(), clip_norm=1.0)
        for _ in range(400):
            svi.step(x.expand(32, 2))
        with torch.no_grad():
            gaps.append((evidence - log_weights(two_modes, guide, x, num_particles=20_000).mean()).item())
    assert 0.4 < gaps[0]
    assert gaps[1] < 0.15


def test_wrong_arguments() -> None:
    encoder: Any = MLP(4, hidden=5)
    with pytest.raises(ValueError, match=r"^latent_dim: expected a whole number above 0, got 0$"):
        MixtureGuide(encoder, 0, 2)
    with pytest.raises(ValueError, match=r"^components: expected a whole number above 0, got 0$"):
        MixtureGuide(encoder, 2, 0)
    with pytest.raises(TypeError, match=r"^components: expected a whole number above 0, got 2\.5$"):
        MixtureGuide(encoder, 2, 2.5)
    with pytest.raises(ValueError, match=r"^weights: unknown 'equa' \(did you mean 'equal'\?\)"):
        MixtureGuide(encoder, 2, 2, weights="equa")
    with pytest.raises(ValueError, match=r"^features: expected a whole number above 0, got 0$"):
        MixtureGuide(encoder, 2, 2, features=0)
