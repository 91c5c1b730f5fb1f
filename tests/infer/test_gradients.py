"""Tests of the estimators' mean gradients, against exact ones by quadrature and against other estimators."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import ELBO, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from ppl_vae.infer import (
    CIWAE,
    CUBO,
    IWAE,
    KL_ELBO,
    MIWAE,
    PIWAE,
    STL_ELBO,
    TVO,
    VIMCO,
    DReG,
    Objective,
    Renyi,
    ScoreFunctionELBO,
    WakeSleep,
)
from ppl_vae.models import LinearGaussian

Bound = Callable[[Tensor], Tensor]  # of log weights [K, ...]
BATCHES, SIZE = 40, 500


class LinearGuide(nn.Module):
    """A guide for one latent dimension that is neither the posterior nor far from it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[0.5], [-0.1]]))
        self.shift = nn.Parameter(torch.tensor([0.2]))
        self.log_scale = nn.Parameter(torch.tensor([-0.5]))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            normal = dist.Normal(x @ self.gain + self.shift, self.log_scale.exp())
            return pyro.sample("z", normal.to_event(1))


def pair() -> tuple[LinearGaussian, LinearGuide, Tensor]:
    """Return model, guide and one datum."""
    model = LinearGaussian(1, 2)
    model.weight.data = torch.tensor([[0.9], [-0.6]])
    model.bias.data = torch.tensor([0.1, 0.3])
    model.log_scale.data = torch.tensor(-0.2)
    return model.double(), LinearGuide().double(), torch.tensor([[1.2, 0.4]]).double()


def nodes(k: int, m: int) -> tuple[Tensor, Tensor]:
    """Return Gauss-Hermite nodes ``[k, m ** k]`` and weights for k standard normals."""
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(m))
    weights = weights / weights.sum()
    grid = torch.cartesian_prod(*[points] * k).view(-1, k).mT
    return grid, torch.cartesian_prod(*[weights] * k).view(-1, k).prod(1)


def expectation(
    bound: Bound, k: int, model: LinearGaussian, guide: LinearGuide, x: Tensor, kl_weight: float, m: int
) -> Tensor:
    """Return a bound's expectation over k draws, by quadrature."""
    noise, weights = nodes(k, m)
    q = dist.Normal(x @ guide.gain + guide.shift, guide.log_scale.exp())
    z = q.mean + q.stddev * noise
    mean = z.unsqueeze(-1) @ model.weight.mT + model.bias
    reconstruction = dist.Normal(mean, model.log_scale.exp()).log_prob(x).sum(-1)
    kl = q.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    return (weights * bound(reconstruction - kl_weight * kl)).sum()


def exact(bound: Bound, k: int, kl_weight: float = 1.0, m: int = 60) -> tuple[Tensor, ...]:
    """Return a bound's expectation and its gradients, of the model's and of the guide's parameters."""
    model, guide, x = pair()
    value = expectation(bound, k, model, guide, x, kl_weight, m)
    gradients = torch.autograd.grad(value, [*model.parameters(), *guide.parameters()])
    return value.detach(), flat(gradients[:3]), flat(gradients[3:])


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients]).detach()


def gradients(estimator: ELBO, model: Any, guide: Any, x: Tensor, batches: int = BATCHES) -> Tensor:
    """Return the objective's gradient per datum, one row per batch: the model's, then the guide's."""
    torch.manual_seed(0)
    objective = Objective(model, guide, estimator)
    objective.setup(x)
    assert objective.trainable is not None
    parameters = [p for role in ("model", "guide") for p in objective.trainable[role].values()]
    rows = [flat(torch.autograd.grad(-objective(x) / len(x), parameters)) for _ in range(batches)]
    return torch.stack(rows)


def check_mean(rows: Tensor, expected: Tensor) -> None:
    """Check that the rows' mean is as expected, and that they are precise enough to tell."""
    error = rows.std(0) / math.sqrt(len(rows))
    assert (expected.abs() > 8 * error).float().mean() >= 0.5
    assert ((rows.mean(0) - expected).abs() < 4 * error).all()


def check_same_mean(a: Tensor, b: Tensor) -> None:
    """Check that rows of gradients on the same draws have one mean, and are not the same draw by draw."""
    difference = a - b
    error = difference.std(0) / math.sqrt(len(a))
    assert (error > 0).any()
    assert (a.mean(0).abs() > 8 * error).float().mean() >= 0.5
    assert (difference.mean(0).abs() <= 4 * error + 1e-12).all()


def log_mean_exp(w: Tensor) -> Tensor:
    return w.logsumexp(0) - math.log(len(w))


