"""Tests of the conditional model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Draws
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from ppl_vae import evaluate, fit, load_run
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import IWAE, KL_ELBO, SVI, CompiledSVI, WakeSleep, log_weights, tracing
from ppl_vae.likelihoods import Bernoulli, Normal
from ppl_vae.models.cvae import CVAE
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.priors.conditional_normal import ConditionalNormal

CLASSES, LATENT = 3, 2


class LinearPrior(nn.Module):
    """p(z | y) = N(A y, I)."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.map = nn.Linear(context, LATENT, bias=False)

    def forward(self, context: Tensor) -> dist.TorchDistribution:
        return dist.Normal(self.map(context), 1.0).to_event(1)


@pytest.fixture(autouse=True)
def plain_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    yield
    torch._dynamo.reset()


def bits_pair() -> tuple[CVAE, MeanFieldGuide]:
    """Return a pair for four bits given a label."""
    torch.manual_seed(0)
    model = CVAE(StandardNormal(LATENT), Bernoulli(MLP(LATENT, 4, 5, context=CLASSES)))
    return model, MeanFieldGuide(MLP(4, hidden=5, context=CLASSES), LATENT)


def bits(n: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(n, 4).round(), torch.arange(n) % CLASSES


def test_density_is_prior_times_likelihood_given_y() -> None:
    likelihood = Normal(MLP(LATENT, 3, 4, context=5), scale=0.5)
    model = CVAE(LinearPrior(5), likelihood).double()
    x, y, z = (torch.randn(6, size).double() for size in (3, 5, LATENT))
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x, y)
    trace.compute_log_prob()
    prior = dist.Normal(y @ model.prior.map.weight.T, 1.0).log_prob(z).sum(-1)
    given = dist.Normal(likelihood.decoder(z, y), 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(trace.nodes["z"]["log_prob"], prior)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], given)
    assert torch.equal(trace.nodes["y"]["log_prob"], torch.zeros(6))
    assert trace.nodes["y"]["is_observed"]
    assert torch.equal(trace.nodes["_RETURN"]["value"], x)


def test_weights_under_the_exact_posterior_are_the_exact_conditional_evidence() -> None:
    # z = A y + e, x = W z + B y + c + noise: x given y is normal, and so is z given both.
    torch.manual_seed(0)
    model = CVAE(LinearPrior(5), Normal(MLP(LATENT, 4, (), context=5), scale=0.5)).double()
    layer = model.likelihood.decoder.layers[0]
    w, b = layer.weight[:, :LATENT], layer.weight[:, LATENT:]
    x, y = torch.randn(6, 4).double(), torch.randn(6, 5).double()
    prior_mean = y @ model.prior.map.weight.T
    precision = w.T @ w / 0.25 + torch.eye(LATENT)
    residual = x - y @ b.T - layer.bias
    mean = torch.linalg.solve(precision, (residual @ w / 0.25 + prior_mean).T).T

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))

    evidence = dist.MultivariateNormal(
        prior_mean @ w.T + y @ b.T + layer.bias, w @ w.T + 0.25 * torch.eye(4)
    ).log_prob(x)
    weights = log_weights(model, guide, x, y, num_particles=5)
    torch.testing.assert_close(weights, evidence.expand(5, 6), rtol=1e-10, atol=1e-10)


def test_a_prior_that_leaves_y_out_is_independent_of_it() -> None:
    model, _ = bits_pair()
    x, y = bits()
    noise = torch.randn(2, 6, LATENT)
    with Draws(z=noise):
        trace = poutine.trace(model).get_trace(x, y)
        other = poutine.trace(model).get_trace(x, (y + 1) % CLASSES)
    for t in (trace, other):
        t.compute_log_prob()
    assert torch.equal(trace.nodes["z"]["log_prob"], other.nodes["z"]["log_prob"])
    assert not torch.allclose(trace.nodes["x"]["log_prob"], other.nodes["x"]["log_prob"])


def test_data_are_drawn_for_the_given_labels() -> None:
    torch.manual_seed(0)
    decoder = MLP(LATENT, CLASSES, (), context=CLASSES)
    with torch.no_grad():
        decoder.layers[0].weight[:] = torch.cat([torch.zeros(CLASSES, LATENT), 80 * torch.eye(CLASSES)], 1)
        decoder.layers[0].bias[:] = -40.0
    y = torch.tensor([2, 0, 1, 1])
    model = CVAE(StandardNormal(LATENT), Bernoulli(decoder))
    assert torch.equal(model(None, y), torch.eye(CLASSES)[y])
    assert torch.equal(model(None, y, size=4), torch.eye(CLASSES)[y])
    with pyro.plate("particles", 5, dim=-2):
        assert torch.equal(model(None, y), torch.eye(CLASSES)[y].expand(5, 4, CLASSES))


