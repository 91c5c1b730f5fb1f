"""Tests of the estimators for discrete latents, against sums over all states."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppl_vae import fit
from ppl_vae.infer import (
    TVO,
    VIMCO,
    EnumELBO,
    LinearWarmup,
    Objective,
    RelaxedELBO,
    ScoreFunctionELBO,
    WakeSleep,
)
from ppl_vae.infer.estimator import Estimator
from ppl_vae.infer.scoring import score

Bound = Callable[[Tensor], Tensor]  # of log weights [K, ...]
BATCHES, SIZE = 40, 500
X = torch.tensor([[1.0, 0.3]]).double()


class Model(nn.Module):
    """Three classes (``OneHotCategorical``) or three bits (``Bernoulli``), then a normal."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.table = nn.Parameter(torch.tensor([[1.0, -0.5], [-0.3, 0.8], [0.6, 0.4]]))

    def prior(self) -> Any:
        return latent(self.kind, self.logits)

    def likelihood(self, z: Tensor) -> Any:
        return dist.Normal(z @ self.table, 0.8).to_event(1)

    def forward(self, x: Tensor | None = None, *, size: int = 0) -> Tensor:
        with pyro.plate("data", size if x is None else len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.likelihood(z), obs=x)


class Guide(nn.Module):
    """The logits of the latent, linear in the data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head = nn.Linear(2, 3)
        self.head.weight.data = torch.tensor([[0.2, -0.4], [0.5, 0.1], [-0.3, 0.6]])
        self.head.bias.data = torch.tensor([0.1, -0.3, 0.2])

    def posterior(self, x: Tensor) -> Any:
        return latent(self.kind, self.head(x))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", self.posterior(x))


def latent(kind: str, logits: Tensor) -> Any:
    if kind == "classes":
        return dist.OneHotCategorical(logits=logits)
    return dist.Bernoulli(logits=logits).to_event(1)


def pair(kind: str) -> tuple[Model, Guide]:
    return Model(kind).double(), Guide(kind).double()


def states(kind: str) -> Tensor:
    values = torch.eye(3) if kind == "classes" else torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    return values.double()


kinds = pytest.mark.parametrize("kind", ["classes", "bits"])


class MixedModel(nn.Module):
    """A class c and a normal z; either may come first."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.slope = nn.Parameter(torch.tensor([[0.4, -0.6, 0.9]]))
        self.table = nn.Parameter(torch.tensor([[1.0, -0.5], [-0.3, 0.8], [0.6, 0.4]]))
        self.weight = nn.Parameter(torch.tensor([[0.7, -0.9]]))

    def c(self, z: Tensor | None) -> Any:
        return dist.OneHotCategorical(logits=self.logits + (0.0 if z is None else z @ self.slope))

    def z(self, c: Tensor | None) -> Any:
        loc = self.slope.new_zeros(1) if c is None else c @ self.slope.mT
        return dist.Normal(loc, 1.0).to_event(1)

    def likelihood(self, c: Tensor, z: Tensor) -> Any:
        return dist.Normal(c @ self.table + z @ self.weight, 0.8).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.first == "c":
                c = pyro.sample("c", self.c(None))
                z = pyro.sample("z", self.z(c))
            else:
                z = pyro.sample("z", self.z(None))
                c = pyro.sample("c", self.c(z))
            pyro.sample("x", self.likelihood(c, z), obs=x)


