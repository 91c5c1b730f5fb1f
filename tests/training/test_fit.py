"""Tests of training: what is recorded, what is optimised, what stops it, and what it refuses."""

import functools
import itertools
import math
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import Rows, Stream
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.util import get_rng_state
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ppl_vae import evaluate, fit, load_run
from ppl_vae.data import Split
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import tracing
from ppl_vae.likelihoods import Bernoulli, ContinuousBernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal

QUIET: dict[str, Any] = {"progress": False, "batch_size": 50}
AT_REST: dict[str, Any] = {"optimizer": torch.optim.SGD, "learning_rate": 1e-30}  # no float is moved by it


def linear_pair(seed: int = 0, **network: Any) -> tuple[LinearGaussian, MeanFieldGuide]:
    torch.manual_seed(seed)
    return LinearGaussian(2, 5), MeanFieldGuide(MLP(5, hidden=(16,), **network), 2)


def linear_data(n: int = 200, seed: int = 100) -> Tensor:
    torch.manual_seed(seed)
    return LinearGaussian(2, 5, scale=0.5)(None, size=n).detach()


def image_pair(seed: int = 0) -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(seed)
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 4), (8,))))
    return model, MeanFieldGuide(MLP((1, 4, 4), hidden=(8,)), 2)


def bits(n: int = 100) -> Tensor:
    torch.manual_seed(200)
    return (torch.rand(n, 1, 4, 4) > 0.5).float()


def with_value(x: Tensor, row: int, value: float) -> Tensor:
    """Return the data with one value of one row replaced."""
    x = x.clone()
    x[row].view(-1)[3] = value
    return x


def values(*programs: nn.Module) -> list[Tensor]:
    return [v.detach().clone() for program in programs for v in program.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class DeltaGuide(nn.Module):
    """The guide that draws z = W x, always: the loss has no noise, so a plain torch loop gives its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Delta(self.linear(x), event_dim=1))


def delta_pair(seed: int = 0) -> tuple[LinearGaussian, DeltaGuide]:
    torch.manual_seed(seed)
    return LinearGaussian(2, 5).double(), DeltaGuide().double()


def delta_loss(model: LinearGaussian, guide: DeltaGuide, x: Tensor) -> Tensor:
    """Return minus the mean of log p(x, z) at z = W x, nats per datum."""
    z = guide.linear(x)
    log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_likelihood = dist.Normal(z @ model.weight.mT + model.bias, model.log_scale.exp()).log_prob(x).sum(-1)
    return -(log_prior + log_likelihood).mean()


def by_hand(
    optimizer: Callable[..., torch.optim.Optimizer],
    x: Tensor,
    epochs: int,
    *,
    learning_rate: dict[str, float],
    scheduler: Callable[..., Any] | None = None,
    clip_norm: float | None = None,
) -> tuple[list[Tensor], list[float]]:
    """Train the pair of ``delta_pair`` in plain torch; return its values and the loss before each step."""
    model, guide = delta_pair()
    groups = [
        {"params": list(program.parameters()), "lr": learning_rate[role]}
        for role, program in (("model", model), ("guide", guide))
    ]
    made = optimizer(groups)
    schedule = scheduler(made) if scheduler else None
    losses = []
    for _ in range(epochs):
        made.zero_grad()
        loss = delta_loss(model, guide, x)
        loss.backward()
        if clip_norm is not None:
            squares = sum(p.grad.square().sum() for program in (model, guide) for p in program.parameters())
            for p in itertools.chain(model.parameters(), guide.parameters()):
                p.grad *= min(1.0, clip_norm / (float(squares) ** 0.5 + 1e-6))  # torch's own 1e-6
        made.step()
        losses.append(float(loss.detach()))
        if isinstance(schedule, schedulers.ReduceLROnPlateau):
            schedule.step(float(loss.detach()))
        elif schedule is not None:
            schedule.step()
    return values(model, guide), losses


# float64, sums of 200 terms in another order; Adam's 1e-8 under the root enlarges what rounds at 1e-16
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


# -- the record --------------------------------------------------------------------------------------


def test_each_epoch_has_a_record_of_all_parts() -> None:
    run = fit(*linear_pair(), linear_data(), validation=linear_data(70, seed=1), epochs=3, **QUIET)
    sides = [
        f"{side}_{part}" for side in ("train", "validation") for part in ("elbo", "reconstruction", "kl_z")
    ]
    assert [record["epoch"] for record in run.history] == [1, 2, 3]
    for record in run.history:
        assert set(record) == {"epoch", "train_loss", *sides, "learning_rate", "seconds"}
        assert all(math.isfinite(value) for value in record.values())
        assert record["learning_rate"] == 1e-3 and record["seconds"] >= 0
        for side in ("train", "validation"):  # float32 sums of some 10 nats: 1e-5 is a hundred roundings
            difference = record[f"{side}_reconstruction"] - record[f"{side}_kl_z"]
            assert record[f"{side}_elbo"] == pytest.approx(difference, rel=1e-5)
        assert record["train_loss"] == pytest.approx(-record["train_elbo"], rel=1e-5)
    best = max(run.history, key=lambda record: record["validation_elbo"])
    assert run.best_epoch == best["epoch"]


def test_without_validation_the_record_has_the_training_parts_alone() -> None:
    run = fit(*linear_pair(), linear_data(), epochs=2, **QUIET)
    assert not [name for name in run.history[0] if name.startswith("validation")]
    assert run.best_epoch == 2 and not run.interrupted and run.path is None


def test_records_are_means_in_nats_per_datum() -> None:
    """With the exact posterior as guide each draw's log weight is log p(x): the records are its mean.

    The last batch has 30 data and the others 50, so that a mean of the batches' means differs.
    """
    model, _ = linear_pair()
    model.double()
    x, held_out = linear_data(130).double(), linear_data(70, seed=1).double()

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", model.posterior(x))

    run = fit(model, posterior, x, validation=held_out, epochs=2, **AT_REST, **QUIET)
    with torch.no_grad():
        exact, exact_held_out = (float(model.log_prob(data).mean()) for data in (x, held_out))
    for record in run.history:
        assert record["train_elbo"] == pytest.approx(exact, rel=1e-12)
        assert record["train_loss"] == pytest.approx(-exact, rel=1e-12)
        assert record["validation_elbo"] == pytest.approx(exact_held_out, rel=1e-12)


def test_validation_has_the_same_noise_in_each_epoch() -> None:
    run = fit(*linear_pair(), linear_data(), validation=linear_data(70, seed=1), epochs=2, **AT_REST, **QUIET)
    first, second = run.history
    assert first["validation_elbo"] == second["validation_elbo"]
    assert first["train_elbo"] != second["train_elbo"]


def test_training_raises_the_elbo_towards_the_exact_evidence() -> None:
    x = linear_data(500)
    torch.manual_seed(100)
    truth = LinearGaussian(2, 5, scale=0.5)  # what the data come from
    model, guide = linear_pair()
    run = fit(model, guide, x, epochs=25, learning_rate=1e-2, **QUIET)
    first, last = run.history[0]["train_elbo"], run.history[-1]["train_elbo"]
    best = float(truth.log_prob(x).mean().detach())
    assert last - first > 0.7 * (best - first)
    result = evaluate(model, guide, x, num_particles=100, progress=False)
    exact = float(model.log_prob(x).mean().detach())
    assert result.elbo.mean <= exact + 4 * result.elbo.monte_carlo_error
    assert exact - result.elbo.mean < 1.0


def test_progress_bar_shows_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    fit(*linear_pair(), linear_data(), validation=linear_data(70, seed=1), epochs=2, batch_size=50)
    shown = capsys.readouterr().err
    for part in ("epoch 2/2", "elbo -", "reconstruction -", "kl_z "):
        assert part in shown


def test_tensorboard_gets_each_value(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit(*linear_pair(), linear_data(), epochs=2, output=tmp_path / "run", tensorboard=True, **QUIET)
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    logged = {event.step: event.value for event in log.Scalars("train_elbo")}
    assert logged == {int(r["epoch"]): pytest.approx(r["train_elbo"], rel=1e-6) for r in run.history}


# -- which programs ----------------------------------------------------------------------------------


def two_latents(dimensions: int = 5) -> tuple[Callable, Callable, nn.ModuleDict]:
    """Return a plain Pyro model and guide over z1 and z2, and their networks."""
    torch.manual_seed(0)
    nets = nn.ModuleDict(
        {
            "top": nn.Linear(2, 3),
            "decoder": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, dimensions)),
            "encoder": nn.Sequential(nn.Linear(dimensions, 8), nn.Tanh(), nn.Linear(8, 10)),
        }
    )

    def model(x: Tensor) -> Tensor:
        pyro.module("top", nets["top"])
        pyro.module("decoder", nets["decoder"])
        with pyro.plate("data", x.shape[0], dim=-1):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(nets["top"](z2), 1.0).to_event(1))
            flat = z1.reshape(-1, 3)  # batch norm knows one batch dimension
            mean = nets["decoder"](flat).reshape(*z1.shape[:-1], dimensions)
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", nets["encoder"])
        loc1, scale1, loc2, scale2 = nets["encoder"](x).split([3, 3, 2, 2], -1)
        with pyro.plate("data", x.shape[0], dim=-1):
            pyro.sample("z1", dist.Normal(loc1, scale1.exp()).to_event(1))
            pyro.sample("z2", dist.Normal(loc2, scale2.exp()).to_event(1))

    return model, guide, nets


def test_plain_functions_train_and_evaluate_with_a_kl_for_each_latent_site() -> None:
    model, guide, nets = two_latents()
    before = values(nets)
    x, held_out = linear_data(300), linear_data(60, seed=1)
    store = list(pyro.get_param_store())
    run = fit(model, guide, x, validation=held_out, epochs=15, learning_rate=1e-2, **QUIET)
    first, last = run.history[0], run.history[-1]
    for side in ("train", "validation"):
        kl = last[f"{side}_kl_z1"] + last[f"{side}_kl_z2"]
        assert last[f"{side}_elbo"] == pytest.approx(last[f"{side}_reconstruction"] - kl, rel=1e-5)
    assert last["validation_elbo"] > first["validation_elbo"]
    assert all(not torch.equal(a, b) for a, b in zip(before, values(nets), strict=True))
    result = evaluate(model, guide, x, num_particles=20, progress=False)
    assert list(result.kl) == ["z2", "z1"] and result.elbo.values.shape == (300,)
    assert result.elbo.mean <= result.log_likelihood.mean
    assert list(pyro.get_param_store()) == store


class TutorialVAE(nn.Module):
    """The class of Pyro's VAE tutorial: model and guide are methods."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 16), nn.Sigmoid())

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = x.new_zeros(torch.Size((x.shape[0], 2)))
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(self.decoder(z)).to_event(1), obs=x.reshape(-1, 16))

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x.reshape(-1, 16)).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_methods_of_one_object_train() -> None:
    torch.manual_seed(0)
    vae = TutorialVAE()
    before = values(vae)
    run = fit(vae.model, vae.guide, bits(), epochs=10, learning_rate=1e-2, **QUIET)
    assert run.history[-1]["train_elbo"] > run.history[0]["train_elbo"]
    assert run.history[-1]["train_kl_latent"] > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, values(vae), strict=True))


