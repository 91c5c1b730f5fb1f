"""Tests of training several models at once: each is what it would be alone, and no two share anything."""

import copy
import functools
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers import ESTIMATORS, Stream
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO, TraceTailAdaptive_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.util import get_rng_state
from torch import Tensor, nn

from ppl_vae import fit, fit_many, load_run
from ppl_vae.data import Split
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.infer import KL_ELBO, VIMCO, LinearWarmup, tracing
from ppl_vae.models import LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.training import Run, saving

Pair = tuple[nn.Module, nn.Module]
QUIET: dict[str, Any] = {"progress": False, "batch_size": 20}
# float64, sums in another order; Adam's 1e-8 under the root enlarges what rounds at 1e-16
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-11}


def data(n: int = 50, seed: int = 100) -> Tensor:
    torch.manual_seed(seed)
    return LinearGaussian(2, 5, scale=0.5)(None, size=n).detach().double()


class DeltaGuide(nn.Module):
    """The guide that draws z = f(x), always: the loss has no noise."""

    def __init__(self, **network: Any) -> None:
        super().__init__()
        self.net = MLP(5, 2, hidden=(4,), **network)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Delta(self.net(x), event_dim=1))


class FixedNormal(dist.Normal):
    """A normal distribution whose noise is always the same, whatever the seed."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        count = torch.arange(1, 1 + shape.numel(), dtype=self.loc.dtype).view(shape)
        return self.loc + self.scale * 1.5 * (9 * count).sin()


class FixedNoise(MeanFieldGuide):
    """A mean-field guide without randomness."""

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Any:
        normal = super().posterior(x, y).base_dist
        return FixedNormal(normal.loc, normal.scale).to_event(1)


def noisy_pair() -> Pair:
    return LinearGaussian(2, 5).double(), MeanFieldGuide(MLP(5, hidden=(4,)), 2).double()


def delta_pair(**network: Any) -> Pair:
    return LinearGaussian(2, 5).double(), DeltaGuide(**network).double()


def fixed_pair() -> Pair:
    return LinearGaussian(2, 5).double(), FixedNoise(MLP(5, hidden=(4,)), 2).double()


def values(run: Run | Pair) -> dict[str, Tensor]:
    pair = (run.model, run.guide) if isinstance(run, Run) else run
    return {f"{i}.{k}": v.clone() for i, p in enumerate(pair) for k, v in p.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def assert_alike(run: Run, alone: Run) -> None:
    for name, value in values(alone).items():
        torch.testing.assert_close(values(run)[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    assert len(run.history) == len(alone.history) and run.best_epoch == alone.best_epoch
    for got, wanted in zip(without_seconds(run.history), without_seconds(alone.history), strict=True):
        assert got == pytest.approx(
            {"kl_weight": got.get("kl_weight")} | wanted if "kl_weight" in got else wanted
        )


def remembering(make: Callable[[], Pair]) -> tuple[Callable[[], Pair], list[Pair]]:
    """Return ``make`` and where it puts copies of what it made."""
    made: list[Pair] = []

    def run() -> Pair:
        pair = make()
        made.append(copy.deepcopy(pair))
        return pair

    return run, made


# -- each member is what it would be alone ------------------------------------------------------------


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        torch.optim.SGD,
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
        functools.partial(torch.optim.RMSprop, momentum=0.9),
    ],
    ids=["Adam", "SGD", "AdamW", "RMSprop"],
)
def test_members_without_noise_are_those_of_fit(optimizer: Any, clip_norm: float | None) -> None:
    x, held_out = data(), data(17, seed=1)
    options: dict[str, Any] = {"epochs": 3, "clip_norm": clip_norm, "validation": held_out, **QUIET}
    options |= {"learning_rate": {"model": 0.05, "guide": 0.02}}
    options |= {} if optimizer is None else {"optimizer": optimizer}
    make, starts = remembering(delta_pair)
    runs = fit_many(make, x, seeds=(5, 6), kl_weights=(0.5, 2.0, LinearWarmup(7)), **options)
    assert len(starts) == len(runs) == 6
    assert equal(values(starts[0]), values(starts[1])) and not equal(values(starts[0]), values(starts[3]))
    for (model, guide), run in zip(starts, runs, strict=True):
        weight = LinearWarmup(7) if isinstance(run.config["kl_weight"], dict) else run.config["kl_weight"]
        alone = fit(model, guide, x, elbo=KL_ELBO(kl_weight=weight), seed=5, **options)
        assert_alike(run, alone)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_takes_the_steps_of_fit(name: str) -> None:
    elbo = ESTIMATORS[name]()
    make, starts = remembering(fixed_pair)
    weighed = name not in ("BetaTC_ELBO", "DIP_ELBO", "EnumELBO", "WakeSleep", "KL_ELBO")
    x, options = data(40), {"epochs": 2, "learning_rate": 0.05, **QUIET}
    runs = fit_many(make, x, seeds=(0, 1), elbo=elbo, kl_weights=(0.5, 1.5) if weighed else None, **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        alone = ESTIMATORS[name]()
        if weighed:
            alone.kl_weight = run.config["kl_weight"]
        assert_alike(run, fit(model, guide, x, elbo=alone, seed=0, **options))


@pytest.mark.parametrize(
    "elbo",
    [Trace_ELBO(), TraceMeanField_ELBO(), Trace_ELBO(num_particles=2)],
    ids=["Trace", "MeanField", "two"],
)
def test_estimators_of_pyro_take_the_steps_of_fit(elbo: Any) -> None:
    make, starts = remembering(fixed_pair)
    x, options = data(40), {"epochs": 2, "learning_rate": 0.05, "elbo": elbo, **QUIET}
    runs = fit_many(make, x, seeds=(0, 1), **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        assert_alike(run, fit(model, guide, x, seed=0, **options))


def test_batch_normalization_keeps_running_moments_of_each_member() -> None:
    make, starts = remembering(lambda: delta_pair(normalization="batch"))
    x, options = data(), {"epochs": 2, "learning_rate": 0.05, "validation": data(9, seed=1), **QUIET}
    runs = fit_many(make, x, seeds=(0, 1), **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        before = values((model, guide))["1.net.layers.1.running_mean"]
        assert_alike(run, fit(model, guide, x, elbo=KL_ELBO(), seed=0, **options))
        assert not torch.equal(values(run)["1.net.layers.1.running_mean"], before)


class Tied(nn.Module):
    """A guide with a parameter that it shares with the model, a frozen one and one that is never used."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.model = model
        self.shift = nn.Parameter(torch.randn(2), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            loc = (x - self.model.bias) @ self.model.weight + self.shift
            return pyro.sample("z", dist.Delta(loc, event_dim=1))


def test_shared_frozen_and_unused_parameters_are_as_in_fit() -> None:
    def tied() -> Pair:
        model = LinearGaussian(2, 5).double()
        return model, Tied(model).double()

    make, starts = remembering(tied)
    optimizer = functools.partial(torch.optim.AdamW, weight_decay=0.1)  # moves what has a gradient of 0
    x, options = data(), {"epochs": 2, "learning_rate": 0.05, "optimizer": optimizer, **QUIET}
    with pytest.warns(UserWarning, match=r"no gradient reaches guide\.unused"):
        runs = fit_many(make, x, seeds=(0, 1), **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        with pytest.warns(UserWarning, match=r"no gradient reaches guide\.unused"):
            alone = fit(model, guide, x, elbo=KL_ELBO(), seed=0, **options)
        assert_alike(run, alone)
        assert run.guide.model is run.model


class Constrained(PyroModule):
    """A guide with a positive parameter, as Pyro has them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 2)
        self.scale = PyroParam(torch.rand(2).double() + 0.5, dist.constraints.positive)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", FixedNormal(self.linear(x), self.scale).to_event(1))


def test_constrained_parameters_of_pyro_train_as_in_fit() -> None:
    make, starts = remembering(lambda: (LinearGaussian(2, 5).double(), Constrained().double()))
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, **QUIET}
    x = data()
    store = list(pyro.get_param_store())
    runs = fit_many(make, x, seeds=(0, 1), **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        before = guide.scale.detach().clone()
        assert_alike(run, fit(model, guide, x, elbo=KL_ELBO(), seed=0, **options))
        assert not torch.equal(run.guide.scale, before)
    assert list(pyro.get_param_store()) == store


def test_a_loader_and_labels_train_as_in_fit() -> None:
    x = data()
    make, starts = remembering(delta_pair)
    options: dict[str, Any] = {"epochs": 2, "learning_rate": 0.05, "progress": False}
    (run,) = fit_many(make, Stream(x, 20), seeds=(0,), validation=(x, torch.arange(50)), **options)
    alone = fit(*starts[0], Stream(x, 20), elbo=KL_ELBO(), validation=(x, torch.arange(50)), **options)
    assert_alike(run, alone)


# -- noise --------------------------------------------------------------------------------------------


def gradients_of(runs: list[Run], start: Pair) -> dict[str, Tensor]:
    """Return what one step of SGD at rate 1 took away, ``[members, ...]``."""
    return {k: torch.stack([v - values(run)[k] for run in runs]) for k, v in values(start).items()}


def analytic_loss(model: nn.Module, guide: nn.Module, x: Tensor, kl_weight: float) -> Tensor:
    """Return minus the ELBO of the linear-Gaussian model under a mean-field guide, nats per datum."""
    q = guide.posterior(x).base_dist
    variance = (2 * model.log_scale).exp()
    error = (x - q.loc @ model.weight.mT - model.bias).square().sum(-1)
    spread = (q.scale.square() @ model.weight.square().mT).sum(-1)
    log_likelihood = -0.5 * (error + spread) / variance - 5 * (0.5 * (2 * torch.pi * variance).log())
    kl = (0.5 * (q.scale.square() + q.loc.square() - 1) - q.scale.log()).sum(-1)
    return (kl_weight * kl - log_likelihood).mean()


def test_gradients_are_the_analytic_one_on_average_and_each_member_has_its_own_noise() -> None:
    """Seed 3, 400 members that start alike; 4 standard errors of the mean of their gradients."""
    make, starts = remembering(noisy_pair)
    x = data(20)
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "learning_rate": 1.0, "epochs": 1, **QUIET}
    runs = fit_many(make, x, seeds=[3] * 400, kl_weights=(2.0,), **options)
    found = gradients_of(runs, starts[0])
    model, guide = starts[0]
    parameters = {f"{i}.{k}": p for i, m in enumerate(starts[0]) for k, p in m.named_parameters()}
    exact = torch.autograd.grad(analytic_loss(model, guide, x, 2.0), list(parameters.values()))
    for name, gradient in zip(parameters, exact, strict=True):
        error = found[name].std(0) / 400**0.5
        assert ((found[name].mean(0) - gradient).abs() <= 4 * error + 1e-12).all(), name
    assert len(found["0.weight"].flatten(1).unique(dim=0)) == 400


class Drawing(nn.Module):
    """A model, or with an encoder a guide, over z of a given family."""

    def __init__(self, family: Callable[[Tensor], Any], *, guides: bool) -> None:
        super().__init__()
        self.family, self.guides = family, guides
        self.net = nn.Linear(5, 3).double() if guides else nn.Linear(3, 5).double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.family(self.net(x) if self.guides else x.new_zeros(3)))
            if not self.guides:
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


FAMILIES: dict[str, Callable[[Tensor], Any]] = {
    "Bernoulli": lambda h: dist.Bernoulli(logits=h).to_event(1),
    "Exponential": lambda h: dist.Exponential(h.exp()).to_event(1),
    "Gamma": lambda h: dist.Gamma(h.exp(), 1.0).to_event(1),
    "Laplace": lambda h: dist.Laplace(h, 1.0).to_event(1),
    "LogNormal": lambda h: dist.LogNormal(h, 1.0).to_event(1),
    "Normal": lambda h: dist.Normal(h, 1.0).to_event(1),
    "MultivariateNormal": lambda h: dist.MultivariateNormal(h, torch.eye(3, dtype=h.dtype)),
    "OneHotCategorical": lambda h: dist.OneHotCategorical(logits=h),
    "StudentT": lambda h: dist.StudentT(5.0, h, 1.0).to_event(1),
    "Uniform": lambda h: dist.Uniform(h - 1e6, h + 1e6).to_event(1),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # Gamma's, under vmap
@pytest.mark.parametrize("name", FAMILIES)
def test_draws_of_all_families_differ_between_members(name: str) -> None:
    """Members that start alike: the first record of each is of other draws."""

    def make() -> Pair:
        return Drawing(FAMILIES[name], guides=False), Drawing(FAMILIES[name], guides=True)

    optimizer: Any = torch.optim.SGD
    runs = fit_many(
        make,
        data(),
        seeds=[0] * 4,
        elbo=VIMCO(2),
        epochs=1,
        optimizer=optimizer,
        learning_rate=1e-30,
        **QUIET,
    )
    assert len({run.history[0]["train_reconstruction"] for run in runs}) == 4


def test_dropout_differs_between_members() -> None:
    runs = fit_many(lambda: delta_pair(dropout=0.5), data(), seeds=(0, 0, 0), epochs=1, **QUIET)
    assert len({run.history[0]["train_elbo"] for run in runs}) == 3


def test_validation_has_the_same_noise_in_each_epoch_and_other_noise_for_each_member() -> None:
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "learning_rate": 1e-30, "epochs": 2, **QUIET}
    runs = fit_many(noisy_pair, data(), seeds=(0, 0), validation=data(9, seed=1), **options)
    for run in runs:
        assert run.history[0]["validation_elbo"] == run.history[1]["validation_elbo"]
        assert run.history[0]["train_elbo"] != run.history[1]["train_elbo"]
    assert runs[0].history[0]["validation_elbo"] != runs[1].history[0]["validation_elbo"]


def test_a_members_weight_leaves_the_others_alone() -> None:
    options: dict[str, Any] = {"epochs": 2, "validation": data(9, seed=1), "clip_norm": 1.0, **QUIET}
    first = fit_many(noisy_pair, data(), seeds=(0, 1), kl_weights=(1.0, 4.0), **options)
    second = fit_many(noisy_pair, data(), seeds=(0, 1), kl_weights=(1.0, 0.0), **options)
    for i, same in enumerate((True, False, True, False)):
        assert equal(values(first[i]), values(second[i])) == same
        assert (without_seconds(first[i].history) == without_seconds(second[i].history)) == same


def test_the_same_seeds_give_the_same_runs_and_leave_no_trace() -> None:
    pyro.param("mine", torch.ones(1))
    elbo = KL_ELBO(2)
    torch.manual_seed(9)
    random.seed(9)
    before, settings = str(get_rng_state()), dict(vars(elbo))
    first = fit_many(noisy_pair, data_split := Split(data_at_rest()), elbo=elbo, epochs=2, **QUIET)
    assert str(get_rng_state()) == before and vars(elbo) == settings
    assert list(pyro.get_param_store()) == ["mine"]
    torch.manual_seed(10)
    second = fit_many(noisy_pair, data_split, elbo=elbo, epochs=2, **QUIET)
    for a, b in zip(first, second, strict=True):
        assert equal(values(a), values(b)) and without_seconds(a.history) == without_seconds(b.history)
        for module in (a.model, a.guide):
            copy.deepcopy(module)
            assert not any(torch._C._functorch.is_functorch_wrapped_tensor(p) for p in module.parameters())
    assert len({str(values(run)) for run in first}) == 3


def data_at_rest() -> Tensor:
    return torch.linspace(-1.0, 1.0, 250, dtype=torch.float64).view(50, 5).sin()


# -- what a run holds ---------------------------------------------------------------------------------


def test_a_record_has_the_keys_of_fit_and_the_settings_say_which_member_it_is() -> None:
    x, held_out = data(), data(9, seed=1)
    runs = fit_many(
        noisy_pair, x, seeds=(3, 4), kl_weights=(1.0, 2.0), validation=held_out, epochs=2, **QUIET
    )
    alone = fit(*noisy_pair(), x, elbo=KL_ELBO(), validation=held_out, epochs=2, **QUIET)
    assert [(r.config["seed"], r.config["kl_weight"]) for r in runs] == [
        (3, 1.0),
        (3, 2.0),
        (4, 1.0),
        (4, 2.0),
    ]
    for i, run in enumerate(runs):
        assert [set(record) for record in run.history] == [{*alone.history[0], "kl_weight"}] * 2
        assert {record["kl_weight"] for record in run.history} == {run.config["kl_weight"]}
        assert alone.config.keys() - run.config.keys() == set()
        assert (run.config["members"], run.config["member"]) == (4, i)
        assert run.config["elbo"]["kl_weight"] == run.config["kl_weight"]
        for record in run.history:
            difference = record["train_reconstruction"] - record["train_kl_z"]
            assert record["train_elbo"] == pytest.approx(difference, rel=1e-12)


def test_each_member_ends_at_its_own_best_epoch() -> None:
    """Held-out data far from the training data, and a wild rate: the best epoch is not the last one."""
    make, starts = remembering(delta_pair)
    options: dict[str, Any] = {"optimizer": torch.optim.SGD, "learning_rate": 0.2, **QUIET}
    runs = fit_many(make, data(), seeds=range(4), validation=data(9, seed=1) * 2, epochs=6, **options)
    for (model, guide), run in zip(starts, runs, strict=True):
        elbos = [record["validation_elbo"] for record in run.history]
        assert run.best_epoch == elbos.index(max(elbos)) + 1
        alone = fit(model, guide, data(), elbo=KL_ELBO(), epochs=run.best_epoch, **options)
        for name, value in values(alone).items():
            torch.testing.assert_close(values(run)[name], value, **CLOSE)
    assert len({run.best_epoch for run in runs}) > 1


def test_a_saved_member_is_a_run_of_its_own(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "validation": data(9, seed=1),
        "epochs": 3,
        "output": tmp_path / "out",
        **QUIET,
    }
    runs = fit_many(noisy_pair, data(), kl_weights=(1.0, 4.0), **options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i:02d}" for i in range(6)]
    for i, run in enumerate(runs):
        back = load_run(tmp_path / "out" / f"{i:02d}")
        assert equal(values(back), values(run)) and back.config == run.config
        assert back.history == run.history and back.best_epoch == run.best_epoch
        assert back.path == run.path


def test_runs_are_replaced_with_overwrite_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "output": tmp_path, "seeds": (0, 1), **QUIET}
    fit_many(noisy_pair, data(), **options)
    before = (tmp_path / "01" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"^output: .* holds runs; set overwrite"):
        fit_many(noisy_pair, data(), **options)
    with pytest.raises(FileExistsError, match=r"^output: .* holds 01, which is none of these 1 runs"):
        fit_many(noisy_pair, data(), **(options | {"seeds": (0,), "overwrite": True}))
    assert (tmp_path / "01" / "model.safetensors").read_bytes() == before
    fit_many(noisy_pair, data(), **(options | {"seeds": (2, 3), "overwrite": True}))
    assert load_run(tmp_path / "01").config["seed"] == 3
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"^output: .* holds notes.txt"):
        fit_many(noisy_pair, data(), **(options | {"overwrite": True}))
    with pytest.raises(FileExistsError, match=r"^output: expected a folder, .* is a file"):
        fit_many(noisy_pair, data(), **(options | {"output": tmp_path / "notes.txt"}))


def test_a_member_is_not_resumed_by_fit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"seeds": (0,), "epochs": 2, **QUIET}
    (run,) = fit_many(delta_pair, data(), output=tmp_path, **options)
    before = {file.name: file.read_bytes() for file in (tmp_path / "00").iterdir()}
    alike: dict[str, Any] = {"elbo": KL_ELBO(), "epochs": 2, **QUIET}
    what = r"^resume: the run in .*00 is one of fit_many, which saves no state to go on from$"
    with pytest.raises(ValueError, match=what):
        fit(run.model, run.guide, data(), output=tmp_path / "00", resume=True, **alike)
    assert {file.name: file.read_bytes() for file in (tmp_path / "00").iterdir()} == before


def test_progress_shows_means_over_members(capsys: pytest.CaptureFixture[str]) -> None:
    runs = fit_many(delta_pair, data(), seeds=(0, 1), epochs=2, batch_size=20)
    shown = capsys.readouterr().err
    mean = sum(run.history[-1]["train_elbo"] for run in runs) / 2
    assert "epoch 2/2" in shown and "6/6" in shown and f"elbo {mean:.2f}" in shown


# -- what ends it -------------------------------------------------------------------------------------


class Interrupting(Stream):
    """Ready batches; Ctrl-C comes in the pass after ``passes`` whole ones."""

    def __init__(self, x: Tensor, passes: int) -> None:
        super().__init__(x, 20)
        self.passes = passes

    def __iter__(self) -> Any:
        for i, batch in enumerate(super().__iter__()):
            if self.passes < 0 and i == 1:
                raise KeyboardInterrupt
            yield batch
        self.passes -= 1


def test_interrupt_gives_the_runs_of_the_last_finished_epoch(tmp_path: Path) -> None:
    x = data()
    # the checks before the start take no whole pass
    with pytest.warns(UserWarning, match=r"interrupted: 2 of 5 epochs finished; saved in"):
        runs = fit_many(noisy_pair, Interrupting(x, 1), epochs=5, output=tmp_path, progress=False)
    whole = fit_many(noisy_pair, Stream(x, 20), epochs=2, progress=False)
    for i, (run, other) in enumerate(zip(runs, whole, strict=True)):
        assert run.interrupted and len(run.history) == run.best_epoch == 2
        assert equal(values(run), values(other))
        assert equal(values(load_run(tmp_path / f"{i:02d}")), values(other))


class Stopping(DeltaGuide):
    """Ctrl-C comes in the run of a program, inside of the vectorised step."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Stopping.calls += 1
        if Stopping.calls == 30:
            raise KeyboardInterrupt
        return super().forward(x)


def test_interrupt_within_a_step_leaves_nothing_behind() -> None:
    def make() -> Pair:
        return LinearGaussian(2, 5).double(), Stopping().double()

    Stopping.calls = 0
    with pytest.warns(UserWarning, match="interrupted: [1-9] of 20"):
        stopped = fit_many(make, data(), epochs=20, **QUIET)
    whole = fit_many(make, data(), epochs=len(stopped[0].history), **QUIET)
    for run, other in zip(stopped, whole, strict=True):
        assert equal(values(run), values(other)) and run.interrupted and not other.interrupted


def test_interrupt_while_saving_leaves_whole_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = saving.write_history, []

    def interrupting(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:  # of the second epoch, the second of three members
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(saving, "write_history", interrupting)
    with pytest.warns(UserWarning, match="interrupted: 2 of 4"):
        runs = fit_many(noisy_pair, data(), epochs=4, output=tmp_path, **QUIET)
    for i, run in enumerate(runs):
        back = load_run(tmp_path / f"{i:02d}")
        assert equal(values(back), values(run)) and len(back.history) == len(run.history) == 2


def breaking(step: Tensor) -> Tensor:
    return torch.where(step >= 4, torch.inf, 1.0)


def test_a_loss_that_is_no_number_names_its_member_and_keeps_the_saved_epochs(tmp_path: Path) -> None:
    what = (
        r"the loss of the member of seed 1, kl_weight .*breaking.* became inf in epoch 2, step 2; .*epoch 1"
    )
    options: dict[str, Any] = {"seeds": (1,), "kl_weights": (1.0, breaking), **QUIET}
    with pytest.raises(FloatingPointError, match=what):
        fit_many(noisy_pair, data(), epochs=3, output=tmp_path / "out", **options)
    good = fit_many(noisy_pair, data(), seeds=(1,), kl_weights=(1.0, 1.0), epochs=1, **QUIET)
    for i, run in enumerate(good):
        back = load_run(tmp_path / "out" / f"{i:02d}")
        assert len(back.history) == 1 and equal(values(back), values(run))
    with pytest.raises(FloatingPointError, match="epoch 1, step 1"):
        fit_many(noisy_pair, data(), kl_weights=(1e308,), output=tmp_path / "new", **QUIET)
    assert not (tmp_path / "new").exists()


# -- what it refuses ----------------------------------------------------------------------------------


def function_pair() -> Any:
    return (lambda x: None), (lambda x: None)


class Reading(DeltaGuide):
    """Decides by the value of a parameter."""

    def forward(self, x: Tensor) -> Tensor:
        if self.net.output_bias.sum() > 1e6:
            x = -x
        return super().forward(x)


class Counting(DeltaGuide):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return super().forward(x)


class Coupled(torch.optim.SGD):
    """SGD by the sign of the sum of all gradients."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad.sum().sign() * torch.ones_like(p)
        super().step()


def one_pair() -> Callable[[], Pair]:
    pair = noisy_pair()
    return lambda: pair


def growing() -> Callable[[], Pair]:
    sizes = iter((4, 5, 6))
    return lambda: (LinearGaussian(2, 5).double(), MeanFieldGuide(MLP(5, hidden=next(sizes)), 2).double())


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        (
            {"make": function_pair},
            TypeError,
            "^make: expected a function that returns a pair .* `fit` in a loop",
        ),
        ({"make": lambda: noisy_pair()[0]}, TypeError, "^make: expected a function that returns a pair"),
        ({"make": one_pair}, ValueError, "^make: expected a fresh pair"),
        ({"make": growing}, ValueError, "^make: expected pairs of one structure, got guide.encoder"),
        (
            {"make": lambda: (LinearGaussian(2, 5).double(), Reading().double())},
            ValueError,
            r"^make: .* torch.func.vmap .*test_fit_many.py:\d+ \(if self.net.output_bias.* `fit` in a loop",
        ),
        (
            {"make": lambda: (LinearGaussian(2, 5).double(), Counting().double())},
            ValueError,
            "^make: .* in the place of guide.count; use `fit` in a loop",
        ),
        ({"seeds": ()}, TypeError, "^seeds: expected a sequence"),
        ({"seeds": 3}, TypeError, "^seeds: expected a sequence"),
        ({"seeds": (0, -1)}, ValueError, "^seeds: expected a whole number"),
        ({"kl_weights": ()}, TypeError, "^kl_weights: expected a sequence"),
        ({"kl_weights": 2.0}, TypeError, "^kl_weights: expected a sequence"),
        ({"kl_weights": (1.0, -1.0)}, ValueError, r"^kl_weights\[1\]: expected a finite number from 0"),
        ({"kl_weights": (1.0,), "elbo": Trace_ELBO()}, ValueError, r"^elbo: .*KL_ELBO\(\), got Trace_ELBO"),
        ({"kl_weights": (1.0,), "elbo": ESTIMATORS["DIP_ELBO"]()}, ValueError, "^elbo: .*got DIP_ELBO"),
        ({"elbo": RenyiELBO(num_particles=2)}, ValueError, "^elbo: .*differentiable loss.*got RenyiELBO"),
        ({"elbo": TraceTailAdaptive_ELBO(num_particles=2)}, ValueError, "^elbo: .*got TraceTailAdaptive"),
        ({"elbo": KL_ELBO}, TypeError, "^elbo: expected an instance"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "^optimizer: .*LBFGS, which needs a closure"),
        ({"optimizer": torch.optim.Adafactor}, ValueError, "^optimizer: .* alone, .*got Adafactor"),
        ({"optimizer": Coupled}, ValueError, "^optimizer: .*got Coupled"),
        ({"optimizer": 3}, ValueError, "^optimizer: 3 can't be made"),
        ({"optimizer": lambda groups: None}, TypeError, "^optimizer: expected it to make"),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=1.0)},
            ValueError,
            "^optimizer: .*learning_rate",
        ),
        ({"learning_rate": 0.0}, ValueError, "^learning_rate: "),
        ({"epochs": 0}, ValueError, "^epochs: "),
        ({"batch_size": 2.5}, TypeError, "^batch_size: "),
        ({"clip_norm": -1.0}, ValueError, "^clip_norm: "),
        ({"device": "nowhere"}, ValueError, "^device: "),
        ({"data": data()[:, :4]}, ValueError, "^data: |^x: "),
        ({"validation": data() * torch.nan}, ValueError, "^validation: "),
    ],
    ids=lambda value: None if callable(value) else ",".join(value) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_said_before_any_work(
    options: dict[str, Any], kind: type[Exception], match: str, tmp_path: Path
) -> None:
    options = {"make": noisy_pair, "data": data(), **QUIET} | options
    make, x = options.pop("make"), options.pop("data")
    if make in (one_pair, growing):
        make = make()
    with pytest.raises(kind, match=match) as caught:
        fit_many(make, x, output=tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# -- the compiled step --------------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [KL_ELBO(), KL_ELBO(kl_weight=LinearWarmup(5)), Trace_ELBO()])
def test_the_traced_step_makes_the_same_draws_and_steps(elbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compile_graph", lambda graph, inputs: graph)
    options: dict[str, Any] = {"elbo": elbo, "epochs": 2, "validation": data(9, seed=1), **QUIET}

    def make() -> Pair:
        return LinearGaussian(2, 5).double(), MeanFieldGuide(
            MLP(5, hidden=4, normalization="batch"), 2
        ).double()

    plain = fit_many(make, data(), clip_norm=0.5, **options)
    traced = fit_many(make, data(), clip_norm=0.5, compile=True, **options)
    for a, b in zip(plain, traced, strict=True):
        assert_alike(b, a)


@pytest.mark.inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's own, on its way to a compiler
def test_the_compiled_step_makes_the_same_draws_and_steps() -> None:
    def make() -> Pair:
        return LinearGaussian(2, 5).double(), MeanFieldGuide(nn.Identity(), 2, features=5).double()

    options: dict[str, Any] = {"kl_weights": (0.5, 2.0), "epochs": 2, "batch_size": 25, "progress": False}
    with warnings.catch_warnings(record=True) as warned:
        compiled = fit_many(make, data(), compile=True, **options)
    assert not [w for w in warned if "compile: " in str(w.message)]
    for a, b in zip(fit_many(make, data(), **options), compiled, strict=True):
        assert_alike(b, a)


class Weighing(DeltaGuide):
    """Reads a value of the data, which all members share."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1.0 if x.sum().item() > -1e6 else 2.0))


def test_a_step_that_cannot_be_compiled_runs_as_it_is_with_one_warning() -> None:
    def make() -> Pair:
        return LinearGaussian(2, 5).double(), Weighing().double()

    with pytest.warns(UserWarning, match=re.escape("compile: can't compile the step, at ")) as warned:
        runs = fit_many(make, data(), epochs=2, compile=True, **QUIET)
    assert len(warned) == 1
    for run, other in zip(runs, fit_many(make, data(), epochs=2, **QUIET), strict=True):
        assert equal(values(run), values(other))