class MixedGuide(nn.Module):
    """The same sites in the same order, from linear functions of the data."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first = first
        self.of_c, self.of_z = nn.Linear(2, 3), nn.Linear(2, 1)
        self.slope = nn.Parameter(torch.tensor([[-0.5, 0.3, 0.8]]))
        self.log_scale = nn.Parameter(torch.tensor([-0.3]))

    def c(self, x: Tensor, z: Tensor | None) -> Any:
        return dist.OneHotCategorical(logits=self.of_c(x) + (0.0 if z is None else z @ self.slope))

    def z(self, x: Tensor, c: Tensor | None) -> Any:
        loc = self.of_z(x) + (0.0 if c is None else c @ self.slope.mT)
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            if self.first == "c":
                c = pyro.sample("c", self.c(x, None))
                pyro.sample("z", self.z(x, c))
            else:
                z = pyro.sample("z", self.z(x, None))
                pyro.sample("c", self.c(x, z))


def mixed_pair(first: str) -> tuple[MixedModel, MixedGuide]:
    torch.manual_seed(1)
    return MixedModel(first).double(), MixedGuide(first).double()


# Exact values


def log_weights_of_states(model: Model, guide: Guide) -> tuple[Tensor, Tensor]:
    """Return the log weight and log q of each state."""
    z = states(model.kind)
    log_q = guide.posterior(X).log_prob(z)
    return model.likelihood(z).log_prob(X) + model.prior().log_prob(z) - log_q, log_q


def log_weights_of_mixed_states(model: MixedModel, guide: MixedGuide) -> tuple[Tensor, Tensor]:
    """Return the log weight and the log-probability of each class and each node of a quadrature."""
    points, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(24))
    log_node = (weights / weights.sum()).log().repeat(3)
    noise, c = points.repeat(3).unsqueeze(-1), torch.eye(3).double().repeat_interleave(24, 0)
    q_z = guide.z(X, c if model.first == "c" else None)
    z = q_z.base_dist.loc + q_z.base_dist.scale * noise
    p_z = model.z(c if model.first == "c" else None)
    z_before = z if model.first == "z" else None
    p_c, q_c = model.c(z_before), guide.c(X, z_before)
    joint = model.likelihood(c, z).log_prob(X) + p_z.log_prob(z) + p_c.log_prob(c)
    log_q_c = q_c.log_prob(c)
    return joint - q_z.log_prob(z) - log_q_c, log_q_c + log_node


def expectation(bound: Bound, k: int, log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """Return a bound's expectation over k draws, from the sum over all tuples of states."""
    index = torch.cartesian_prod(*[torch.arange(len(log_weights))] * k).view(-1, k).mT
    return (log_probs[index].sum(0).exp() * bound(log_weights[index])).sum()


def gradient_of(value: Tensor, *modules: nn.Module) -> Tensor:
    """Return the gradient of all parameters, one after another."""
    parameters = [p for module in modules for p in module.parameters()]
    found = torch.autograd.grad(
        value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True
    )
    return torch.cat([g.reshape(-1) for g in found])


def log_mean_exp(w: Tensor) -> Tensor:
    return w.logsumexp(0) - math.log(len(w))


def elbo(w: Tensor) -> Tensor:
    return w.mean(0)


def tvo(w: Tensor) -> Tensor:
    """Return the sum over [0, 0.1], [0.1, 1]."""
    return 0.1 * w.mean(0) + 0.9 * ((0.1 * w).softmax(0) * w).sum(0)


# Estimated ones


def estimates(
    estimator: ELBO, model: nn.Module, guide: nn.Module, batches: int = BATCHES
) -> tuple[Tensor, Tensor]:
    """Return the objective per datum and its gradient, one row per batch."""
    torch.manual_seed(0)
    x = X.expand(SIZE, -1)
    objective = Objective(model, guide, estimator)
    parameters = [*model.parameters(), *guide.parameters()]
    values, rows = [], []
    for _ in range(batches):
        for p in parameters:
            p.grad = None
        values.append(-objective.loss_and_grads(x) / SIZE)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        rows.append(-torch.cat([g.view(-1) for g in found]) / SIZE)
    return torch.stack(values), torch.stack(rows)


def check_mean(rows: Tensor, expected: Tensor) -> None:
    """Check that the rows' mean is as expected, and that they are precise enough to tell."""
    error = rows.std(0) / math.sqrt(len(rows))
    assert (expected.abs() > 8 * error).float().mean() >= 0.5
    assert ((rows.mean(0) - expected).abs() <= 4 * error + 1e-10).all()


CASES: dict[str, tuple[ELBO, Bound, int]] = {
    "ScoreFunction": (ScoreFunctionELBO(2), elbo, 1),
    "ScoreFunction-5": (ScoreFunctionELBO(5), elbo, 1),
    "VIMCO": (VIMCO(2), log_mean_exp, 2),
    "VIMCO-3": (VIMCO(3), log_mean_exp, 3),
    "TVO": (TVO(2, num_partitions=2), tvo, 2),
    "TraceGraph": (TraceGraph_ELBO(), elbo, 1),
}