def test_misfit_arguments_are_refused() -> None:
    model, _ = bits_pair()
    x, y = bits()
    for arguments, options, message in (
        ((x,), {}, "y: expected the labels, or another tensor, that the model is conditioned on, got None"),
        ((None,), {"size": 3}, "y: expected the labels, or another tensor"),
        ((x[:4], y), {}, "x: expected as many data as y has, 6, got 4"),
        ((None, y), {"size": 5}, "size: expected as many data as y has, 6, got 5"),
        ((torch.ones(6, 3), y), {}, "x: expected data of the likelihood's event shape (4,), got (3,)"),
        ((x, y + 1), {}, "context: expected labels in [0, 3), got 3"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            model(*arguments, **options)


@pytest.mark.parametrize("bad", [CLASSES, -1])
def test_a_label_out_of_range_anywhere_in_the_data_is_found_before_any_work(bad: int, tmp_path: Path) -> None:
    model, guide = bits_pair()
    x, y = bits(60)
    y[47] = bad
    before = [p.clone() for p in model.parameters()]
    message = f"datum 47 is outside the support of site 'y', .*: its values reach from {bad} to {bad}"
    with pytest.raises(ValueError, match=f"^data: {message}"):
        fit(model, guide, (x, y), epochs=1, batch_size=10, progress=False, output=tmp_path / "run")
    with pytest.raises(ValueError, match=f"^validation: {message}"):
        fit(model, guide, bits(), validation=(x, y), epochs=1, progress=False)
    with pytest.raises(ValueError, match=f"^data: {message}"):
        evaluate(model, guide, (x, y), num_particles=2, progress=False)
    assert all(map(torch.equal, before, model.parameters()))
    assert not (tmp_path / "run").exists()


def test_data_without_labels_are_refused() -> None:
    model, guide = bits_pair()
    with pytest.raises(ValueError, match="expected labels"):
        fit(model, guide, bits()[0], epochs=1, progress=False)


ELBOS: dict[str, Any] = {"Trace_ELBO": Trace_ELBO, "KL_ELBO": KL_ELBO, "IWAE": lambda: IWAE(3)}
ELBOS["WakeSleep"] = lambda: WakeSleep(3, sleep=0.5)


@pytest.mark.parametrize("name", ELBOS)
def test_compiled_steps_are_plain_steps(name: str) -> None:
    x, y = bits()
    found = []
    for engine in (SVI, CompiledSVI):
        model, guide = bits_pair()
        svi = engine(model, guide, torch.optim.Adam, ELBOS[name]())
        torch.manual_seed(3)
        losses = [svi.step(x, y.roll(i)) for i in range(5)]
        found.append([*losses, *model.parameters(), *guide.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_training_learns_what_the_given_tensor_says_of_the_data() -> None:
    # x is y with each bit flipped with probability 0.05: log p(x | y) is -0.79 at best, log p(x) -2.77.
    torch.manual_seed(0)
    y = torch.rand(2000, 2, 2).round()
    x = ((y.flatten(1) + torch.bernoulli(torch.full((2000, 4), 0.05))) % 2).contiguous()
    torch.manual_seed(0)
    model = CVAE(ConditionalNormal(MLP((2, 2), hidden=16), LATENT), Bernoulli(MLP(LATENT, 4, 16, context=4)))
    guide = MeanFieldGuide(MLP(4, hidden=16, context=4), LATENT)
    fit(model, guide, (x, y), epochs=10, learning_rate=0.01, compile=True, progress=False)
    result = evaluate(model, guide, (x, y), num_particles=20, progress=False)
    assert result.log_likelihood.mean > -1.1
    shuffled = evaluate(model, guide, (x, y.roll(1, 0)), num_particles=20, progress=False)
    assert shuffled.log_likelihood.mean < -3


def test_a_saved_run_is_loaded_and_evaluates_alike(tmp_path: Path) -> None:
    model, guide = bits_pair()
    run = fit(model, guide, bits(), epochs=2, progress=False, output=tmp_path / "run")
    loaded = load_run(tmp_path / "run", classes=[CVAE])
    options: dict[str, Any] = {"num_particles": 3, "progress": False}
    one, two = (evaluate(r.model, r.guide, bits(), **options) for r in (run, loaded))
    assert torch.equal(one.elbo.values, two.elbo.values)
    assert one.log_likelihood.mean == two.log_likelihood.mean
