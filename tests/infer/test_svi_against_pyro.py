"""Tests of SVI against pyro.infer.SVI: the same parameters after the same draws."""

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from helpers import PAIRS, Pair, vae_pair
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from torch import Tensor

from ppl_vae.infer import SVI

RATE = 0.01
# Adam divides by the root of the gradient's second moment: where that is small, rounding of 1e-16 grows.
SAME = 1e-10


ESTIMATORS: dict[str, Callable[[], ELBO]] = {
    "Trace": Trace_ELBO,
    "Trace-3": lambda: Trace_ELBO(num_particles=3),
    "Trace-3-vectorized": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Renyi": lambda: RenyiELBO(num_particles=2),
    "Renyi-vectorized": lambda: RenyiELBO(num_particles=2, vectorize_particles=True),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep(num_particles=2),
}
pairs = pytest.mark.parametrize("pair", PAIRS)
ADAM = functools.partial(torch.optim.Adam, lr=RATE)


def pyro_adam() -> Any:
    return pyro.optim.Adam({"lr": RATE})


def train(
    kind: Any, make: Callable[[], Pair], elbo: ELBO, optim: Any, steps: int
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Train a fresh pair in an empty store; return its parameters before and after, and the losses."""
    with pyro.get_param_store().scope():
        torch.manual_seed(0)
        data = torch.bernoulli(torch.full((steps, 6, 4), 0.4).double())
        model, guide, modules = make()
        parameters = [p for module in modules for p in module.parameters()]
        before = [p.detach().clone() for p in parameters]
        svi = kind(model, guide, optim(parameters) if kind is SVI else optim, elbo)
        losses = []
        for x in data:
            loss = svi.step(x)
            losses.append(float(sum(loss) if isinstance(loss, tuple) else loss))
            if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
                svi.optim.step()
    return before, [p.detach() for p in parameters], losses


def check_same(pair: str, elbo: str, steps: int) -> None:
    before, ours, losses = train(SVI, PAIRS[pair], ESTIMATORS[elbo](), lambda _: ADAM, steps)
    start, theirs, expected = train(pyro.infer.SVI, PAIRS[pair], ESTIMATORS[elbo](), pyro_adam(), steps)
    assert all(torch.equal(a, b) for a, b in zip(before, start, strict=True))
    for a, b, c in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
        assert (a - c).abs().max() > RATE
    assert losses == pytest.approx(expected, rel=SAME)


@pytest.mark.parametrize(
    ("pair", "elbo"), [("VAE", "Trace"), ("VAE", "TraceMeanField"), ("VAE", "Renyi"), ("functions", "Trace")]
)
def test_200_steps(pair: str, elbo: str) -> None:
    with pyro.validation_enabled(False):  # for time
        check_same(pair, elbo, 200)


@pairs
@pytest.mark.parametrize("elbo", ESTIMATORS)
def test_a_few_steps_of_every_estimator(pair: str, elbo: str) -> None:
    check_same(pair, elbo, 4)


def clipped() -> Any:
    return pyro.optim.ClippedAdam({"lr": RATE, "clip_norm": 0.1, "lrd": 0.9})


def clipping() -> Any:
    return pyro.optim.Adam({"lr": RATE}, {"clip_norm": 0.1})


def sgd() -> Any:
    return pyro.optim.SGD({"lr": RATE})


def exponential() -> Any:
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": RATE}, "gamma": 0.9})


@pytest.mark.parametrize(
    ("optim", "reference"),
    [
        (lambda _: pyro_adam(), pyro_adam),
        (lambda parameters: torch.optim.Adam(parameters, lr=RATE), pyro_adam),
        (lambda parameters: torch.optim.Adam(parameters, lr=RATE, fused=True), pyro_adam),
        (lambda _: ADAM, pyro_adam),
        (lambda _: lambda parameters: torch.optim.Adam(parameters, lr=RATE), pyro_adam),
        (lambda _: functools.partial(torch.optim.SGD, lr=RATE), sgd),
        (lambda _: clipped(), clipped),
        (lambda _: clipping(), clipping),
        (lambda _: exponential(), exponential),
    ],
    ids=["pyro", "instance", "fused", "partial", "function", "SGD", "ClippedAdam", "clipping", "scheduler"],
)
def test_optimisers(optim: Callable[[list[Tensor]], Any], reference: Callable[[], Any]) -> None:
    before, ours, _ = train(SVI, vae_pair, Trace_ELBO(), optim, 15)
    _, theirs, _ = train(pyro.infer.SVI, vae_pair, Trace_ELBO(), reference(), 15)
    for a, b, c in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)
        assert not torch.equal(a, c)