@kinds
@pytest.mark.parametrize(("estimator", "bound", "k"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_unbiased(kind: str, estimator: ELBO, bound: Bound, k: int) -> None:
    model, guide = pair(kind)
    expected = expectation(bound, k, *log_weights_of_states(model, guide))
    values, rows = estimates(estimator, model, guide)
    check_mean(values.unsqueeze(-1), expected.detach().view(1))
    check_mean(rows, gradient_of(expected, model, guide))


@kinds
@pytest.mark.parametrize("kl_weight", [0.5, 0.0])
def test_weighted_kl_has_an_unbiased_gradient(kind: str, kl_weight: float) -> None:
    model, guide = pair(kind)
    z = states(kind)
    _, log_q = log_weights_of_states(model, guide)
    weights = model.likelihood(z).log_prob(X) - kl_weight * (log_q - model.prior().log_prob(z))
    for estimator, bound in (
        (ScoreFunctionELBO(3, kl_weight=kl_weight), elbo),
        (VIMCO(3, kl_weight=kl_weight), log_mean_exp),
    ):
        expected = gradient_of(expectation(bound, 3, weights, log_q), model, guide)
        prior = len(model.logits)
        rows = estimates(estimator, model, guide)[1]
        assert expected[:prior].abs().max() > 1e-3 or kl_weight == 0
        check_mean(rows[:, prior:], expected[prior:])
        error = rows.std(0) / math.sqrt(len(rows))
        assert ((rows.mean(0) - expected).abs() <= 4 * error + 1e-12)[:prior].all()


@kinds
def test_wake_sleep_raises_the_iwae_and_lowers_the_forward_divergence(kind: str) -> None:
    model, guide = pair(kind)
    weights, log_q = log_weights_of_states(model, guide)
    of_model = gradient_of(expectation(log_mean_exp, 2, weights, log_q), model)
    index = torch.cartesian_prod(torch.arange(len(log_q)), torch.arange(len(log_q))).mT
    shares = log_q[index].sum(0).exp() * weights[index].softmax(0)
    of_guide = gradient_of((shares.detach() * log_q[index]).sum(), guide)
    values, rows = estimates(WakeSleep(2), model, guide)
    check_mean(rows, torch.cat([of_model, of_guide]))
    check_mean(values.unsqueeze(-1), expectation(log_mean_exp, 2, weights, log_q).detach().view(1))


@kinds
@pytest.mark.parametrize("k", [1, 2])
def test_summing_out_is_exact(kind: str, k: int) -> None:
    model, guide = pair(kind)
    expected = expectation(elbo, 1, *log_weights_of_states(model, guide))
    gradient = gradient_of(expected, model, guide)
    values, rows = estimates(EnumELBO(k), model, guide, batches=2)
    torch.testing.assert_close(values, expected.detach().expand(2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(rows, gradient.expand_as(rows), rtol=1e-10, atol=1e-10)


def test_summing_out_is_what_pyro_does_with_marked_programs() -> None:
    model, guide = pair("classes")
    expected = expectation(elbo, 1, *log_weights_of_states(model, guide))
    marked: list[Any] = [config_enumerate(program) for program in (model, guide)]
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(*marked, X)
    torch.testing.assert_close(-loss, expected, rtol=1e-10, atol=1e-10)
    found, gradient = gradient_of(-loss, model, guide), gradient_of(expected, model, guide)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
@pytest.mark.parametrize("values", ["bits", "classes"])
def test_summing_out_takes_events_of_any_shape(shape: tuple[int, ...], values: str) -> None:
    n, dims = 3, math.prod(shape)
    torch.manual_seed(0)
    logits = torch.randn(*shape, *([3] if values == "classes" else [])).double().requires_grad_()
    base = dist.Bernoulli if values == "bits" else dist.Categorical
    slope = torch.randn(shape).double()

    def program(x: Tensor, data: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", base(logits=logits).expand([n, *shape]).to_event(len(shape)))
            if data is not None:
                mean = (slope * z**2).flatten(-len(shape)).sum(-1, keepdim=True)
                pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=data)

    x = torch.randn(n, 1).double()
    loss = EnumELBO().differentiable_loss(lambda x: program(x, x), program, x)
    z = (
        torch.cartesian_prod(*[torch.arange(2 if values == "bits" else 3)] * dims)
        .view(-1, 1, *shape)
        .double()
    )
    log_q = base(logits=logits).log_prob(z).flatten(1).sum(-1, keepdim=True)
    mean = (slope * z**2).flatten(2).sum(-1)
    expected = (log_q.exp() * dist.Normal(mean, 1.0).log_prob(x.view(1, n))).sum()
    torch.testing.assert_close(-loss, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(v, logits)[0] for v in (-loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_summing_out_too_many_values_is_refused() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((60,), 0.5)).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(x.new_full((60,), 0.5)).to_event(1))

    message = f"site 'z': expected at most max_values=10000 combinations of values to enumerate, got {2**60}"
    with pytest.raises(ValueError, match=re.escape(message)):
        EnumELBO().loss(program, guide, X)
    with pytest.raises(ValueError, match="max_values"):
        EnumELBO(max_values=0)


def test_score_function_has_less_noise_than_without_a_baseline() -> None:
    model, guide = pair("bits")
    ours = estimates(ScoreFunctionELBO(4), model, guide)[1]
    theirs = estimates(Trace_ELBO(4, vectorize_particles=True, max_plate_nesting=1), model, guide)[1]
    of_guide = slice(sum(p.numel() for p in model.parameters()), None)
    assert (ours.var(0)[of_guide] < 0.7 * theirs.var(0)[of_guide]).all()


# Mixed with a continuous latent


@pytest.mark.parametrize("first", ["c", "z"])
@pytest.mark.parametrize(
    ("estimator", "bound"),
    [
        (VIMCO(2), log_mean_exp),
        (ScoreFunctionELBO(2), elbo),
        (TVO(2, num_partitions=2), tvo),
        (EnumELBO(), elbo),
    ],
    ids=["VIMCO", "ScoreFunction", "TVO", "Enum"],
)
def test_mixed_latents_have_an_unbiased_gradient(first: str, estimator: ELBO, bound: Bound) -> None:
    model, guide = mixed_pair(first)
    expected = expectation(bound, 1 if bound is elbo else 2, *log_weights_of_mixed_states(model, guide))
    values, rows = estimates(estimator, model, guide)
    check_mean(values.unsqueeze(-1), expected.detach().view(1))
    check_mean(rows, gradient_of(expected, model, guide))


# Relaxation


@kinds
@pytest.mark.parametrize("k", [1, 3])
def test_relaxation_has_an_unbiased_value_and_a_biased_gradient(kind: str, k: int) -> None:
    model, guide = pair(kind)
    expected = expectation(elbo, 1, *log_weights_of_states(model, guide))
    values, rows = estimates(RelaxedELBO(k), model, guide)
    check_mean(values.unsqueeze(-1), expected.detach().view(1))
    exact = gradient_of(expected, model, guide)
    size = sum(p.numel() for p in model.parameters())
    check_mean(rows[:, :size], exact[:size])  # the model sees discrete draws
    error = rows.std(0) / math.sqrt(len(rows))
    assert (rows.mean(0).abs() > 8 * error)[size:].any()
    assert ((rows.mean(0) - exact).abs() > 8 * error)[size:].any()


@kinds
def test_relaxation_draws_discrete_values_with_a_gradient(kind: str) -> None:
    model, guide = pair(kind)
    relaxed = RelaxedELBO(4, temperature=0.3)
    z = score(model, guide, X.expand(6, -1), num_particles=4, drawing=relaxed.drawing()).draws["z"]
    assert z.shape == (4, 6, 3) and ((z == 0) | (z == 1)).all()
    assert gradient_of(z[..., 0].sum(), guide).abs().max() > 0


def test_temperature_can_be_scheduled() -> None:
    model, guide = pair("classes")
    schedule = LinearWarmup(2, start=2.0, end=0.1)
    scheduled = RelaxedELBO(temperature=schedule)
    for step, temperature in enumerate([2.0, 1.05, 0.1, 0.1]):
        gradients = []
        for estimator in (scheduled, RelaxedELBO(temperature=temperature)):
            torch.manual_seed(step)
            loss = estimator.differentiable_loss(model, guide, X.expand(20, -1))
            gradients.append(gradient_of(loss, guide))
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


# One text of model and guide for all


def plain_model(x: Tensor) -> None:
    pyro.module("decoder", DECODER)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.OneHotCategorical(logits=x.new_zeros(3)))
        pyro.sample("x", dist.Bernoulli(logits=DECODER(z)).to_event(1), obs=x)


def plain_guide(x: Tensor) -> None:
    pyro.module("encoder", ENCODER)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.OneHotCategorical(logits=ENCODER(x)))


DECODER, ENCODER = nn.Linear(3, 4), nn.Linear(4, 3)


@pytest.mark.parametrize(
    "estimator",
    [EnumELBO(), ScoreFunctionELBO(2), VIMCO(2), RelaxedELBO(), TraceGraph_ELBO(), TVO(2), WakeSleep(2)],
    ids=lambda e: type(e).__name__,
)
def test_fit_takes_any_of_them_for_the_same_programs(estimator: ELBO) -> None:
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((40, 4), 0.4))
    before = [p.detach().clone() for module in (DECODER, ENCODER) for p in module.parameters()]
    run = fit(plain_model, plain_guide, x, elbo=estimator, epochs=2, batch_size=10, progress=False)
    assert [math.isfinite(record["train_elbo"]) for record in run.history] == [True, True]
    after = [p for module in (DECODER, ENCODER) for p in module.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Per datum


class Given(Messenger):
    """Makes the latent site take given values."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z":
            msg["value"], msg["done"] = self.z, True


PER_DATUM: dict[str, Callable[[int], Estimator]] = {
    "ScoreFunction": ScoreFunctionELBO,
    "VIMCO": VIMCO,
    "TVO": TVO,
    "WakeSleep": WakeSleep,
    "Relaxed": RelaxedELBO,
}


@pytest.mark.parametrize("make", PER_DATUM.values(), ids=PER_DATUM)
@given(
    kind=st.sampled_from(["classes", "bits"]),
    n=st.integers(1, 5),
    k=st.integers(2, 5),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=6)
def test_a_datum_has_its_own_value_and_gradient(
    make: Callable[[int], Estimator], kind: str, n: int, k: int, seed: int
) -> None:
    torch.manual_seed(seed)
    model, guide = pair(kind)
    x, index = torch.randn(n, 2).double(), torch.randint(len(states(kind)), (k, n))
    order = torch.randperm(n)

    def objective(at: Tensor) -> Tensor:
        scores = score(model, guide, x[at], num_particles=k, drawing=Given(states(kind)[index[:, at]]))
        return make(k).objective(scores, 1.0)

    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    together = objective(torch.arange(n))
    assert together.shape == (n,)
    torch.testing.assert_close(objective(order), together[order], **close)
    for i in range(n):
        alone = objective(torch.tensor([i]))
        torch.testing.assert_close(alone, together[i : i + 1], **close)
        torch.testing.assert_close(
            gradient_of(alone.sum(), model, guide), gradient_of(together[i], model, guide), **close
        )


@kinds
@pytest.mark.parametrize("make", [ScoreFunctionELBO, VIMCO])
def test_gradient_is_the_leave_one_out_formula(kind: str, make: Any) -> None:
    model, guide = pair(kind)
    index = torch.tensor([[0, 2], [1, 1], [2, 0]])
    z = states(kind)[index]
    scores = score(model, guide, X.expand(2, -1), num_particles=3, drawing=Given(z))
    found = gradient_of(make(3).objective(scores, 1.0).sum(), guide)
    log_q = guide.posterior(X.expand(2, -1)).log_prob(z)
    weights = model.likelihood(z).log_prob(X) + model.prior().log_prob(z) - log_q
    bound = elbo if make is ScoreFunctionELBO else log_mean_exp
    expected = bound(weights).sum()
    for k in range(3):
        replaced = weights.detach().clone()
        replaced[k] = weights.detach()[[j for j in range(3) if j != k]].mean(0)
        expected = expected + ((bound(weights.detach()) - bound(replaced)) * log_q[k]).sum()
    torch.testing.assert_close(found, gradient_of(expected, guide), rtol=1e-10, atol=1e-12)


@kinds
def test_one_draw_and_one_datum(kind: str) -> None:
    model, guide = pair(kind)
    for estimator in (RelaxedELBO(), EnumELBO(), ScoreFunctionELBO(2), VIMCO(2), TVO(2), WakeSleep(2)):
        loss = estimator.differentiable_loss(model, guide, X)
        assert loss.shape == () and gradient_of(loss, model, guide).isfinite().all()


# Errors


@kinds
@pytest.mark.parametrize("make", [ScoreFunctionELBO, VIMCO, TVO])
def test_one_draw_is_no_baseline(kind: str, make: Callable[[int], Estimator]) -> None:
    model, guide = pair(kind)
    with pytest.raises(ValueError, match=r"num_particles: expected at least 2, since site 'z' .*, got 1"):
        make(1).differentiable_loss(model, guide, X)


def test_sites_that_have_no_relaxation_are_named() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Poisson(x.new_ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Poisson(x.new_ones(2)).to_event(1))

    with pytest.raises(ValueError, match=r"'z': expected OneHotCategorical or Bernoulli .* got Poisson"):
        RelaxedELBO().differentiable_loss(program, guide, X)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_wrong_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=re.escape("temperature")):
        RelaxedELBO(temperature=temperature)
