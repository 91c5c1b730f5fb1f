"""Tests of Hamiltonian Monte Carlo: what it leaves as it is, what it costs, and its step sizes."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from ppl_vae.evaluation._hmc import (
    DualAveraging,
    MultiplicativeAdaptation,
    Traced,
    integrate,
    traced,
    transition,
    value_and_gradient,
)

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[2.0, 0.9], [0.9, 0.7]], dtype=torch.float64)


def gaussian(z: Tensor) -> Tensor:
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(z)


def standard(z: Tensor) -> Tensor:
    return -z.square().sum(-1) / 2


def hmc_transition(
    log_density: Callable[[Tensor], Tensor] | Traced,
    z: Tensor,
    log_p: Tensor,
    grad: Tensor,
    step_size: Tensor,
    leapfrog: int,
) -> list[Tensor]:
    """Return z, log p and gradient after a transition, and the probabilities of acceptance."""
    evaluate: Any = (
        log_density if isinstance(log_density, Traced) else partial(value_and_gradient, log_density)
    )
    point, accept = transition(evaluate, [z, log_p, grad], step_size, leapfrog)
    return [*point, accept]


def step(size: float) -> Tensor:
    return torch.full((1, 1), size, dtype=torch.float64)


def test_transitions_leave_an_exact_gaussian_as_it_is() -> None:
    torch.manual_seed(0)
    chains, n = 5000, 2
    z = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((chains, n))
    log_p, grad = value_and_gradient(gaussian, z)
    start = z
    for _ in range(5):
        z, log_p, grad, accept = hmc_transition(gaussian, z, log_p, grad, step(0.8), 3)
    # a rough step: without rejections the covariance would be that of another Gaussian
    assert 0.5 < float(accept.mean()) < 0.95
    assert float((z != start).all(-1).double().mean()) > 0.8
    count = chains * n
    flat = z.reshape(count, 2) - MEAN
    se = (COVARIANCE.diagonal() / count).sqrt()
    assert bool((flat.mean(0).abs() < 4 * se).all())
    products = flat[:, :, None] * flat[:, None, :]
    assert bool(((products.mean(0) - COVARIANCE).abs() < 4 * products.std(0) / math.sqrt(count)).all())
    torch.testing.assert_close(log_p, gaussian(z))
    torch.testing.assert_close(grad, value_and_gradient(gaussian, z)[1])


def test_transitions_are_in_detailed_balance_on_a_density_that_is_not_gaussian() -> None:
    # of exact draws z0 and z1 after a transition, E f(z0) g(z1) = E g(z0) f(z1)
    def log_density(z: Tensor) -> Tensor:
        return (-((z.square() - 1).square()) + 0.5 * z).sum(-1)

    torch.manual_seed(0)
    chains = 20_000
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    cdf = log_density(grid[:, None]).exp().cumsum(0)
    at = torch.searchsorted(cdf / cdf[-1], torch.rand(chains, dtype=torch.float64)).clamp(max=20_000)
    z0 = grid[at].reshape(chains, 1, 1)
    z1, _, _, accept = hmc_transition(log_density, z0, *value_and_gradient(log_density, z0), step(0.5), 4)
    assert 0.3 < float(accept.mean()) < 0.95
    a, b = z0.flatten(), z1.flatten()
    for f, g in ((torch.sin, torch.exp), (lambda z: z, lambda z: z.square()), (torch.sign, torch.cos)):
        difference = f(a) * g(b) - g(a) * f(b)
        assert float(difference.std()) > 0.1
        assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(chains)
        moved = f(b) - f(a)
        assert abs(float(moved.mean())) < 4 * float(moved.std()) / math.sqrt(chains)


def test_trajectories_go_back_the_way_they_came_and_keep_volume() -> None:
    torch.manual_seed(0)
    z, momentum = torch.randn(2, 5, 3, 2, dtype=torch.float64)

    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(gaussian, z)

    size = step(0.3).unsqueeze(-1)
    there, speed, found = integrate(evaluate, z, momentum, evaluate(z)[1], size, 7)
    assert float((there - z).abs().min()) > 1e-3
    back, speed, _ = integrate(evaluate, there, -speed, found[1], size, 7)
    torch.testing.assert_close(back, z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(-speed, momentum, rtol=1e-10, atol=1e-10)

    def gradient(z: Tensor) -> tuple[Tensor, Tensor]:
        return z, torch.linalg.solve(
            COVARIANCE, MEAN - z
        )  # of the Gaussian, as a function that has a Jacobian

    def flow(state: Tensor) -> Tensor:
        z, momentum = state.split(2, -1)
        z, momentum, _ = integrate(gradient, z, momentum, gradient(z)[1], torch.tensor(0.3).double(), 7)
        return torch.cat([z, momentum], -1)

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(4, dtype=torch.float64))
    torch.testing.assert_close(jacobian.det(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("leapfrog", [1, 4])
def test_a_transition_costs_as_many_gradients_as_leapfrog_steps(leapfrog: int) -> None:
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return standard(z)

    z = torch.randn(3, 2, 4, dtype=torch.float64)
    log_p, grad = value_and_gradient(counted, z)
    calls = 0
    z, log_p, grad, accept = hmc_transition(counted, z, log_p, grad, step(0.1), leapfrog)
    assert calls == leapfrog
    assert z.shape == grad.shape == (3, 2, 4) and log_p.shape == accept.shape == (3, 2)


def test_proposals_without_a_density_are_rejected() -> None:
    # a half-normal, whose draws have mean sqrt(2 / pi) and variance 1 - 2 / pi
    def log_density(z: Tensor) -> Tensor:
        return torch.where(z > 0, -z.square() / 2, torch.nan).sum(-1)

    torch.manual_seed(0)
    chains = 4000
    z = torch.randn(chains, 1, 1, dtype=torch.float64).abs()
    log_p, grad = value_and_gradient(log_density, z)
    rejected = 0.0
    for _ in range(5):
        z, log_p, grad, accept = hmc_transition(log_density, z, log_p, grad, step(0.6), 2)
        rejected += float((accept == 0).double().mean())
    assert rejected > 0.5
    assert bool((z > 0).all()) and bool(log_p.isfinite().all()) and bool(grad.isfinite().all())
    se = math.sqrt((1 - 2 / math.pi) / chains)
    assert abs(float(z.mean()) - math.sqrt(2 / math.pi)) < 4 * se


def test_step_sizes_are_of_their_chains_and_data() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, dtype=torch.float64)
    sizes = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.1, 0.1]], dtype=torch.float64)
    moved = hmc_transition(standard, z, *value_and_gradient(standard, z), sizes, 3)[0]
    assert (moved != z).all(-1).tolist() == (sizes > 0).tolist()


@pytest.mark.parametrize("target", [0.65, 0.8])
@pytest.mark.parametrize("rule", ["multiplicative", "dual averaging"])
def test_step_sizes_of_each_datum_come_to_the_target_acceptance(rule: str, target: float) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None]

    def log_density(z: Tensor) -> Tensor:
        return -(z / scales).square().sum(-1) / 2

    z = scales * torch.randn(8, 3, 10, dtype=torch.float64)
    start = torch.full((1, 3), 0.5, dtype=torch.float64)
    adaptation = (
        MultiplicativeAdaptation(start, target, 1.1)
        if rule == "multiplicative"
        else DualAveraging(start, target)
    )
    log_p, grad = value_and_gradient(log_density, z)
    accepted = []
    for i in range(300):
        size = adaptation.step_size
        if isinstance(adaptation, DualAveraging) and i >= 150:
            size = adaptation.average
        z, log_p, grad, accept = hmc_transition(log_density, z, log_p, grad, size, 3)
        if i < 150 or rule == "multiplicative":
            adaptation.update(accept)
        if i >= 150:
            accepted.append(accept.mean(0))
    means = torch.stack(accepted).mean(0)
    # 150 means over 8 chains, of values in [0, 1] that have a standard deviation below 0.5 and may be
    # correlated over some ten transitions: 0.5 / sqrt(8 * 15); the sizes were found on as many
    assert bool(((means - target).abs() < 4 * math.sqrt(2) * 0.5 / math.sqrt(120)).all()), means
    ratio = (size / scales.T).flatten()
    assert float(ratio.max() / ratio.min()) < 2


# -- graphs ------------------------------------------------------------------------------------------


def folded(z: Tensor) -> Tensor:
    weight = torch.arange(8.0, dtype=torch.float64).reshape(4, 2).exp().log()
    hidden = torch.relu_(z @ weight.softmax(0) + 0.1)
    return -(hidden - weight.sum(0)).square().sum(-1) + standard(z)


def written_in_place(z: Tensor) -> Tensor:
    total = torch.zeros(z.shape[:-1], dtype=z.dtype)
    total += standard(z)
    total[..., 0] += 1.0
    return total


def reads_a_value(z: Tensor) -> Tensor:
    return standard(z) * (2.0 if float(z.detach()[0, 0, 0]) > 0 else 1.0)


@pytest.mark.parametrize("log_density", [standard, folded, written_in_place, reads_a_value])
def test_graphs_give_what_the_function_gives_at_every_point(log_density: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    graph = traced(log_density, torch.randn(3, 2, 4, dtype=torch.float64))
    assert isinstance(graph.graph, GraphModule) == (log_density in (standard, folded))
    for _ in range(3):
        z = torch.randn(3, 2, 4, dtype=torch.float64)
        for found, expected in zip(graph(z), value_and_gradient(log_density, z), strict=True):
            torch.testing.assert_close(found, expected)
            assert not found.requires_grad


def test_graphs_compute_once_what_does_not_depend_on_the_point() -> None:
    graph = traced(folded, torch.randn(3, 2, 4, dtype=torch.float64)).graph
    assert isinstance(graph, GraphModule)
    names = {str(node.target) for node in graph.graph.nodes}
    assert not any("softmax" in name or "exp." in name or "arange" in name for name in names), names


def test_functions_with_draws_of_their_own_are_not_frozen() -> None:
    def noisy(z: Tensor) -> Tensor:
        return standard(z) + torch.rand(())

    state = torch.get_rng_state()
    graph = traced(noisy, torch.zeros(1, 1, 2))
    assert torch.get_rng_state().equal(state)
    assert not isinstance(graph.graph, GraphModule)
    z = torch.zeros(1, 1, 2)
    assert not graph(z)[0].equal(graph(z)[0])


def test_chains_take_the_same_steps_on_a_graph() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, dtype=torch.float64)
    point = value_and_gradient(folded, z)
    results = []
    for log_density in (folded, traced(folded, z)):
        torch.manual_seed(1)
        results.append(hmc_transition(log_density, z, *point, step(0.2), 3))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"traced shape \[3, 2, 4\], got \[4, 2, 4\]"):
        traced(folded, z)(torch.zeros(4, 2, 4))


def test_graphs_take_points_of_any_layout() -> None:
    def log_density(z: Tensor) -> Tensor:
        return standard(z.view(-1, 4)).view(3, 2)

    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    graph = traced(log_density, z.transpose(0, 1))
    assert isinstance(graph.graph, GraphModule)
    for point in (z.transpose(0, 1), z.reshape(3, 2, 4), z[:1, :1].expand(3, 2, 4)):
        torch.testing.assert_close(graph(point)[0], standard(point))
        torch.testing.assert_close(graph(point)[1], -point)


def test_a_density_that_does_not_depend_on_the_point_has_gradient_zero() -> None:
    z = torch.randn(3, 2, 4, dtype=torch.float64)
    for log_density in (lambda z: torch.zeros(3, 2), lambda z: torch.zeros(3, 2, requires_grad=True) + 0):
        assert value_and_gradient(log_density, z)[1].equal(torch.zeros_like(z))


def test_a_function_that_fails_says_so_when_it_runs() -> None:
    def broken(z: Tensor) -> Tensor:
        raise ValueError("no density")

    with pytest.raises(ValueError, match="no density"):
        Traced(broken, torch.zeros(1, 1, 1))(torch.zeros(1, 1, 1))
