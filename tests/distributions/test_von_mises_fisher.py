"""The von Mises-Fisher distribution against scipy, quadrature and closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.distributions import HypersphericalUniform, VonMisesFisher, _polar_angle

DIMS = st.one_of(st.integers(2, 50), st.just(100))
CONCENTRATIONS = st.floats(-3.0, 4.0).map(lambda power: 10**power)
PAIRS = pytest.mark.parametrize(
    ("dim", "k"), [(2, 0.3), (2, 40.0), (3, 5.0), (4, 1.0), (5, 200.0), (20, 0.01), (20, 30.0), (100, 1e4)]
)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, dtype=dtype, generator=generator), dim=-1)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def mean_cosine(dim: int, k: float) -> float:
    """Return A_d(k) from scipy."""
    return float(scipy.special.ive(dim / 2, k) / scipy.special.ive(dim / 2 - 1, k))


def log_constant(dim: int, k: float) -> float:
    """Return the log of the density at the mean direction from scipy."""
    bessel = np.log(scipy.special.ive(dim / 2 - 1, k))
    return float((dim / 2 - 1) * math.log(k) - dim / 2 * math.log(2 * math.pi) - bessel)


def grid(dim: int, points: int = 400) -> tuple[Tensor, Tensor]:
    """Return points on a circle or a sphere, and what each weighs in an integral."""
    circle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    if dim == 2:
        return torch.stack([circle.cos(), circle.sin()], -1), torch.full_like(circle, 2 * math.pi / points)
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(points // 2))
    height, turn = (x.flatten() for x in torch.meshgrid(nodes, circle, indexing="ij"))
    radius = (1 - height**2).sqrt()
    points_on_sphere = torch.stack([radius * turn.cos(), radius * turn.sin(), height], -1)
    return points_on_sphere, weights.repeat_interleave(points) * (2 * math.pi / points)


def assert_mean(values: Tensor, expected: Any) -> None:
    """Check means over the first dimension: 4 standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    assert ((values.mean(0) - expected).abs() <= 4 * error + 1e-12).all()


# The density


@settings(deadline=None, max_examples=60)
@given(dim=DIMS, k=CONCENTRATIONS)
@example(dim=2, k=10.0)  # where what is left out of the integral is most
def test_constant_mean_and_kl_are_those_of_bessel_functions(dim: int, k: float) -> None:
    loc = unit(dim)
    vmf = VonMisesFisher(loc, number(k))
    expected = log_constant(dim, k)
    assert float(vmf.log_prob(loc)) == pytest.approx(expected, rel=1e-10, abs=1e-10)
    cosine = mean_cosine(dim, k)
    torch.testing.assert_close(vmf.mean, cosine * loc, rtol=1e-10, atol=1e-13)
    entropy = -(expected + k * (cosine - 1))
    # scipy's mean loses digits: k times 1e-15 or so
    assert float(vmf.entropy()) == pytest.approx(entropy, rel=1e-10, abs=1e-10)
    area = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    kl = kl_divergence(vmf, HypersphericalUniform(dim, dtype=torch.float64))
    assert float(kl) == pytest.approx(area - entropy, rel=1e-9, abs=1e-10)
    assert float(kl) >= -1e-12


@settings(deadline=None, max_examples=30)
@given(dim=st.integers(2, 50), k=CONCENTRATIONS, seed=st.integers(0, 99))
def test_log_prob_is_scipys(dim: int, k: float, seed: int) -> None:
    loc, x = unit(2, dim, seed=seed)
    expected = scipy.stats.vonmises_fisher(loc.numpy(), k).logpdf(x.numpy())
    found = VonMisesFisher(loc, number(k)).log_prob(x)
    assert float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(dim=DIMS, k=CONCENTRATIONS)
def test_derivatives_by_the_concentration_are_those_of_bessel_functions(dim: int, k: float) -> None:
    concentration, loc = number(k).requires_grad_(), unit(dim)
    vmf = VonMisesFisher(loc, concentration)
    cosine = mean_cosine(dim, k)
    (slope,) = torch.autograd.grad(vmf.log_prob(loc), concentration, retain_graph=True)
    assert float(slope) == pytest.approx(1 - cosine, rel=1e-8, abs=1e-13)
    (slope,) = torch.autograd.grad((vmf.mean * loc).sum(), concentration)
    # of terms of order 1 that cancel, which scipy gives to about 1e-14
    assert float(slope) == pytest.approx(
        1 - cosine**2 - (dim - 1) * cosine / k, rel=1e-6, abs=1e-11 * (1 + 1 / k)
    )


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("k", [0.01, 1.0, 30.0, 300.0])
def test_integrates_to_one(dim: int, k: float) -> None:
    points, weights = grid(dim)
    density = VonMisesFisher(unit(dim), number(k)).log_prob(points).exp()
    assert float(density @ weights) == pytest.approx(1, abs=1e-6)