def labelled_pair(seen: list[int]) -> tuple[Callable, Callable]:
    """Return a pair over (x, y) that checks that each row's label is its own: x[:, 0] is the label."""
    torch.manual_seed(0)
    net = nn.Linear(5, 2)

    def model(x: Tensor, y: Tensor) -> None:
        assert x[:, 0].round().long().tolist() == y.tolist()
        seen.extend(y.tolist())
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1, keepdim=True) + y.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 5), 1.0).to_event(1), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x + y.unsqueeze(-1)), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    "wrap", [Split, lambda x, y: (x, y), TensorDataset], ids=["split", "tuple", "dataset"]
)
@pytest.mark.parametrize("load", [False, True])
def test_programs_of_x_and_y_get_each_datum_with_its_label(wrap: Callable, load: bool) -> None:
    y = torch.arange(120) % 7
    x = linear_data(120)
    x[:, 0] = y
    data = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True) if load else wrap(x, y)
    seen: list[int] = []
    model, guide = labelled_pair(seen)
    run = fit(model, guide, data, validation=(x, y), epochs=2, **QUIET)
    assert len(run.history) == 2 and set(seen) == set(range(7))
    assert evaluate(model, guide, data, num_particles=3, progress=False).num_data == 120


def test_programs_of_x_alone_get_no_labels() -> None:
    x = linear_data(60)
    alone = fit(*linear_pair(), x, epochs=2, **QUIET)
    labelled = fit(*linear_pair(), (x, torch.arange(60)), epochs=2, **QUIET)
    assert equal(values(alone.model, alone.guide), values(labelled.model, labelled.guide))


@pytest.mark.parametrize(
    "wrap",
    [Split, lambda x: (x,), TensorDataset, Rows, lambda x: x.numpy(), lambda x: (x, torch.arange(len(x)))],
    ids=["split", "tuple", "tensor-dataset", "map-style", "numpy", "labelled"],
)
def test_all_forms_of_data_in_memory_train_alike(wrap: Callable) -> None:
    x, held_out = linear_data(120), linear_data(60, seed=1)
    plain = fit(*linear_pair(), x, validation=held_out, epochs=2, **QUIET)
    run = fit(*linear_pair(), wrap(x), validation=wrap(held_out), epochs=2, **QUIET)
    assert equal(values(plain.model, plain.guide), values(run.model, run.guide))
    assert run.history[-1]["validation_elbo"] == plain.history[-1]["validation_elbo"]


@pytest.mark.parametrize(
    "wrap",
    [functools.partial(DataLoader, batch_size=50), functools.partial(Stream, size=50)],
    ids=["loader", "stream"],
)
def test_loaders_train_on_their_own_batches(wrap: Callable) -> None:
    x = linear_data(130)
    sizes: list[int] = []
    model, guide = linear_pair()
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run = fit(model, guide, wrap(x), validation=wrap(linear_data(60, seed=1)), epochs=2, progress=False)
    assert [sizes.count(size) for size in (50, 30)] >= [2 * 2, 2]  # two whole batches and one of 30, twice
    assert {"train_elbo", "validation_elbo"} <= run.history[-1].keys()
    # records are means over data: with the pair at rest they are those of one whole batch
    assert run.history[-1]["train_elbo"] > run.history[0]["train_elbo"] - 1