def renyi(alpha: float) -> Bound:
    return lambda w: log_mean_exp((1 - alpha) * w) / (1 - alpha)


def tvo(w: Tensor) -> Tensor:
    """Return the sum over [0, 0.1], [0.1, 1]."""
    return 0.1 * w.mean(0) + 0.9 * ((0.1 * w).softmax(0) * w).sum(0)


def elbo(w: Tensor) -> Tensor:
    return w.mean(0)


# Against quadrature

CASES: dict[str, tuple[ELBO, Bound, float]] = {
    "KL": (KL_ELBO(2), elbo, 1.0),
    "KL-sampled": (KL_ELBO(2, analytic_kl=False), elbo, 1.0),
    "STL": (STL_ELBO(2), elbo, 1.0),
    "STL-0.5": (STL_ELBO(2, kl_weight=0.5), elbo, 0.5),
    "ScoreFunction": (ScoreFunctionELBO(2), elbo, 1.0),
    "IWAE": (IWAE(2), log_mean_exp, 1.0),
    "IWAE-0.5": (IWAE(2, kl_weight=0.5), log_mean_exp, 0.5),
    "IWAE-1-STL": (IWAE(1, stick_the_landing=True), log_mean_exp, 1.0),
    "VIMCO": (VIMCO(2), log_mean_exp, 1.0),
    "DReG": (DReG(2), log_mean_exp, 1.0),
    "DReG-3": (DReG(3), log_mean_exp, 1.0),
    "DReG-order-0.5": (DReG(2, alpha=0.5), renyi(0.5), 1.0),
    "DReG-order-2": (DReG(2, alpha=2.0), renyi(2.0), 1.0),
    "DReG-0.5": (DReG(2, kl_weight=0.5), log_mean_exp, 0.5),
    "DReG-order-0.5-0.5": (DReG(2, alpha=0.5, kl_weight=0.5), renyi(0.5), 0.5),
    "CIWAE": (CIWAE(2, beta=0.3), lambda w: 0.3 * elbo(w) + 0.7 * log_mean_exp(w), 1.0),
    "MIWAE": (MIWAE(4, num_groups=2), log_mean_exp, 1.0),
    "Renyi": (Renyi(2, alpha=0.3), renyi(0.3), 1.0),
    "Renyi--1": (Renyi(2, alpha=-1.0), renyi(-1.0), 1.0),
    "TVO": (TVO(2, num_partitions=2), tvo, 1.0),
    "TVO-0.5": (TVO(2, num_partitions=2, kl_weight=0.5), tvo, 0.5),
}


@pytest.mark.parametrize(("estimator", "bound", "kl_weight"), CASES.values(), ids=CASES)
def test_mean_gradient_is_that_of_the_expected_bound(estimator: ELBO, bound: Bound, kl_weight: float) -> None:
    model, guide, x = pair()
    draws = 2 if isinstance(estimator, MIWAE) else estimator.num_particles  # draws per group
    _, *expected = exact(bound, draws, kl_weight, 60 if draws < 3 else 30)
    check_mean(gradients(estimator, model, guide, x.expand(SIZE, -1)), torch.cat(expected))


def test_quadrature_is_exact() -> None:
    model, _, x = pair()
    for bound, k, m in ((log_mean_exp, 2, 60), (log_mean_exp, 3, 30), (log_mean_exp, 4, 16), (tvo, 2, 60)):
        coarse, fine = (torch.cat([v.reshape(-1) for v in exact(bound, k, 1.0, size)]) for size in (m, m + 4))
        torch.testing.assert_close(coarse, fine, rtol=0.0, atol=1e-4)
        assert fine[0] < model.log_prob(x)[0]