def test_float32_is_float64() -> None:
    loc, k, x = unit(5, 4), number(3.0), unit(5, 4, seed=1)
    single = VonMisesFisher(loc.float(), k.float())
    assert single.log_prob(x.float()).dtype == single.mean.dtype == single.entropy().dtype == torch.float32
    exact = VonMisesFisher(loc, k).log_prob(x).float()
    torch.testing.assert_close(single.log_prob(x.float()), exact, rtol=1e-5, atol=1e-5)


# Draws


def exact_cdf(dim: int, k: float) -> tuple[np.ndarray, np.ndarray]:
    """Return angles and the cumulative distribution there, by the trapezium rule on a fine grid."""
    angles = np.linspace(1e-12, np.pi - 1e-12, 400_001)
    log_density = k * (np.cos(angles) - 1) + (dim - 2) * np.log(np.sin(angles))
    density = np.exp(log_density - log_density.max())
    total = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angles, total / total[-1]


@PAIRS
def test_angles_are_draws_of_their_distribution(dim: int, k: float) -> None:
    torch.manual_seed(0)
    loc = unit(dim)
    x = VonMisesFisher(loc, number(k)).sample((20_000,))
    angle = 2 * ((x - loc).norm(dim=-1) / 2).clamp(max=1).asin()
    found = scipy.stats.kstest(np.interp(angle.numpy(), *exact_cdf(dim, k)), "uniform")
    assert found.pvalue > 1e-3