def test_loader_in_order_equals_the_steps_on_its_batches() -> None:
    """One batch per epoch, no noise: the loader, the tensor and a plain torch loop take the same steps."""
    x = linear_data().double()
    expected, _ = by_hand(torch.optim.SGD, x, 4, learning_rate={"model": 0.01, "guide": 0.01})
    for data in (DataLoader(TensorDataset(x), batch_size=200), x):
        options = {"optimizer": torch.optim.SGD, "learning_rate": 0.01, "batch_size": 200}
        run = fit(*delta_pair(), data, epochs=4, progress=False, **options)
        for got, wanted in zip(values(run.model, run.guide), expected, strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(alpha=0.5, num_particles=3),
        ReweightedWakeSleep(num_particles=3),
        TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
    ],
    ids=lambda elbo: f"{type(elbo).__name__}-{elbo.num_particles}-{elbo.vectorize_particles}",
)
def test_any_elbo_of_pyro_trains_and_records_the_parts(elbo: Any) -> None:
    pair = linear_pair()
    before = values(*pair)
    run = fit(
        *pair,
        linear_data(),
        validation=linear_data(60, seed=1),
        elbo=elbo,
        epochs=5,
        learning_rate=0.01,
        **QUIET,
    )
    first, last = run.history[0], run.history[-1]
    assert last["train_elbo"] == pytest.approx(last["train_reconstruction"] - last["train_kl_z"], rel=1e-5)
    assert last["validation_elbo"] > first["validation_elbo"]
    assert all(not torch.equal(a, b) for a, b in zip(before, values(*pair), strict=True))


def test_a_discrete_latent_site_trains_by_enumeration_in_the_guide() -> None:
    torch.manual_seed(0)
    net, means = nn.Linear(5, 3), nn.Linear(3, 5)

    def model(x: Tensor) -> None:
        pyro.module("means", means)
        with pyro.plate("data", len(x), dim=-1):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(means(k), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("k", dist.OneHotCategorical(logits=net(x)), infer={"enumerate": "parallel"})

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    run = fit(model, guide, linear_data(), elbo=elbo, epochs=10, learning_rate=0.02, **QUIET)
    assert run.history[-1]["train_elbo"] > run.history[0]["train_elbo"]
    assert run.history[-1]["train_kl_k"] >= 0


# -- how it steps ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
}
SCHEDULERS: dict[str, Callable] = {
    "step": functools.partial(schedulers.StepLR, step_size=2, gamma=0.3),
    "cosine": functools.partial(schedulers.CosineAnnealingLR, T_max=6),
    "multistep": functools.partial(schedulers.MultiStepLR, milestones=[1, 4]),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.8**epoch),
    "one-cycle": functools.partial(schedulers.OneCycleLR, max_lr=0.02, total_steps=8),
    "sequential": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.7)],
        milestones=[2],
    ),
    "plateau": functools.partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.2, factor=0.5),
}


def check_steps(optimizer: Callable, rates: dict[str, float], **options: Any) -> None:
    """Compare six full-batch epochs of ``fit`` with the same in plain torch."""
    x = linear_data().double()
    expected, losses = by_hand(optimizer, x, 6, learning_rate=rates, **options)
    learning_rate = rates["model"] if rates["model"] == rates["guide"] else rates
    run = fit(
        *delta_pair(),
        x,
        optimizer=optimizer,
        learning_rate=learning_rate,
        epochs=6,
        batch_size=200,
        progress=False,
        **options,
    )
    for got, wanted in zip(values(run.model, run.guide), expected, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)
    assert [-record["train_elbo"] for record in run.history] == pytest.approx(losses, rel=1e-9)