def test_quadrature_gradient_is_that_of_finite_differences() -> None:
    model, guide, x = pair()
    parameters = [*model.parameters(), *guide.parameters()]
    differences = []
    for entry in (p.data.view(-1)[i : i + 1] for p in parameters for i in range(p.numel())):
        values = []
        for step in (1e-5, -2e-5):
            entry += step
            values.append(expectation(log_mean_exp, 2, model, guide, x, 1.0, 60).detach())
        entry += 1e-5
        differences.append((values[0] - values[1]) / 2e-5)
    expected = torch.cat(exact(log_mean_exp, 2)[1:])
    torch.testing.assert_close(torch.stack(differences), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_piwae_trains_model_and_guide_by_their_own_bounds(kl_weight: float) -> None:
    model, guide, x = pair()
    _, of_model, _ = exact(log_mean_exp, 4, kl_weight, 16)
    _, _, of_guide = exact(log_mean_exp, 2, kl_weight)
    rows = gradients(PIWAE(4, num_groups=2, kl_weight=kl_weight), model, guide, x.expand(SIZE, -1))
    check_mean(rows, torch.cat([of_model, of_guide]))


@pytest.mark.parametrize("order", [2.0, 1.5])
@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_chi_bound_is_lowered_by_the_guide_while_the_model_climbs_the_iwae(
    order: float, kl_weight: float
) -> None:
    model, guide, x = pair()
    _, of_model, _ = exact(log_mean_exp, 2, kl_weight)
    _, _, of_guide = exact(lambda w: -log_mean_exp(order * w) / order, 2, kl_weight)
    rows = gradients(CUBO(2, order=order, kl_weight=kl_weight), model, guide, x.expand(SIZE, -1))
    check_mean(rows, torch.cat([of_model, of_guide]))


def test_sticking_the_landing_biases_the_iwae_but_not_dreg() -> None:
    model, guide, x = pair()
    expected = torch.cat(exact(log_mean_exp, 3, m=30)[1:])
    biased = gradients(IWAE(3, stick_the_landing=True), model, guide, x.expand(SIZE, -1))
    error = biased.std(0) / math.sqrt(len(biased))
    off = (biased.mean(0) - expected).abs() / error
    parameters = sum(p.numel() for p in model.parameters())
    assert (off[:parameters] < 4).all()
    assert (off[parameters:] > 8).all()
    check_mean(gradients(DReG(3), model, guide, x.expand(SIZE, -1)), expected)


# At the exact posterior


class PerDatum(nn.Module):
    """A guide whose every datum has parameters of its own, so that gradients stay apart."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(x / 2)
        self.log_scale = nn.Parameter(torch.full_like(x, -math.log(2) / 2))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


def normal_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(1).to(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def per_datum_gradients(estimator: Any, n: int) -> Tensor:
    torch.manual_seed(0)
    x = math.sqrt(2) * torch.randn(n, 1).double()
    guide = PerDatum(x)
    loss = estimator.differentiable_loss(normal_model, guide, x)
    return torch.cat(torch.autograd.grad(loss, list(guide.parameters())), 1)


@pytest.mark.parametrize(
    "estimator",
    [STL_ELBO(), STL_ELBO(4), DReG(1), DReG(4), DReG(4, alpha=0.5), IWAE(4, stick_the_landing=True)],
    ids=["STL", "STL-4", "DReG-1", "DReG-4", "DReG-4-0.5", "IWAE-4-STL"],
)
def test_gradient_through_the_draws_vanishes_at_the_posterior(estimator: ELBO) -> None:
    assert per_datum_gradients(estimator, 1000).abs().max() < 1e-12


@pytest.mark.parametrize("estimator", [Trace_ELBO(), KL_ELBO(analytic_kl=False), IWAE(1)])
def test_full_gradient_does_not_vanish_at_the_posterior(estimator: ELBO) -> None:
    n = 20_000
    rows = per_datum_gradients(estimator, n)
    # -eps / scale and 1 - eps^2; the variances of their squares are 2 and 14 times the squared variances
    for deviation, excess in zip(rows.std(0), (2, 14), strict=True):
        assert abs(deviation - math.sqrt(2)) < 4 * math.sqrt(2) * math.sqrt(excess / (4 * n))
    assert (rows.mean(0).abs() < 4 * rows.std(0) / math.sqrt(n)).all()


# Guides of several sites, and flows


class TwoSites(PyroModule):
    """z1, then z2 given z1, in the model and in the guide."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role
        self.first = nn.Linear(2, 1) if role == "guide" else None
        self.second = nn.Linear(3 if role == "guide" else 1, 1)
        self.out = nn.Linear(2, 2) if role == "model" else None

    def forward(self, x: Tensor) -> None:
        two_sites(self.role, self.first, self.second, self.out, x)


def two_sites(
    role: str, first: nn.Module | None, second: nn.Module, out: nn.Module | None, x: Tensor
) -> None:
    with pyro.plate("data", len(x), dim=-1):
        loc = x.new_zeros(1) if first is None else first(x)
        z1 = pyro.sample("z1", dist.Normal(loc, 0.8 if role == "guide" else 1.0).to_event(1))
        seen = torch.cat([z1, x.expand(*z1.shape[:-1], 2)], -1) if role == "guide" else z1
        z2 = pyro.sample("z2", dist.Normal(second(seen).tanh(), 0.7).to_event(1))
        if out is not None:
            pyro.sample("x", dist.Normal(out(torch.cat([z1, z2], -1)), 0.6).to_event(1), obs=x)


def two_site_modules() -> tuple[Any, Any]:
    torch.manual_seed(1)
    model, guide = TwoSites("model"), TwoSites("guide")
    return model.double(), guide.double()


def two_site_functions() -> tuple[Any, Any]:
    modules = two_site_modules()

    def program(module: Any, x: Tensor) -> None:
        for name in ("first", "second", "out"):
            if getattr(module, name) is not None:
                pyro.module(name + module.role, getattr(module, name))
        two_sites(module.role, module.first, module.second, module.out, x)

    def model(x: Tensor) -> None:
        program(modules[0], x)

    def guide(x: Tensor) -> None:
        program(modules[1], x)

    return model, guide


class FlowGuide(nn.Module):
    """A guide whose distribution holds a network, which can score no draw without its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)
        self.flow = affine_autoregressive(2, hidden_dims=[5])

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.head(x).chunk(2, -1)
            base = dist.Normal(loc, log_scale.exp()).to_event(1)
            return pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


def flow_pair() -> tuple[Any, Any]:
    torch.manual_seed(2)
    return LinearGaussian(2, 2), FlowGuide()  # Pyro's inverse is in the default dtype


MAKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "PyroModule": two_site_modules,
    "functions": two_site_functions,
    "flow": flow_pair,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
pyro_elbo = functools.partial(Trace_ELBO, vectorize_particles=True, max_plate_nesting=1)


@makers
@pytest.mark.parametrize(
    ("estimator", "reference"),
    [
        (STL_ELBO(3), pyro_elbo(num_particles=3)),
        (DReG(3), IWAE(3)),
        (DReG(3, alpha=0.5), Renyi(3, alpha=0.5)),
    ],
    ids=["STL", "DReG", "DReG-0.5"],
)
def test_dependent_sites_and_flows(make: Callable[[], Any], estimator: ELBO, reference: ELBO) -> None:
    model, guide = make()
    x = torch.tensor([[1.2, 0.4], [-0.5, 1.0]]).repeat(SIZE // 2, 1)
    x = x if make is flow_pair else x.double()
    rows = [gradients(e, model, guide, x) for e in (estimator, reference)]  # on the same draws
    check_same_mean(*rows)


@makers
def test_sticking_the_landing_biases_the_iwae_there_too(make: Callable[[], Any]) -> None:
    model, guide = make()
    x = torch.tensor([[1.2, 0.4], [-0.5, 1.0]]).repeat(SIZE // 2, 1)
    x = x if make is flow_pair else x.double()
    biased, unbiased = (gradients(e, model, guide, x) for e in (IWAE(3, stick_the_landing=True), DReG(3)))
    difference = biased - unbiased
    assert (difference.mean(0).abs() > 8 * difference.std(0) / math.sqrt(BATCHES)).any()


# Under Pyro's SVI


class Capturing(pyro.optim.PyroOptim):
    """Takes steps of length zero and keeps the gradients."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.seen: dict[int, Tensor] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        parameters = list(params)
        self.seen = {id(p): p.grad.clone() for p in parameters if p.grad is not None}
        super().__call__(parameters, *args, **kwargs)


EVERY: list[ELBO] = [
    *(KL_ELBO(2), STL_ELBO(2), IWAE(2), DReG(2), CIWAE(2), MIWAE(2, num_groups=2)),
    *(PIWAE(2, num_groups=2), Renyi(2), CUBO(2), TVO(2), VIMCO(2), ScoreFunctionELBO(2)),
    *(WakeSleep(2), WakeSleep(2, dreg=True), WakeSleep(2, sleep=0.5)),
]


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: type(e).__name__)
def test_pyros_svi_takes_the_same_gradients(estimator: ELBO) -> None:
    model, guide, x = pair()
    x = torch.cat([x, -x, 2 * x])
    objective = Objective(model, guide, estimator)
    objective.setup(x)
    torch.manual_seed(3)
    expected = objective.loss_and_grads(x)
    parameters = [*model.parameters(), *guide.parameters()]
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    assert len(ours) == len(parameters)
    for p in parameters:
        p.grad = None
    optim = Capturing()

    def registered_guide(x: Tensor) -> Any:
        return pyro.module("guide", guide)(x)

    with pyro.get_param_store().scope():
        torch.manual_seed(3)
        loss = pyro.infer.SVI(model, registered_guide, optim, estimator).step(x)
    assert loss == pytest.approx(float(expected), rel=1e-12)
    for p, gradient in zip(parameters, ours, strict=True):
        torch.testing.assert_close(optim.seen[id(p)], gradient, rtol=1e-10, atol=1e-12)