@PAIRS
def test_table_inverts_the_cumulative_distribution(
    dim: int, k: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    u = torch.linspace(1e-6, 1 - 1e-6, 2001, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: u.expand(shape).clone())
    concentration = number(k).reshape(1)
    angle, _ = _polar_angle.draw(concentration, *_polar_angle.integrate(concentration, dim), dim, len(u))
    found = np.interp(angle[0].numpy(), *exact_cdf(dim, k))
    np.testing.assert_allclose(found, u.numpy(), atol=3e-7)  # most of it the grid's, of steps of 8e-6


@PAIRS
def test_moments_of_draws(dim: int, k: float) -> None:
    torch.manual_seed(1)
    loc = unit(dim)
    vmf = VonMisesFisher(loc, number(k))
    x = vmf.sample((20_000,))
    cosine = mean_cosine(dim, k)
    direction = unit(dim, seed=2)
    across = F.normalize(direction - (direction @ loc) * loc, dim=-1)
    assert_mean(x @ loc, cosine)
    assert_mean(x @ across, 0.0)
    assert_mean((x @ across) ** 2, cosine / k)  # E[sin^2] / (d - 1)
    assert_mean((x - cosine * loc).square().sum(-1), float(vmf.variance.sum()))
    coordinate = int(loc.abs().argmax())
    assert_mean((x[:, coordinate] - cosine * loc[coordinate]) ** 2, float(vmf.variance[coordinate]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1e-3, 1.0, 1e4])
def test_draws_are_unit_vectors_about_every_direction(dtype: torch.dtype, k: float) -> None:
    torch.manual_seed(0)
    for dim in (2, 3, 17):
        axes = torch.eye(dim, dtype=dtype)
        loc = torch.cat([axes, -axes, unit(5, dim, dtype=dtype)])
        vmf = VonMisesFisher(loc, torch.full((), k, dtype=dtype), validate_args=True)
        x = vmf.sample((200,))
        assert x.dtype == dtype
        assert vmf.support.check(x).all()
        assert vmf.log_prob(x).isfinite().all()
        if k == 1e4:  # a squared distance is 2 (1 - cos t), of mean about (dim - 1) / k
            assert (x - loc).square().sum(-1).max() < 20 * dim / k


# Gradients of draws


@PAIRS
def test_slope_of_an_angle_is_that_of_the_inverse(dim: int, k: float) -> None:
    def angles(k: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        concentration = number(k).reshape(1)
        found = _polar_angle.draw(concentration, *_polar_angle.integrate(concentration, dim), dim, 500)
        return found[0], found[1]

    step = 1e-3 * k
    (up, _), (down, _), (_, slope) = angles(k + step), angles(k - step), angles(k)
    # the difference has an error of 1e-6 of the slope's third derivative and of 1e-8 / step of the table
    torch.testing.assert_close(
        (up - down) / (2 * step), slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max())
    )


def test_a_turn_of_loc_turns_the_draws() -> None:
    loc = unit(4)
    tangent = unit(4, seed=1)
    tangent = tangent - (tangent @ loc) * loc

    def draw(loc: Tensor) -> Tensor:
        torch.manual_seed(0)
        return VonMisesFisher(loc, number(2.0), validate_args=False).rsample((6,))

    moved = jacobian(draw, loc) @ tangent
    x = draw(loc)
    expected = (x @ loc).unsqueeze(-1) * tangent - (x @ tangent).unsqueeze(-1) * loc
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close((moved * x).sum(-1), torch.zeros(6).double(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("k", [0.5, 4.0, 50.0])
def test_gradients_of_expectations_are_those_of_quadrature(dim: int, k: float) -> None:
    torch.manual_seed(0)
    direction, n = unit(dim, seed=3), 20_000

    def g(x: Tensor) -> Tensor:
        return (2 * x @ direction).exp() + (x[..., 0] * x[..., 1]).sin()

    raw, concentration = unit(dim).requires_grad_(), number(k).requires_grad_()
    points, weights = grid(dim)
    vmf = VonMisesFisher(F.normalize(raw, dim=-1), concentration)
    expected = torch.autograd.grad((vmf.log_prob(points).exp() * g(points)) @ weights, (raw, concentration))
    raws = raw.detach().expand(n, dim).clone().requires_grad_()
    concentrations = number(k).expand(n).clone().requires_grad_()
    x = VonMisesFisher(F.normalize(raws, dim=-1), concentrations).rsample()
    for found, exact in zip(torch.autograd.grad(g(x).sum(), (raws, concentrations)), expected, strict=True):
        assert_mean(found, exact)


@pytest.mark.parametrize(("dim", "k"), [(4, 2.0), (10, 5.0), (50, 300.0)])
def test_gradient_of_the_mean_direction_in_many_dimensions(dim: int, k: float) -> None:
    torch.manual_seed(0)
    loc, concentration = unit(dim), number(k).expand(20_000).clone().requires_grad_()
    x = VonMisesFisher(loc, concentration).rsample()
    (found,) = torch.autograd.grad((x @ loc).sum(), concentration)
    cosine = mean_cosine(dim, k)
    assert_mean(found, 1 - cosine**2 - (dim - 1) * cosine / k)


# KL


def test_kl_divergences_are_the_means_of_draws() -> None:
    torch.manual_seed(0)
    q = VonMisesFisher(unit(3, 6), torch.tensor([0.5, 5.0, 80.0], dtype=torch.float64))
    x = q.sample((20_000,))
    for p in (HypersphericalUniform(6, dtype=torch.float64), VonMisesFisher(unit(6, seed=5), number(3.0))):
        kl = kl_divergence(q, p)
        assert kl.shape == (3,)
        assert_mean(q.log_prob(x) - p.log_prob(x), kl)
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros(3).double(), atol=1e-12, rtol=0)


def test_kl_between_other_spheres_raises() -> None:
    message = r"^p: expected .* unit vectors of length 3, got length 4$"
    for q in (VonMisesFisher(unit(3), number(1.0)), HypersphericalUniform(3)):
        with pytest.raises(ValueError, match=message):
            kl_divergence(q, HypersphericalUniform(4))
    with pytest.raises(ValueError, match=message):
        kl_divergence(VonMisesFisher(unit(3), number(1.0)), VonMisesFisher(unit(4), number(1.0)))


# Shapes


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=3),
    sample=st.lists(st.integers(1, 3), max_size=2),
    dropped=st.integers(0, 3),
    dim=st.integers(2, 5),
)
def test_shapes_broadcast_and_a_batch_is_its_loop(
    sizes: list[tuple[int, bool, bool]], sample: list[int], dropped: int, dim: int
) -> None:
    loc = unit(*(n if keep else 1 for n, keep, _ in sizes), dim)
    k = torch.rand([n if keep else 1 for n, _, keep in sizes][dropped:], dtype=torch.float64) + 0.5
    vmf = VonMisesFisher(loc, k)
    batch = torch.broadcast_shapes(loc.shape[:-1], k.shape)
    assert vmf.batch_shape == batch == vmf.entropy().shape == vmf.mean.shape[:-1] == vmf.variance.shape[:-1]
    wide = vmf.expand((2, *(n if m == 1 else m for m, (n, _, _) in zip(batch, sizes, strict=True))))
    x = wide.rsample(torch.Size(sample))
    assert x.shape == (*sample, *wide.batch_shape, dim)
    log_prob = wide.log_prob(x)
    assert log_prob.shape == x.shape[:-1]
    locs = loc.expand(*wide.batch_shape, dim).expand(x.shape).reshape(-1, dim)
    ks = k.expand(x.shape[:-1]).reshape(-1)
    for i, point in enumerate(x.reshape(-1, dim)):
        alone = VonMisesFisher(locs[i], ks[i]).log_prob(point)
        torch.testing.assert_close(log_prob.reshape(-1)[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("loc_shape", "k_shape"), [((3,), (3,)), ((3,), (2, 1)), ((2, 1), (3,)), ((3, 1), (3, 1)), ((), (3, 2))]
)
def test_draws_belong_to_their_own_parameters(loc_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
    # a mix-up of particles and data would put draws about another direction, or at another distance
    torch.manual_seed(0)
    k = 10 ** (4 + 2 * torch.rand(k_shape, dtype=torch.float64))
    vmf = VonMisesFisher(unit(*loc_shape, 4), k)
    x = vmf.expand((5, *vmf.batch_shape)).sample((300,))
    # of mean 1 and standard deviation 0.8, 1500 draws each: 0.1 is 4.7 standard errors
    distance = (x - vmf.loc).square().sum(-1).mean((0, 1)) * vmf.concentration / 3
    torch.testing.assert_close(distance, torch.ones_like(distance), rtol=0.1, atol=0)


def test_particles_share_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    draw = _polar_angle.draw

    def spy(k: Tensor, log_integral: Tensor, mean: Tensor, dim: int, draws: int) -> tuple[Tensor, Tensor]:
        calls.append((tuple(k.shape), draws))
        return draw(k, log_integral, mean, dim, draws)

    monkeypatch.setattr(_polar_angle, "draw", spy)
    vmf = VonMisesFisher(unit(3, 4), torch.ones(3, dtype=torch.float64)).expand((7, 3))
    assert vmf.rsample((2,)).shape == (2, 7, 3, 4)
    assert calls == [((3,), 14)]


def test_a_draw_without_gradients_leaves_those_of_the_density() -> None:
    k = torch.ones(3, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        vmf = VonMisesFisher(unit(3, 4), k)
    assert not vmf.log_prob(unit(3, 4)).isnan().any()
    vmf = VonMisesFisher(unit(3, 4), k)
    vmf.sample()
    vmf.log_prob(unit(3, 4)).sum().backward()
    assert (k.grad != 0).all()


def test_traced_once_and_replayed_on_other_values() -> None:
    def run(loc: Tensor, k: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        loc, k = loc.detach().requires_grad_(), k.detach().requires_grad_()
        vmf = VonMisesFisher(loc, k, validate_args=False).expand((4, 3))
        x = vmf.rsample()
        return [x, *torch.autograd.grad(vmf.log_prob(x).sum() + x[..., 0].sum(), (loc, k))]

    graph = make_fx(run)(unit(3, 5), torch.rand(3).double() + 0.5)
    other = unit(3, 5, seed=1), torch.tensor([0.1, 20.0, 400.0], dtype=torch.float64)
    expected = run(*other)
    torch.manual_seed(0)
    for found, value in zip(graph(*other), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


# Wrong arguments


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"^loc: expected unit vectors \[\*batch, d\], got a number$"):
        VonMisesFisher(number(1.0), number(1.0))
    with pytest.raises(ValueError, match=r"^loc.shape\[-1\]: expected a whole number above 1, .* got 1$"):
        VonMisesFisher(torch.ones(1), torch.ones(()))
    with pytest.raises(ValueError, match=r"^concentration: expected .* loc's batch shape \[3\], got \[2\]$"):
        VonMisesFisher(unit(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match="concentration"):
        VonMisesFisher(unit(3), number(0.0), validate_args=True)
    with pytest.raises(ValueError, match="loc"):
        VonMisesFisher(2 * unit(3), number(1.0), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        VonMisesFisher(unit(3), number(1.0), validate_args=True).log_prob(2 * unit(3))