def test_adam_is_the_default() -> None:
    x = linear_data().double()
    expected, _ = by_hand(torch.optim.Adam, x, 4, learning_rate={"model": 1e-3, "guide": 1e-3})
    run = fit(*delta_pair(), x, epochs=4, batch_size=200, progress=False)
    for got, wanted in zip(values(run.model, run.guide), expected, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimisers_step_as_in_plain_torch(name: str) -> None:
    check_steps(OPTIMIZERS[name], {"model": 0.01, "guide": 0.01})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_stepped_once_per_epoch(name: str) -> None:
    check_steps(torch.optim.SGD, {"model": 0.02, "guide": 0.02}, scheduler=SCHEDULERS[name])


def test_plateau_scheduler_watches_the_validation_elbo() -> None:
    x = linear_data().double()
    scheduler = functools.partial(schedulers.ReduceLROnPlateau, patience=0, factor=0.5)
    run = fit(*drifting_pair(), x + 5, validation=x, scheduler=scheduler, epochs=4, **DRIFTING)
    assert [record["learning_rate"] for record in run.history] == [0.01, 0.01, 0.005, 0.0025]
    alone = fit(*drifting_pair(), x + 5, scheduler=scheduler, epochs=4, **DRIFTING)
    assert [record["learning_rate"] for record in alone.history] == [0.01] * 4


def test_records_have_the_learning_rate_of_their_epoch() -> None:
    scheduler = functools.partial(schedulers.StepLR, step_size=1, gamma=0.5)
    run = fit(*linear_pair(), linear_data(), learning_rate=0.08, scheduler=scheduler, epochs=3, **QUIET)
    assert [record["learning_rate"] for record in run.history] == [0.08, 0.04, 0.02]


@pytest.mark.parametrize("role", ["model", "guide"])
def test_learning_rates_of_model_and_guide_are_separate(role: str) -> None:
    other = {"model": "guide", "guide": "model"}[role]
    rates = {role: 0.02, other: 0.001}
    check_steps(torch.optim.SGD, rates)
    pair = dict(zip(("model", "guide"), linear_pair(), strict=True))
    before = {key: values(program) for key, program in pair.items()}
    still = {role: 0.1, other: 1e-30}
    run = fit(pair["model"], pair["guide"], linear_data(), learning_rate=still, epochs=1, **QUIET)
    moved = {
        key: max(float((a - b).abs().max()) for a, b in zip(before[key], values(pair[key]), strict=True))
        for key in pair
    }
    assert moved[other] < 1e-28 and moved[role] > 0.01
    record = run.history[0]
    assert (record["learning_rate_0"], record["learning_rate_1"]) == (still["model"], still["guide"])


def test_clip_norm_bounds_the_norm_of_all_gradients_together() -> None:
    check_steps(torch.optim.SGD, {"model": 0.02, "guide": 0.02}, clip_norm=0.5)


def test_clip_norm_bounds_the_step() -> None:
    """One SGD step at learning rate 1 moves all parameters together by the clipped norm."""
    pair = delta_pair()
    before = torch.cat([v.flatten() for v in values(*pair)])
    options = {"optimizer": torch.optim.SGD, "learning_rate": 1.0, "clip_norm": 0.125, "batch_size": 200}
    fit(*pair, linear_data().double() + 10, epochs=1, progress=False, **options)
    after = torch.cat([v.flatten() for v in values(*pair)])
    assert float((after - before).norm()) == pytest.approx(0.125, rel=1e-4)


def test_the_step_does_not_grow_with_the_batch() -> None:
    x = linear_data(100).double()
    options: dict[str, Any] = {
        "optimizer": torch.optim.SGD,
        "learning_rate": 0.01,
        "epochs": 3,
        "progress": False,
    }
    once = fit(*delta_pair(), x, batch_size=100, **options)
    twice = fit(*delta_pair(), torch.cat([x, x]), batch_size=200, **options)
    for a, b in zip(values(once.model, once.guide), values(twice.model, twice.guide), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_parameter_without_gradient_is_named() -> None:
    model, guide = linear_pair()
    guide.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"no gradient reaches guide\.unused\.weight, guide\.unused\.bias"):
        fit(model, guide, linear_data(), epochs=1, **QUIET)


def test_frozen_parameters_stay() -> None:
    model, guide = linear_pair()
    model.log_scale.requires_grad_(False)
    fit(model, guide, linear_data(), epochs=2, **QUIET)
    assert float(model.log_scale) == 0.0


# -- when it stops -----------------------------------------------------------------------------------


DRIFTING: dict[str, Any] = {
    "optimizer": torch.optim.SGD,
    "learning_rate": 0.01,
    "batch_size": 200,
    "progress": False,
}


def drifting_pair() -> tuple[LinearGaussian, DeltaGuide]:
    """Return a pair of which the bias alone is trained: to data with the mean 5 it leaves those with 0."""
    model, guide = delta_pair()
    for parameter in (model.weight, model.log_scale, *guide.parameters()):
        parameter.requires_grad_(False)
    nn.init.zeros_(guide.linear.weight)
    nn.init.zeros_(guide.linear.bias)
    return model, guide


def test_patience_stops_and_the_best_parameters_come_back() -> None:
    x = linear_data().double()
    one = fit(*drifting_pair(), x + 5, epochs=1, **DRIFTING)
    run = fit(*drifting_pair(), x + 5, validation=x, patience=3, epochs=50, **DRIFTING)
    elbos = [record["validation_elbo"] for record in run.history]
    assert elbos == sorted(elbos, reverse=True)
    assert len(run.history) == 1 + 3 and run.best_epoch == 1
    assert equal(values(run.model, run.guide), values(one.model, one.guide))


def test_the_best_parameters_come_back_without_patience() -> None:
    x = linear_data().double()
    one = fit(*drifting_pair(), x + 5, epochs=1, **DRIFTING)
    run = fit(*drifting_pair(), x + 5, validation=x, epochs=4, **DRIFTING)
    assert len(run.history) == 4 and run.best_epoch == 1
    assert equal(values(run.model, run.guide), values(one.model, one.guide))


def test_patience_waits_while_the_validation_elbo_rises() -> None:
    x = linear_data().double()
    run = fit(*drifting_pair(), x + 5, validation=x + 5, patience=1, epochs=8, **DRIFTING)
    assert len(run.history) == 8 and run.best_epoch == 8


def test_callbacks_see_each_epoch_and_one_that_returns_true_stops() -> None:
    calls: list[tuple[str, int]] = []

    def look(run: Any) -> str:
        calls.append(("look", len(run.history)))
        return "a true value that is not True"

    def stop(run: Any) -> bool:
        calls.append(("stop", len(run.history)))
        return len(run.history) == 3

    run = fit(*linear_pair(), linear_data(), epochs=9, callbacks=[stop, look], **QUIET)
    assert calls == [(name, epoch) for epoch in (1, 2, 3) for name in ("stop", "look")]
    assert len(run.history) == 3 and not run.interrupted


class Interrupting(Dataset):
    """A dataset whose rows raise Ctrl-C from the k-th read on."""

    def __init__(self, x: Tensor, after: int) -> None:
        self.x, self.left = x, after

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.x[index]


def test_ctrl_c_in_an_epoch_gives_the_run_as_of_the_epoch_before(tmp_path: Path) -> None:
    x = linear_data(100)
    whole = DataLoader(Interrupting(x, 10**9), batch_size=20)
    expected = fit(*linear_pair(), whole, epochs=2, progress=False)
    # the checks before training read up to two first batches; epochs 1 and 2 read 100 rows each
    loader = DataLoader(Interrupting(x, 300), batch_size=20)
    with pytest.warns(UserWarning, match=r"^interrupted: 2 of 9 epochs finished; saved in .*resume=True$"):
        run = fit(*linear_pair(), loader, epochs=9, output=tmp_path / "run", progress=False)
    assert run.interrupted and [record["epoch"] for record in run.history] == [1, 2]
    assert equal(values(run.model, run.guide), values(expected.model, expected.guide))
    saved = load_run(tmp_path / "run")
    assert equal(values(saved.model, saved.guide), values(run.model, run.guide))
    assert saved.history == run.history


def test_ctrl_c_in_a_callback_keeps_the_finished_epoch(tmp_path: Path) -> None:
    def interrupt(run: Any) -> None:
        if len(run.history) == 2:
            raise KeyboardInterrupt

    expected = fit(*linear_pair(), linear_data(), epochs=2, **QUIET)
    with pytest.warns(UserWarning, match="interrupted: 2 of 9 epochs finished"):
        run = fit(
            *linear_pair(), linear_data(), epochs=9, callbacks=[interrupt], output=tmp_path / "r", **QUIET
        )
    assert run.interrupted and len(run.history) == 2
    assert equal(values(run.model, run.guide), values(expected.model, expected.guide))
    assert len(load_run(tmp_path / "r").history) == 2


@pytest.mark.parametrize("write", range(1, 8))
def test_ctrl_c_while_saving_keeps_memory_and_folder_alike(
    tmp_path: Path, write: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes with each of the writes: settings, then model, history and checkpoint of two epochs."""
    count = 0
    replace = os.replace

    def interrupted(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise KeyboardInterrupt
        replace(*args)

    monkeypatch.setattr(os, "replace", interrupted)
    if write == 1:  # before any work: as for any program
        with pytest.raises(KeyboardInterrupt):
            fit(*linear_pair(), linear_data(), epochs=2, output=tmp_path / "run", **QUIET)
        return
    done = 1 if write <= 4 else 2
    with pytest.warns(UserWarning, match=f"interrupted: {done} of 2 epochs finished"):
        run = fit(*linear_pair(), linear_data(), epochs=2, output=tmp_path / "run", **QUIET)
    saved = load_run(tmp_path / "run")
    assert saved.history == run.history and len(run.history) == done
    assert equal(values(saved.model, saved.guide), values(run.model, run.guide))
    monkeypatch.undo()
    again = fit(*linear_pair(), linear_data(), epochs=done, output=tmp_path / "run", resume=True, **QUIET)
    assert again.history == run.history


def test_ctrl_c_in_the_first_epoch_gives_the_start() -> None:
    model, guide = linear_pair()
    before = values(model, guide)
    loader = DataLoader(Interrupting(linear_data(100), 90), batch_size=10)
    with pytest.warns(UserWarning, match="interrupted: 0 of 2 epochs finished$"):
        run = fit(model, guide, loader, epochs=2, progress=False)
    assert run.interrupted and run.history == [] and equal(before, values(model, guide))


# -- a loss that is no number ------------------------------------------------------------------------

BURST = 1e30  # a learning rate that no network survives


def burst_in(epoch: int, gamma: float = BURST) -> Callable[..., Any]:
    """Return a scheduler under which the learning rate bursts in one epoch."""
    return lambda optimizer: schedulers.LambdaLR(optimizer, lambda e: gamma if e == epoch - 1 else 1.0)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("batch_size", [10, 1])
def test_a_loss_that_turns_nan_names_epoch_step_and_site(tmp_path: Path, batch_size: int) -> None:
    """The burst makes the first step of epoch 3 throw the parameters away: its second loss is no number.

    At batch size 1 there are more steps than the losses wait to be looked at.
    """
    kept: list[list[Tensor]] = []
    pair = linear_pair()
    with pytest.raises(FloatingPointError) as caught:
        fit(
            *pair,
            linear_data(120),
            optimizer=torch.optim.SGD,
            learning_rate=1e-3,
            scheduler=burst_in(3),
            epochs=5,
            batch_size=batch_size,
            output=tmp_path / "run",
            callbacks=[lambda run: kept.append(values(run.model, run.guide))],
            progress=False,
        )
    message = str(caught.value)
    assert re.search(
        r"^the loss became (nan|-?inf) in epoch 3, step 2, at site '[xz]' of the (model|guide)", message
    )
    assert "those of epoch 2" in message and "\n" not in message
    assert len(kept) == 2 and equal(values(*pair), kept[-1])
    run = load_run(tmp_path / "run")
    assert equal(values(run.model, run.guide), kept[-1]) and len(run.history) == 2
    again = fit(
        *linear_pair(),
        linear_data(120),
        **same_as_saved(batch_size),
        epochs=2,
        resume=True,
        output=tmp_path / "run",
    )
    assert equal(values(again.model, again.guide), kept[-1])


def same_as_saved(batch_size: int) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD,
        "learning_rate": 1e-3,
        "scheduler": burst_in(3),
        "batch_size": batch_size,
        "progress": False,
    }


class Fragile(nn.Module):
    """A model or guide with the scale sqrt(a), from 2, which both would have smaller: NaN for a below 0."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self.site = site
        self.a = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> None:
        scale = self.a.sqrt()
        with pyro.plate("data", len(x), dim=-1):
            if self.site == "z":
                pyro.sample("z", dist.Normal(torch.zeros(1), scale).to_event(1))
            else:
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.zeros(5), scale).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize(("site", "role"), [("x", "model"), ("z", "guide")])
def test_the_site_that_is_no_number_is_the_one_named(site: str, role: str) -> None:
    rates = {"model": 1e-9, "guide": 1e-9} | {role: 1e6}
    with pytest.raises(FloatingPointError, match=f"in epoch 1, step 2, at site '{site}' of the {role}"):
        fit(
            Fragile("x"),
            Fragile("z"),
            torch.zeros(40, 5),
            optimizer=torch.optim.SGD,
            learning_rate=rates,
            epochs=1,
            batch_size=10,
            progress=False,
        )


def test_parameters_that_end_an_epoch_as_no_numbers_are_not_kept(tmp_path: Path) -> None:
    """One step per epoch: the loss of the burst's epoch is still a number, what it leaves is not."""
    pair = linear_pair()
    kept: list[list[Tensor]] = []
    with pytest.raises(
        FloatingPointError, match=r"the parameter model\.\w+ became .* in epoch 3, by step 1; .*epoch 2"
    ):
        fit(
            *pair,
            linear_data(40),
            validation=linear_data(20, seed=1),
            optimizer=torch.optim.SGD,
            learning_rate=1e-3,
            scheduler=burst_in(3, 1e41),
            epochs=5,
            batch_size=40,
            output=tmp_path / "run",
            callbacks=[lambda run: kept.append(values(run.model, run.guide))],
            progress=False,
        )
    assert equal(values(*pair), kept[-1])
    run = load_run(tmp_path / "run")
    assert len(run.history) == 2 and all(v.isfinite().all() for v in values(run.model, run.guide))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_nan_before_any_epoch_is_saved_leaves_no_folder(tmp_path: Path) -> None:
    pair = linear_pair()
    before = values(*pair)
    options = {"optimizer": torch.optim.SGD, "learning_rate": 1e30, "batch_size": 10, "progress": False}
    with pytest.raises(FloatingPointError, match="epoch 1, step 2"):
        fit(*pair, linear_data(40), epochs=2, output=tmp_path / "run", **options)
    assert equal(values(*pair), before) and not (tmp_path / "run").exists()


def test_validation_data_of_no_density_still_leave_a_saved_run(tmp_path: Path) -> None:
    """A validation ELBO of -inf in every epoch: none is better than the first, which is kept."""
    held_out = with_value(linear_data(20, seed=1), 0, 1e30)  # its square is beyond float32
    run = fit(*linear_pair(), linear_data(), validation=held_out, epochs=3, output=tmp_path / "run", **QUIET)
    assert run.history[-1]["validation_elbo"] == -math.inf and run.best_epoch == 1
    one = fit(*linear_pair(), linear_data(), epochs=1, **QUIET)
    saved = load_run(tmp_path / "run")
    assert saved.best_epoch == 1 and saved.history == run.history
    assert equal(values(saved.model, saved.guide), values(one.model, one.guide))


# -- what it leaves alone ----------------------------------------------------------------------------


def random_states() -> tuple:
    states = get_rng_state()
    name, keys, *rest = states["numpy"]
    return states["torch"].tolist(), states["random"], (name, keys.tolist(), *rest)


def test_the_callers_random_streams_are_as_before() -> None:
    pair = linear_pair()
    x = linear_data()
    random.random()
    before = random_states()
    fit(*pair, x, validation=x, epochs=2, **QUIET)
    assert random_states() == before
    fit(*pair, DataLoader(TensorDataset(x), batch_size=50, shuffle=True), epochs=2, progress=False)
    assert random_states() == before
    evaluate(*pair, x, num_particles=3, progress=False)
    assert random_states() == before
    with pytest.raises(ValueError, match="learning_rate"):
        fit(*pair, x, learning_rate=-1)
    assert random_states() == before


def test_one_seed_gives_one_result_whatever_was_drawn_before() -> None:
    runs = []
    for drawn_before, seed in enumerate((3, 3, 4)):
        pair = linear_pair()
        torch.manual_seed(drawn_before)
        runs.append(fit(*pair, Split(linear_data().sigmoid(), dynamic=True), epochs=2, seed=seed, **QUIET))
    a, b, c = (values(run.model, run.guide) for run in runs)
    assert equal(a, b) and not equal(a, c)
    without_time = [[{**r, "seconds": 0.0} for r in run.history] for run in runs]
    assert without_time[0] == without_time[1] != without_time[2]


def test_each_epoch_has_its_own_order_and_noise() -> None:
    orders: list[list[float]] = [[]]
    model, guide = linear_pair()
    model.register_forward_pre_hook(lambda _, args: orders[-1].extend(args[0][:, 0].tolist()))
    x = linear_data(100)
    fit(model, guide, x, epochs=3, callbacks=[lambda run: orders.append([])], **QUIET)
    first, second, third = (order[-100:] for order in orders[:3])
    assert sorted(first) == sorted(second) == sorted(third) == sorted(x[:, 0].tolist())
    assert first != second != third != first


def test_training_one_pair_does_not_change_another() -> None:
    x = linear_data()
    alone = fit(*linear_pair(), x, epochs=3, **QUIET)
    others = []

    def meanwhile(run: Any) -> None:
        others.append(fit(*linear_pair(seed=1), x + 1, epochs=2, **QUIET))

    turns = fit(*linear_pair(), x, epochs=3, callbacks=[meanwhile], **QUIET)
    assert equal(values(alone.model, alone.guide), values(turns.model, turns.guide))
    assert equal(values(others[0].model), values(others[2].model))


def test_training_plain_functions_of_equal_names_does_not_mix_them() -> None:
    x = linear_data()
    model, guide, nets = two_latents()
    fit(model, guide, x, epochs=2, **QUIET)
    alone = values(nets)
    others = []

    def meanwhile(run: Any) -> None:
        other_model, other_guide, other_nets = two_latents()
        fit(other_model, other_guide, x + 1, epochs=1, **QUIET)
        others.append(values(other_nets))

    model, guide, nets = two_latents()
    fit(model, guide, x, epochs=2, callbacks=[meanwhile], **QUIET)
    assert equal(values(nets), alone) and not equal(others[0], alone)


def test_float64_programs_train_in_float64() -> None:
    model, guide = linear_pair()
    model.double()
    guide.double()
    run = fit(
        model, guide, linear_data().double(), validation=linear_data(20, seed=1).double(), epochs=2, **QUIET
    )
    assert all(v.dtype == torch.float64 for v in values(run.model, run.guide))


def test_training_and_evaluation_modes_are_as_the_caller_set_them() -> None:
    model, guide = linear_pair(normalization="batch", dropout=0.3)
    model.eval()
    guide.encoder.layers[0].eval()
    modes = [module.training for program in (model, guide) for module in program.modules()]
    x = linear_data()
    fit(model, guide, x, validation=x, epochs=1, **QUIET)
    evaluate(model, guide, x, num_particles=3, progress=False)
    assert [module.training for program in (model, guide) for module in program.modules()] == modes


def test_validation_uses_no_dropout_and_changes_no_buffer() -> None:
    x = linear_data()
    networks = {"normalization": "batch", "dropout": 0.5}
    with_it = fit(*linear_pair(**networks), x, validation=linear_data(60, seed=1) + 7, epochs=1, **QUIET)
    without = fit(*linear_pair(**networks), x, epochs=1, **QUIET)
    assert equal(values(with_it.model, with_it.guide), values(without.model, without.guide))
    buffers = dict(with_it.guide.named_buffers())
    assert buffers and any(float(b.float().abs().sum()) > 0 for name, b in buffers.items() if "mean" in name)
    for module in with_it.guide.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.99
    record = fit(with_it.model, with_it.guide, x, validation=x, epochs=1, **AT_REST, **QUIET).history[0]
    with_it.guide.eval()
    quiet = fit(with_it.model, with_it.guide, x, validation=x, epochs=1, **AT_REST, **QUIET).history[0]
    assert abs(record["validation_elbo"] - quiet["validation_elbo"]) < 0.5 * abs(
        record["train_elbo"] - quiet["train_elbo"]
    )


# -- what it refuses ---------------------------------------------------------------------------------


class Prior(nn.Module):
    """A model or guide over latent sites of given sizes, plate and names."""

    def __init__(
        self, *, observed: bool, sites: dict[str, int], plate: int = 0, scalar: bool = False
    ) -> None:
        super().__init__()
        self.observed, self.sites, self.plate, self.scalar = observed, sites, plate, scalar
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x) + self.plate, dim=-1):
            for name, size in self.sites.items():
                one = dist.Normal(self.weight.expand(size), 1.0)
                pyro.sample(name, dist.Normal(self.weight, 1.0) if self.scalar else one.to_event(1))
            if self.observed:
                pyro.sample("x", dist.Normal(self.weight.expand(5), 1.0).to_event(1), obs=x)


