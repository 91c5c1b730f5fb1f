"""Tests that all flows share: their maps are invertible, their Jacobians are right, nothing is lost."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.distributions.transforms.planar import ConditionedPlanar
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae import flows
from ppl_vae.description import build, describe
from ppl_vae.flows import (
    AffineCoupling,
    BlockNeuralAutoregressive,
    Continuous,
    Householder,
    InverseAutoregressive,
    MaskedAutoregressive,
    NeuralAutoregressive,
    Planar,
    Radial,
    SplineAutoregressive,
    SplineCoupling,
    Sylvester,
)
from ppl_vae.flows.flow import Flow

Make = Callable[[int, int | None, int], Flow]

# so few relus, InverseAutoregressive's default, might all be off
FLOWS: dict[str, Make] = {
    "AffineCoupling": lambda d, c, depth: AffineCoupling(d, c, depth, hidden=(9, 8)),
    "BlockNeuralAutoregressive": lambda d, c, depth: BlockNeuralAutoregressive(d, c, depth, hidden=(4, 3)),
    "Continuous": lambda d, c, depth: Continuous(d, c, hidden=8, steps=20 * depth),
    "Householder": lambda d, c, depth: Householder(d, c, depth),
    "InverseAutoregressive": lambda d, c, depth: InverseAutoregressive(
        d, c, depth, hidden=8, activation="elu"
    ),
    "MaskedAutoregressive": lambda d, c, depth: MaskedAutoregressive(d, c, depth, hidden=(8,)),
    "NeuralAutoregressive": lambda d, c, depth: NeuralAutoregressive(d, c, depth, hidden=8, units=4),
    "Planar": lambda d, c, depth: Planar(d, c, depth),
    "Radial": lambda d, c, depth: Radial(d, c, depth),
    "SplineAutoregressive": lambda d, c, depth: SplineAutoregressive(d, c, depth, hidden=8, bins=4),
    "SplineCoupling": lambda d, c, depth: SplineCoupling(d, c, depth, hidden=8, bins=4, bound=3.0),
    "Sylvester-orthogonal": lambda d, c, depth: Sylvester(d, c, depth, kind="orthogonal"),
    "Sylvester-householder": lambda d, c, depth: Sylvester(d, c, depth, kind="householder", vectors=3),
}
ONE_WAY = {name for name in FLOWS if name.startswith(("Planar", "Radial", "Sylvester"))}
AT_LEAST_2 = {
    "AffineCoupling",
    "SplineCoupling",
    "Householder",
    "Sylvester-orthogonal",
    "Sylvester-householder",
}
AUTOREGRESSIVE = [name for name in FLOWS if name.endswith("Autoregressive")]
INVERTIBLE = [name for name in FLOWS if name not in ONE_WAY]

every = pytest.mark.parametrize("name", FLOWS)
invertible = pytest.mark.parametrize("name", INVERTIBLE)
one_way = pytest.mark.parametrize("name", sorted(ONE_WAY))


def flow_of(name: str, d: int = 3, c: int | None = 4, depth: int = 2, disturbance: float = 0.1) -> Flow:
    """Return a flow in float64 whose parameters are not those it starts from."""
    flow = FLOWS[name](d, c, depth).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(disturbance * torch.randn_like(parameter))
    return flow


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def context_of(c: int | None, *batch: int) -> Tensor | None:
    return normal(*batch, c) if c else None


def density(flow: Flow, context: Tensor | None, n: int) -> dist.TransformedDistribution:
    scale = torch.linspace(0.5, 0.9, flow.latent_dim, dtype=torch.float64).expand(n, -1)
    return dist.TransformedDistribution(dist.Normal(0.3, scale).to_event(1), [flow(context)])


def test_every_public_flow_is_listed() -> None:
    assert {type(make(2, 1, 1)).__name__ for make in FLOWS.values()} == set(flows.__all__)


def test_import_leaves_argument_validation_as_it_was() -> None:
    code = (
        "from torch.distributions import Distribution as D; import ppl_vae; a = D._validate_args; "
        "import ppl_vae.flows; assert D._validate_args is a is True, (a, D._validate_args)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Maps


@settings(max_examples=8)
@every
@given(d=st.integers(1, 4), c=st.sampled_from([None, 0, 1, 3]), depth=st.integers(1, 3))
def test_log_det_is_that_of_the_jacobian(name: str, d: int, c: int | None, depth: int) -> None:
    d = max(d, 2) if name in AT_LEAST_2 else d
    flow, context, x = flow_of(name, d, c, depth), context_of(c), normal(d)
    transform = flow(context)
    log_det = transform.log_abs_det_jacobian(x, transform(x))
    expected = torch.linalg.slogdet(jacobian(lambda x: flow(context)(x), x))[1]
    # The solver of Continuous has an error of order 20^-4 = 6e-6 times a fifth derivative.
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-5 if name == "Continuous" else 1e-9)


@settings(max_examples=8)
@invertible
@given(d=st.integers(1, 4), c=st.sampled_from([None, 3]), depth=st.integers(1, 3))
def test_inverse(name: str, d: int, c: int | None, depth: int) -> None:
    d = max(d, 2) if name in AT_LEAST_2 else d
    flow, context, x = flow_of(name, d, c, depth), context_of(c, 5), 2 * normal(3, 5, d)
    tolerance = 1e-5 if name == "Continuous" else 1e-9
    once = flow(context)
    y = once(x)
    again = flow(context)
    found = again.inv(y.clone())
    torch.testing.assert_close(found, x, rtol=tolerance, atol=tolerance)
    log_det = again.log_abs_det_jacobian(found, y)
    torch.testing.assert_close(log_det, once.log_abs_det_jacobian(x, y), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(flow(context)(found.clone()), y, rtol=tolerance, atol=tolerance)


@invertible
def test_inverse_has_the_gradients_of_the_implicit_function(name: str) -> None:
    flow, context, y = flow_of(name, 2), normal(4), normal(2)
    forward = jacobian(lambda x: flow(context)(x), flow(context).inv(y).detach())
    backward = jacobian(lambda y: flow(context).inv(y), y)
    tolerance = 1e-4 if name == "Continuous" else 1e-9
    torch.testing.assert_close(backward @ forward, torch.eye(2).double(), rtol=0, atol=tolerance)

    def by_context(context: Tensor) -> Tensor:  # x with f(x; c) = y: dx/dc = -(df/dx)^-1 df/dc
        return flow(context).inv(y)

    x = flow(context).inv(y).detach()
    expected = -torch.linalg.solve(forward, jacobian(lambda c: flow(c)(x), context))
    torch.testing.assert_close(jacobian(by_context, context), expected, rtol=0, atol=tolerance)


@invertible
def test_inverse_has_the_second_derivatives_of_the_implicit_function(name: str) -> None:
    # of (x, c) -> (f(x; c), c), whose inverse has second derivatives -J^-1 H(J^-1, J^-1)
    flow = flow_of(name, 2, 2, depth=1, disturbance=0.3)

    def forward(v: Tensor) -> Tensor:
        return torch.cat([flow(v[2:])(v[:2]), v[2:]])

    def inverse(v: Tensor) -> Tensor:
        return torch.cat([flow(v[2:]).inv(v[:2]), v[2:]])

    def second(f: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        result: Tensor = jacobian(lambda v: jacobian(f, v, create_graph=True), v)
        return result

    y = normal(4)
    x = inverse(y).detach()
    back = jacobian(forward, x).inverse()
    expected = -torch.einsum("ka,abc,bi,cj->kij", back, second(forward, x), back, back)
    tolerance = 1e-3 if name == "Continuous" else 1e-9
    torch.testing.assert_close(second(inverse, y), expected, rtol=tolerance, atol=tolerance)
    if name != "Householder":
        assert expected.abs().max() > 1e-3


@one_way
def test_without_an_inverse_other_values_raise(name: str) -> None:
    flow, context = flow_of(name), normal(5, 4)
    posterior = density(flow, context, 5)
    message = (
        rf"^{type(flow).__name__}: expected the last value .* use Trace_ELBO, KL_ELBO, IWAE .*"
        r"\(STL_ELBO, DReG, stick_the_landing and WakeSleep .*such as InverseAutoregressive or "
    )
    with pytest.raises(ValueError, match=message):
        posterior.log_prob(normal(5, 3))
    z = posterior.sample()  # without gradients: they would be lost in silence
    with pytest.raises(ValueError, match="with gradients, where they are wanted"):
        posterior.log_prob(z)
    with torch.no_grad():
        assert posterior.log_prob(z).shape == (5,)


@invertible
def test_draws_without_gradients_are_scored_with_them(name: str) -> None:
    flow, context = flow_of(name), normal(5, 4)
    posterior = density(flow, context, 5)
    z = posterior.sample()
    posterior.log_prob(z).sum().backward()
    found = [p.grad for p in flow.parameters()]
    for parameter in flow.parameters():
        parameter.grad = None
    density(flow, context, 5).log_prob(z.clone()).sum().backward()
    for one, parameter in zip(found, flow.parameters(), strict=True):
        assert one is not None and parameter.grad is not None
        torch.testing.assert_close(one, parameter.grad)


@every
def test_maps_without_gradients_are_run_again_with_them(name: str) -> None:
    flow, context, x = flow_of(name), normal(5, 4), normal(5, 3)
    transform = flow(context)
    with torch.no_grad():
        kept = transform(x)
        assert transform(x) is kept
    y = transform(x)
    assert y.requires_grad and torch.equal(y, kept)
    y.sin().sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


@every
def test_starts_near_the_identity(name: str) -> None:
    flow, x = FLOWS[name](4, 3, 4).double(), normal(200, 4)
    y = flow(normal(200, 3))(x)
    scale = 0.88**4 if name == "InverseAutoregressive" else 1.0
    assert (y - scale * x).square().mean().sqrt() < 0.25


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@settings(max_examples=8)
@given(d=st.integers(1, 5), c=st.sampled_from([None, 2]))
def test_layers_are_autoregressive(name: str, d: int, c: int | None) -> None:
    flow, context, x = flow_of(name, d, c, 2), context_of(c), normal(d)
    for i, part in enumerate(flow.parts(context)):
        found = jacobian(part, x)
        triangle = torch.ones(d, d).tril() if i % 2 == 0 else torch.ones(d, d).triu()
        assert torch.equal(found != 0, triangle.bool())


@pytest.mark.parametrize("name", ["AffineCoupling", "SplineCoupling"])
@settings(max_examples=8)
@given(d=st.integers(2, 5), c=st.sampled_from([None, 2]))
def test_couplings_keep_one_half(name: str, d: int, c: int | None) -> None:
    flow, context, x = flow_of(name, d, c, 2), context_of(c), normal(d)
    for i, part in enumerate(flow.parts(context)):
        found = jacobian(part, x)
        if i % 2:
            found = found.flip(0, 1)
        kept = d - d // 2 if i % 2 else d // 2
        assert torch.equal(found[:kept], torch.eye(d).double()[:kept])
        assert torch.equal(found[kept:, :kept] != 0, torch.ones(d - kept, kept).bool())
        assert torch.equal(found[kept:, kept:] != 0, torch.eye(d - kept).bool())


def test_error_of_the_solver_is_of_fourth_order() -> None:
    x, errors = normal(50, 2), []
    flow = flow_of("Continuous", 2, None, disturbance=0.5)
    assert isinstance(flow, Continuous)
    for steps in (4, 8, 256):
        flow.steps = steps
        transform = flow(None)
        y = transform(x)
        errors.append(torch.cat([y, transform.log_abs_det_jacobian(x, y).unsqueeze(-1)], -1))
    ratio = (errors[0] - errors[2]).norm() / (errors[1] - errors[2]).norm()
    assert 10 < ratio < 25  # 2^4 = 16


def test_planar_layers_are_pyros_but_for_rounding() -> None:
    flow, context, x = flow_of("Planar", disturbance=0.5), normal(5, 4), normal(2, 5, 3)
    for part, layer in zip(flow.parts(context), flow.layers(context).unbind(-2), strict=True):
        pyros = ConditionedPlanar(layer.split((1, 3, 3), -1))
        y, log_det = part.call_and_ladj(x)
        torch.testing.assert_close(y, pyros(x))
        torch.testing.assert_close(log_det, pyros.log_abs_det_jacobian(x, pyros(x)))


def test_steep_planar_layers_keep_their_determinant_in_float32() -> None:
    # w . u = -30: the determinant at 0 is softplus(-30) = e^-30.
    flow = Planar(2, depth=1)
    flow.layers.bias = nn.Parameter(torch.tensor([0.0, -30.0, 0.7, 1.0, 0.0]))
    x = torch.tensor([0.0, 0.5])
    transform = flow(None)
    assert transform.log_abs_det_jacobian(x, transform(x)).item() == pytest.approx(-30)


@pytest.mark.parametrize("rows", [(9.0, -9.0), (30.0, -31.0), (200.0, -190.0), (-60.0, 60.0), (5.0, 5.0)])
def test_sylvester_layers_at_their_ends_keep_their_determinant_in_float32(rows: tuple[float, float]) -> None:
    # The product of the diagonals rounds to -1: log1p of it is -inf where tanh is steepest.
    short = Sylvester(2, depth=1)
    assert short.triangles is not None
    nn.init.zeros_(short.triangles.bias)
    bias = [*([row] * 2 for row in rows), [0.0, 0.0]]
    short.rows.bias = nn.Parameter(torch.tensor(bias).flatten())
    long = copy.deepcopy(short).double()
    x = torch.tensor([[0.0, 0.0], [1e-3, -1e-6], [1e-20, 1.0], [3.0, -9.0], [50.0, 1e4], [-1e30, 1e-30]])
    found = []
    for flow, at in ((short, x), (long, x.double())):
        transform = flow(None)
        log_det = transform.log_abs_det_jacobian(at, transform(at))
        log_det.sum().backward()
        assert log_det.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        found.append(log_det.detach().double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    if (
        sum(rows) < 2
    ):  # at 0: two dimensions of log(1 + tanh(a) tanh(b)) = log(cosh(a + b) / cosh(a) / cosh(b))
        a, b = (abs(row) for row in rows)
        cosh = torch.tensor(sum(rows), dtype=torch.float64).cosh().log()
        assert found[0][0].item() == pytest.approx(2 * (float(cosh) + 2 * math.log(2) - a - b), rel=1e-5)


def test_one_direction_has_no_triangles() -> None:
    flow = Sylvester(3, 4, vectors=1).double()
    context, x = normal(4), normal(3)
    transform = flow(context)
    log_det = transform.log_abs_det_jacobian(x, transform(x))
    expected = torch.linalg.slogdet(jacobian(lambda x: flow(context)(x), x))[1]
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)
    transform(x).sin().sum().backward()
    assert all(p.grad.any() for p in flow.parameters())


@pytest.mark.parametrize("name", ["NeuralAutoregressive", "BlockNeuralAutoregressive"])
def test_neural_maps_hold_far_out(name: str) -> None:
    flow = flow_of(name, 1, None).float()
    x = torch.tensor([[-1e4], [1e4], [300.0], [-50.0]])
    transform = flow(None)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.isfinite().all() and log_det.isfinite().all()
    torch.testing.assert_close(flow(None).inv(y.clone()), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["SplineAutoregressive", "SplineCoupling"])
def test_splines_are_the_identity_outside(name: str) -> None:
    bound = 3.0 if name == "SplineCoupling" else 5.0
    x = torch.tensor([[-50.0, 50.0], [bound, -bound], [bound + 1e-6, 7.0]]).double()
    flow = flow_of(name, 2, None)
    transform = flow(None)
    y = transform(x)
    torch.testing.assert_close(y, x)
    outside = transform.log_abs_det_jacobian(x, y)[[0, 2]]
    torch.testing.assert_close(outside, torch.zeros(2).double())
    torch.testing.assert_close(flow(None).inv(y.clone()), x)


# Densities


@invertible
@pytest.mark.parametrize("c", [None, 3])
def test_density_integrates_to_one(name: str, c: int | None) -> None:
    flow = flow_of(name, 2, c)
    context = context_of(c, 1)
    points = 61 if "Neural" in name else 181  # bisection takes time, and has no kinks
    axis = torch.linspace(-8, 8, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    with torch.no_grad():
        integral = density(flow, context, 1).log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(integral - 1) < 1e-3


@one_way
def test_density_of_draws_integrates_to_one(name: str) -> None:
    # E_q[N(z; 0, I) / q(z)] = 1 for draws of q, if log q is right. Seed 0.
    flow, n = flow_of(name, 2, None), 100_000
    loc = torch.zeros(2, dtype=torch.float64)
    posterior = dist.TransformedDistribution(dist.Normal(loc, 1.5).to_event(1), [flow(None)])
    with torch.no_grad():
        z = posterior.sample((n,))
        weights = (dist.Normal(loc, 1.0).to_event(1).log_prob(z) - posterior.log_prob(z)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / n**0.5
    assert weights.std() < 3


@every
def test_a_draw_is_scored_without_another_pass(name: str) -> None:
    flow, context = flow_of(name, depth=3), normal(5, 4)
    calls: list[int] = []
    for module in flow.children():
        for layer in module if isinstance(module, nn.ModuleList) else [module]:
            layer.register_forward_hook(lambda *_: calls.append(1))
    posterior = density(flow, context, 5)
    z = posterior.rsample((2,))
    drawn = len(calls)
    if isinstance(flow, MaskedAutoregressive):
        assert drawn == 3 * (3 + 1)  # a pass per dimension and one for log |det J|, in each layer
    elif name in {*AUTOREGRESSIVE, "AffineCoupling", "SplineCoupling"}:
        assert drawn == 3
    transform = posterior.transforms[0]
    x = transform.inv(z)
    assert transform(x) is z and transform.inv(z) is x
    assert posterior.log_prob(z).shape == (2, 5)
    assert len(calls) == drawn


# Batches


@every
@pytest.mark.parametrize("c", [None, 4])
def test_particles_and_batch_are_their_loop(name: str, c: int | None) -> None:
    flow, context, x = flow_of(name, c=c), context_of(c, 5), normal(2, 5, 3)
    transform = flow(context)
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    assert y.shape == (2, 5, 3)
    assert log_det.shape == (2, 5)
    for k in range(2):
        for i in range(5):
            alone = flow(None if context is None else context[i])
            one = alone(x[k, i])
            torch.testing.assert_close(one, y[k, i])
            torch.testing.assert_close(alone.log_abs_det_jacobian(x[k, i], one), log_det[k, i])


@every
def test_float32_is_float64_in_short(name: str) -> None:
    flow, context, x = flow_of(name), normal(5, 4), normal(5, 3)
    short = copy.deepcopy(flow).float()
    found = {}
    for dtype, module in ((torch.float32, short), (torch.float64, flow)):
        one, transform = x.to(dtype), module(context.to(dtype))
        y = transform(one)
        assert y.dtype == dtype
        found[dtype] = y, transform.log_abs_det_jacobian(one, y)
        if name not in ONE_WAY:
            back = module(context.to(dtype)).inv(y.clone())
            assert back.dtype == dtype
            torch.testing.assert_close(back.double(), x, rtol=1e-3, atol=1e-3)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@every
def test_traced_once_and_replayed(name: str) -> None:
    flow = flow_of(name)
    if isinstance(flow, Continuous):
        flow.steps = 3

    def run(context: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        posterior = density(flow, context, 5)
        z = posterior.transforms[0](x)
        value = posterior.log_prob(z) + z.square().sum(-1)
        return z, value, *torch.autograd.grad(value.sum(), list(flow.parameters()))

    with pyro.validation_enabled(False):
        graph = make_fx(run)(normal(5, 4), normal(5, 3))
        inputs = normal(5, 4), normal(5, 3)
        for found, expected in zip(graph(*inputs), run(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


# Modules


@every
@pytest.mark.parametrize("c", [None, 4])
@pytest.mark.parametrize("d", [1, 3])
def test_gradients_reach_every_parameter(name: str, c: int | None, d: int) -> None:
    d = max(d, 2) if name in AT_LEAST_2 else d
    flow, context = FLOWS[name](d, c, 2).double(), context_of(c, 5)
    posterior = density(flow, context, 5)
    z = posterior.rsample((3,))
    (posterior.log_prob(z) + z.sin().sum(-1) + z.square().sum(-1)).sum().backward()
    assert [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [n for n, p in flow.named_parameters() if not p.grad.any()] == []


@every
def test_state_dict_round_trip(name: str) -> None:
    one, other = flow_of(name), flow_of(name)
    context, x = normal(5, 4), normal(5, 3)
    assert not torch.equal(one(context)(x), other(context)(x))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(context)(x), other(context)(x))
    assert {id(t) for t in (*one.parameters(), *one.buffers())} == {
        id(t) for t in one.state_dict(keep_vars=True).values()
    }


class Applied(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        result: Tensor = self.flow(context)(x)
        return result


@every
def test_functional_call(name: str) -> None:
    one, other = flow_of(name), flow_of(name)
    context, x = normal(5, 4), normal(5, 3)
    found = torch.func.functional_call(Applied(one), dict(Applied(other).named_parameters()), (context, x))
    torch.testing.assert_close(found, other(context)(x))


@every
def test_nothing_is_kept_over_a_step(name: str) -> None:
    flow, context, x = flow_of(name), normal(5, 4), normal(5, 3)
    before = flow(context)(x)
    copied = copy.deepcopy(flow)
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.01)
    before.sin().sum().backward()
    optimizer.step()
    assert not torch.allclose(flow(context)(x), before)
    torch.testing.assert_close(copied(context)(x), before)


@every
def test_stores_every_argument_and_is_rebuilt_from_its_description(name: str) -> None:
    flow = FLOWS[name](3, 4, 2)
    state = torch.get_rng_state()
    assert repr(flow).startswith(type(flow).__name__)
    assert torch.equal(state, torch.get_rng_state())
    description = describe(flow)
    built: Any = build(description, "flow", [type(flow)])
    assert type(built) is type(flow)
    assert describe(built) == description
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in flow.state_dict().items()
    }


# Arguments


@every
@pytest.mark.parametrize(
    ("d", "c", "error", "argument"),
    [
        (0, 2, ValueError, "latent_dim"),
        (2.5, 2, TypeError, "latent_dim"),
        (2, -1, ValueError, "context_dim"),
        (2, "3", TypeError, "context_dim"),
        (2, False, TypeError, "context_dim"),
    ],
)
def test_wrong_sizes(name: str, d: Any, c: Any, error: type[Exception], argument: str) -> None:
    with pytest.raises(error, match=f"^{argument}: expected a whole number above 0, got "):
        FLOWS[name](d, c, 2)


@pytest.mark.parametrize("name", sorted(AT_LEAST_2))
def test_flows_that_need_two_dimensions(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^latent_dim: expected at least 2 for {name.split('-')[0]}, got 1$"
    ):
        FLOWS[name](1, 2, 2)


@every
def test_wrong_contexts(name: str) -> None:
    with pytest.raises(ValueError, match=r"^context: expected shape \[\*batch, 4\], got \[5, 3\]$"):
        flow_of(name)(normal(5, 3))
    with pytest.raises(ValueError, match=r"^context: expected shape \[\*batch, 4\], got None$"):
        flow_of(name)()
    with pytest.raises(ValueError, match=r"^context: expected None, got \[5, 3\]$"):
        flow_of(name, c=0)(normal(5, 3))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Planar(2, 3, 0), ValueError, "^depth: expected a whole number above 0, got 0$"),
        (lambda: Sylvester(2, kind="qr"), ValueError, "^kind: unknown 'qr'; expected one of 'orthogonal', "),
        (lambda: Sylvester(2, vectors=3), ValueError, "^vectors: expected at most latent_dim = 2, got 3$"),
        (lambda: Sylvester(2, vectors=0), ValueError, "^vectors: expected a whole number above 0, got 0$"),
        (lambda: SplineCoupling(2, bins=1), ValueError, "^bins: expected at least 2, got 1$"),
        (lambda: SplineAutoregressive(2, bound=0.0), ValueError, "^bound: expected a finite number above 0"),
        (lambda: NeuralAutoregressive(2, units=0), ValueError, "^units: expected a whole number above 0"),
        (
            lambda: BlockNeuralAutoregressive(2, hidden=()),
            ValueError,
            "^hidden: expected at least one hidden",
        ),
        (lambda: BlockNeuralAutoregressive(2, hidden=(3, 0)), ValueError, r"^hidden\[1\]: expected a whole"),
        (lambda: AffineCoupling(2, hidden=(3, 0)), ValueError, r"^hidden\[1\]: expected a whole number"),
        (lambda: InverseAutoregressive(2, activation="rely"), ValueError, "^activation: unknown 'rely' "),
        (lambda: Continuous(2, steps=0), ValueError, "^steps: expected a whole number above 0, got 0$"),
        (lambda: Continuous(2, hidden=0), ValueError, "^hidden: expected a whole number above 0, got 0$"),
    ],
)
def test_wrong_options(make: Callable[[], Flow], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