def prior(**sites: int) -> Prior:
    return Prior(observed=True, sites=sites or {"z": 2})


def proposal(plate: int = 0, scalar: bool = False, **sites: int) -> Prior:
    return Prior(observed=False, sites=sites or {"z": 2}, plate=plate, scalar=scalar)


X, BITS = linear_data(100), bits(100)
OUTSIDE = with_value(BITS, 57, 1.5)
NAN, INF = float("nan"), float("inf")


def grey_pair() -> tuple[VAE, MeanFieldGuide]:
    model, guide = image_pair()
    return VAE(StandardNormal(2), ContinuousBernoulli(model.likelihood.decoder)), guide


def labelled() -> tuple[Callable, Callable]:
    return labelled_pair([])


class Refused:
    """A call with one thing wrong."""

    def __init__(
        self,
        message: str,
        *,
        pair: Callable = linear_pair,
        kind: type[Exception] = ValueError,
        **arguments: Any,
    ) -> None:
        self.message, self.pair, self.kind = message, pair, kind
        self.arguments: dict[str, Any] = {"data": X, **QUIET, **arguments}


REFUSED: dict[str, Refused] = {
    "nan": Refused(r"^data: .*finite.* 1 NaN .*row 57", data=with_value(X, 57, NAN)),
    "infinite": Refused("^data: .*finite.*row 57", data=with_value(X, 57, INF)),
    "nan in validation": Refused("^validation: .*row 3", validation=with_value(X, 3, NAN)),
    "nan in a loader": Refused(
        "^data, batch 3: .*finite.*row 17", data=DataLoader(TensorDataset(with_value(X, 57, NAN)), 20)
    ),
    "nan in a validation loader": Refused(
        "^validation, batch 3: .*row 17", validation=DataLoader(TensorDataset(with_value(X, 57, NAN)), 20)
    ),
    "grey": Refused(
        r"^data: datum 0 .*site 'x'.*binarise.*ContinuousBernoulli",
        pair=image_pair,
        data=with_value(BITS, 0, 0.5),
    ),
    "grey later": Refused("^data: datum 57 .*site 'x'", pair=image_pair, data=with_value(BITS, 57, 0.5)),
    "grey in validation": Refused(
        "^validation: datum 57", pair=image_pair, data=BITS, validation=with_value(BITS, 57, 0.5)
    ),
    "grey in a loader": Refused(
        "^data, batch 3: datum 17",
        pair=image_pair,
        data=DataLoader(TensorDataset(with_value(BITS, 57, 0.5)), 20),
    ),
    "grey in a validation loader": Refused(
        "^validation, batch 3: datum 17",
        pair=image_pair,
        data=BITS,
        validation=DataLoader(TensorDataset(with_value(BITS, 57, 0.5)), 20),
    ),
    "grey in a tutorial's model": Refused(
        "^data: datum 57 .*site 'obs'",
        pair=lambda: (TutorialVAE().model, TutorialVAE().guide),
        data=with_value(BITS, 57, 0.5),
    ),
    "above 1": Refused(r"^data: datum 57 .* from 0 to 1\.5", pair=grey_pair, data=OUTSIDE),
    "below 0": Refused(r"^data: datum 57 .* from -0\.5", pair=grey_pair, data=with_value(BITS, 57, -0.5)),
    "dynamic above 1": Refused(
        r"^data: .*\[0, 1\].*1\.5.*row 57", pair=image_pair, data=Split(OUTSIDE, dynamic=True)
    ),
    "dynamic above 1 at once": Refused(
        r"^data: .*\[0, 1\].*row 0", pair=image_pair, data=Split(with_value(BITS, 0, 1.5), dynamic=True)
    ),
    "image size": Refused(r"4, 4.*5, 5", pair=image_pair, data=torch.zeros(20, 1, 5, 5)),
    "image size of a plain network": Refused(
        r"^data: .*batch of shape \[20, 5\]",
        pair=lambda: (TutorialVAE().model, TutorialVAE().guide),
        data=torch.zeros(20, 5),
    ),
    "image size in validation": Refused(
        "^validation: .*4, 4.*5, 5", pair=image_pair, data=BITS, validation=torch.zeros(20, 1, 5, 5)
    ),
    "image size in a validation loader": Refused(
        "^validation: .*4, 4.*5, 5",
        pair=image_pair,
        data=BITS,
        validation=DataLoader(TensorDataset(torch.zeros(20, 1, 5, 5)), 5),
    ),
    "float64 data": Refused(r"^data: .*\[50, 5\] \(torch\.float64\)", data=X.double()),
    "integers": Refused(
        "^data: .*floating-point.*int64", kind=TypeError, data=torch.ones(20, 5, dtype=torch.int64)
    ),
    "empty": Refused(r"^data: .*above 0, got \[0, 5\]", data=X[:0]),
    "empty validation": Refused("^validation: ", validation=X[:0]),
    "empty loader": Refused("^data: .*got none", data=DataLoader(TensorDataset(X), 200, drop_last=True)),
    "empty validation loader": Refused(
        "^validation: .*got none", validation=DataLoader(TensorDataset(X), 200, drop_last=True)
    ),
    "no data": Refused("^data: expected .*NoneType", kind=TypeError, data=None),
    "data by name": Refused("^data: expected .*str", kind=TypeError, data="digits"),
    "labels missing": Refused(r"^data: .*\['x', 'y'\], got 1.*labels", pair=labelled, kind=TypeError),
    "labels missing in validation": Refused(
        "^validation: .*labels",
        pair=labelled,
        kind=TypeError,
        data=(X.round(), X[:, 0].round().long()),
        validation=X,
    ),
    "epochs 0": Refused("^epochs: .*above 0, got 0", epochs=0),
    "epochs -1": Refused("^epochs: .*got -1", epochs=-1),
    "epochs 1.5": Refused("^epochs: .*got 1.5", kind=TypeError, epochs=1.5),
    "batch_size 0": Refused("^batch_size: .*got 0", batch_size=0),
    "batch_size -5": Refused("^batch_size: .*got -5", batch_size=-5),
    "learning_rate 0": Refused("^learning_rate: .*got 0", learning_rate=0.0),
    "learning_rate negative": Refused("^learning_rate: .*got -1", learning_rate=-1.0),
    "learning_rate nan": Refused("^learning_rate: .*got nan", learning_rate=NAN),
    "learning_rate of the guide": Refused(
        r"^learning_rate\['guide'\]: .*got 0", learning_rate={"model": 1e-3, "guide": 0}
    ),
    "learning_rate of one": Refused("^learning_rate: .*'guide'.*got {'model'", learning_rate={"model": 1e-3}),
    "learning_rate text": Refused("^learning_rate: .*got 'fast'", kind=TypeError, learning_rate="fast"),
    "clip_norm 0": Refused("^clip_norm: .*got 0", clip_norm=0),
    "clip_norm negative": Refused("^clip_norm: .*got -2", clip_norm=-2.0),
    "patience 0": Refused("^patience: .*got 0", validation=X, patience=0),
    "patience negative": Refused("^patience: .*got -1", validation=X, patience=-1),
    "patience alone": Refused("^patience: expected validation data.*got validation=None", patience=3),
    "seed": Refused("^seed: .*got -1", seed=-1),
    "seed 0.5": Refused("^seed: .*got 0.5", kind=TypeError, seed=0.5),
    "device": Refused("^device: expected 'cpu'.*got 'gpu'", device="gpu"),
    "device of another kind": Refused("^device: .*this machine, got 'meta'", device="meta"),
    "device far away": Refused("^device: .*got 'cuda:99'; it has [0-9]+ CUDA", device="cuda:99"),
    "elbo by class": Refused(r"^elbo: .*Trace_ELBO\(\), got <class", kind=TypeError, elbo=Trace_ELBO),
    "elbo": Refused("^elbo: .*got 3", kind=TypeError, elbo=3),
    "optimizer made": Refused(
        "^optimizer: .*function.*got SGD",
        kind=TypeError,
        optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
    ),
    "optimizer of pyro": Refused(
        "^optimizer: .*function.*got <pyro", kind=TypeError, optimizer=pyro.optim.Adam({"lr": 1})
    ),
    "optimizer by name": Refused("^optimizer: .*got 'Adam'", kind=TypeError, optimizer="Adam"),
    "optimizer of nothing": Refused(
        "^optimizer: .*it made None", kind=TypeError, optimizer=lambda groups: None
    ),
    "lbfgs": Refused("^optimizer: LBFGS", optimizer=torch.optim.LBFGS),
    "lbfgs alone": Refused(
        "^optimizer: .*closure", optimizer=lambda groups: torch.optim.LBFGS(groups[0]["params"])
    ),
    "scheduler": Refused("^scheduler: .*got 3", kind=TypeError, scheduler=3),
    "scheduler of nothing": Refused(
        "^scheduler: .*it made None", kind=TypeError, scheduler=lambda optimizer: None
    ),
    "one callback": Refused("^callbacks: expected a sequence", kind=TypeError, callbacks=print),
    "callback": Refused(r"^callbacks: .*got \[3\]", kind=TypeError, callbacks=[3]),
    "model": Refused("^model: .*got None", pair=lambda: (None, proposal()), kind=TypeError),
    "guide": Refused("^guide: .*got 3", pair=lambda: (prior(), 3), kind=TypeError),
    "site missing": Refused(
        r"^guide: lacks .*\['z2'\].*\['z1'\]", pair=lambda: (prior(z1=2, z2=2), proposal(z1=2))
    ),
    "site too many": Refused(r"^guide: .*\['w'\].*\['z'\]", pair=lambda: (prior(z=2), proposal(z=2, w=1))),
    "site shapes": Refused(
        r"^site 'z': .*shapes.*\(2,\).*in the model.*\(3,\).*in the guide",
        pair=lambda: (prior(z=2), proposal(z=3)),
    ),
    "site events": Refused("^site 'z': .*shapes", pair=lambda: (prior(z=2), proposal(scalar=True, z=2))),
    "site plates": Refused("^site 'z': .*plates.*50.*51", pair=lambda: (prior(z=2), proposal(plate=1, z=2))),
    "nothing observed": Refused(
        "^model: expected an observed site", pair=lambda: (proposal(z=2), proposal(z=2))
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_in_one_line_before_any_work(name: str, tmp_path: Path) -> None:
    wrong = REFUSED[name]
    model, guide = wrong.pair()
    modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
    before = values(*modules)
    with pytest.raises(wrong.kind, match=wrong.message) as caught:
        fit(model, guide, output=tmp_path / "runs" / "run", **wrong.arguments)
    assert type(caught.value) is wrong.kind and "\n" not in str(caught.value)
    assert equal(before, values(*modules))
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^device: .*this machine, got 'cuda'; it has 0 CUDA"):
        fit(*linear_pair(), X, device="cuda", output=tmp_path / "run", **QUIET)
    assert not (tmp_path / "run").exists()


def test_data_that_a_site_may_observe_by_its_own_bounds_are_not_refused() -> None:
    """The support of a binomial site hangs on each datum's own total: row 0's says nothing of the others."""
    x = torch.arange(1.0, 61.0).unsqueeze(-1).repeat(1, 2)
    net = nn.Linear(2, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Binomial(2 * x, logits=z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(net(x / 60), 1.0).to_event(1))

    assert len(fit(model, guide, x, epochs=1, **QUIET).history) == 1
    assert evaluate(model, guide, x, num_particles=2, progress=False).num_data == 60


def test_a_loader_that_can_be_read_once_is_refused() -> None:
    class Once(IterableDataset):
        batches = iter(linear_data(100).split(20))

        def __iter__(self) -> Iterator[Tensor]:
            return self.batches

    with pytest.raises(ValueError, match=r"^data: expected a loader that can be iterated once per epoch"):
        fit(*linear_pair(), Once(), epochs=3, progress=False)


# -- where it may write ------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    fit(*linear_pair(), X, epochs=1, output=tmp_path / "run", **QUIET)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(FileExistsError, match=r"^output: .*run holds a run; set overwrite or resume"):
        fit(*linear_pair(), X, epochs=2, output=tmp_path / "run", **QUIET)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_overwrite_replaces_a_run(tmp_path: Path) -> None:
    fit(*linear_pair(), X, epochs=3, output=tmp_path / "run", **QUIET)
    run = fit(*linear_pair(seed=1), X, epochs=1, output=tmp_path / "run", overwrite=True, **QUIET)
    saved = load_run(tmp_path / "run")
    assert saved.history == run.history and len(saved.history) == 1
    assert equal(values(saved.model, saved.guide), values(run.model, run.guide))


def test_overwrite_of_a_bad_call_leaves_the_run(tmp_path: Path) -> None:
    fit(*linear_pair(), X, epochs=2, output=tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match="finite"):
        fit(*linear_pair(), with_value(X, 9, NAN), epochs=1, output=tmp_path / "run", overwrite=True, **QUIET)
    assert len(load_run(tmp_path / "run").history) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^output: .*other files than a run"):
        fit(*linear_pair(), X, output=tmp_path, overwrite=overwrite, **QUIET)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file_or_under_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"^output: expected a folder, .*file is a file"):
        fit(*linear_pair(), X, output=file, **QUIET)
    with pytest.raises(OSError, match=r"^output: can't write to .*file/run"):
        fit(*linear_pair(), X, output=file / "run", **QUIET)
    assert file.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_an_output_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(OSError, match=r"^output: can't write to /proc/nowhere/run: "):
        fit(*linear_pair(), X, output="/proc/nowhere/run", **QUIET)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert len(fit(*linear_pair(), X, epochs=1, output=tmp_path, **QUIET).history) == 1


def test_a_rate_in_the_optimizer_is_refused() -> None:
    optimizer = functools.partial(torch.optim.Adam, lr=0.5)
    with pytest.raises(ValueError, match="optimizer: expected its rate as `learning_rate`"):
        fit(LinearGaussian(2, 3), MeanFieldGuide(MLP(3), 2), torch.randn(9, 3), optimizer=optimizer)


def test_size_is_no_tensor_of_the_batch() -> None:
    """A model that draws `size` data from the prior takes no labels for it."""
    inner, guide = LinearGaussian(2, 3), MeanFieldGuide(MLP(3), 2)
    sizes = []

    def model(x: Tensor | None, size: int | None = None) -> Tensor:
        sizes.append(size)
        pyro.module("inner", inner)
        return inner(x, size=size)

    labelled = (torch.randn(9, 3), torch.arange(9))
    fit(model, guide, labelled, epochs=1, progress=False)
    assert set(sizes) == {None}


@pytest.mark.parametrize(("worth", "compiled"), [(1e9, False), (1e-9, True)])
def test_compile_auto_says_what_it_does_and_a_resumed_run_keeps_to_it(
    worth: float,
    compiled: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    monkeypatch.setattr(sys.modules["ppl_vae.training.fit"], "WORTH_COMPILING", worth)
    options: dict[str, Any] = {**QUIET, "compile": "auto", "output": tmp_path / "run"}
    run = fit(*linear_pair(), linear_data(), epochs=1, **options)
    assert run.config["compile"] is compiled
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        f"compile='auto': {'compiled' if compiled else 'plain'} steps, since 4 plain steps of "
    )
    monkeypatch.setattr(sys.modules["ppl_vae.training.fit"], "WORTH_COMPILING", 1 / worth)
    run = fit(*linear_pair(), linear_data(), epochs=2, resume=True, **options)
    assert run.config["compile"] is compiled and not capsys.readouterr().err
    plain = fit(*linear_pair(), linear_data(), epochs=2, **QUIET)
    without_seconds = [[{**r, "seconds": 0} for r in each.history] for each in (run, plain)]
    assert without_seconds[0] == [pytest.approx(record, rel=1e-4) for record in without_seconds[1]]


def test_compile_auto_without_a_number_of_batches(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(
        *linear_pair(),
        DataLoader(Stream(linear_data(), 50), batch_size=None),
        epochs=1,
        progress=False,
        compile="auto",
    )
    assert run.config["compile"] is False
    assert "the data's number of batches is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "always"}, r"compile: unknown 'always'.*expected one of True, False, 'auto'"),
        ({"precision": "bf"}, r"precision: unknown 'bf' \(did you mean 'bf16'\?\)"),
    ],
)
def test_unknown_ways_of_running(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*linear_pair(), linear_data(), **QUIET, **options)


def test_precision_is_that_of_training_alone() -> None:
    low, full = (
        fit(
            *linear_pair(),
            linear_data(),
            validation=linear_data(seed=1),
            epochs=1,
            precision=p,
            **QUIET,
            **AT_REST,
        )
        for p in ("bf16", "float32")
    )
    assert low.history[0]["train_elbo"] != full.history[0]["train_elbo"]
    assert low.history[0]["validation_elbo"] == full.history[0]["validation_elbo"]
    assert low.config["precision"] == "bf16"


def test_compile_auto_with_an_estimator_that_is_never_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    elbo = RenyiELBO(num_particles=2)
    run = fit(*linear_pair(), linear_data(), elbo=elbo, epochs=1, compile="auto", **QUIET)
    assert run.config["compile"] is False
    assert "plain steps, since RenyiELBO has no differentiable loss" in capsys.readouterr().err


def test_learning_rates_that_are_tensors_are_recorded_as_they_were() -> None:
    def adam(groups: Any) -> torch.optim.Optimizer:
        made = torch.optim.Adam(groups, fused=True)
        for group in made.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        return made

    run = fit(
        *linear_pair(),
        linear_data(),
        optimizer=adam,
        learning_rate=0.01,
        scheduler=functools.partial(schedulers.ExponentialLR, gamma=0.1),
        epochs=2,
        **QUIET,
    )
    assert [record["learning_rate"] for record in run.history] == [pytest.approx(0.01), pytest.approx(0.001)]
