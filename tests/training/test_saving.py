"""Tests of saved runs: what comes back, and what a folder from a stranger or a damaged one can't do."""

import collections
import csv
import json
import math
import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyro.util import get_rng_state
from torch import Tensor, nn

import ppl_vae
from ppl_vae import fit, load_run
from ppl_vae.data import Split
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli, ContinuousBernoulli, Normal
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal
from ppl_vae.training import saving

QUIET: dict[str, Any] = {"progress": False, "batch_size": 20}


def linear_pair(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return LinearGaussian(2, 5), MeanFieldGuide(MLP(5, hidden=(6,), normalization="batch"), 2)


def linear_data(n: int = 40) -> Tensor:
    torch.manual_seed(100)
    return LinearGaussian(2, 5, scale=0.5)(None, size=n).detach()


def images() -> Tensor:
    torch.manual_seed(100)
    return (torch.rand(40, 1, 6, 7) > 0.5).float()


def values(*programs: nn.Module) -> dict[str, Tensor]:
    return {f"{i}.{k}": v.clone() for i, p in enumerate(programs) for k, v in p.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a run of library classes over two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(*linear_pair(), linear_data(), validation=linear_data(10), epochs=2, output=folder, **QUIET)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    """Return a folder of its own with that run."""
    for name, content in saved.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, state)
    safetensors.torch.save_file(tensors, path, {"state": json.dumps(state)})


def refuses(folder: Path, kind: type[Exception], match: str, **options: Any) -> None:
    """Check that the folder is refused with one line."""
    with pytest.raises(kind, match=match) as caught:
        load_run(folder, **options)
    assert type(caught.value) is kind and "\n" not in str(caught.value) and len(str(caught.value)) < 600


# -- what comes back ---------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "linear": linear_pair,
    "mlp": lambda: (
        VAE(StandardNormal(3), Bernoulli(MLP(3, (1, 6, 7), hidden=[4, 5], activation="tanh", init="xavier"))),
        MeanFieldGuide(MLP((1, 6, 7), hidden=(4,), dropout=0.2, normalization="layer"), 3),
    ),
    "conv": lambda: (
        VAE(
            StandardNormal(2),
            ContinuousBernoulli(ConvDecoder(2, (1, 6, 7), 8, (3, 2), normalization="batch")),
        ),
        MeanFieldGuide(ConvEncoder((1, 6, 7), 8, channels=(2, 3)), 2),
    ),
    "learned": lambda: (
        VAE(StandardNormal(2), Normal(MLP(2, (1, 6, 7), (4,)), "learned")),
        MeanFieldGuide(MLP((1, 6, 7), hidden=(4,)), 2, features=4),
    ),
    "network": lambda: (
        VAE(StandardNormal(2), Normal(MLP(2, (2, 6, 7), (4,)), scale="network")),
        MeanFieldGuide(MLP((1, 6, 7), hidden=4), 2),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_of_library_classes_comes_back_from_its_folder_alone(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pair = tuple(program.to(dtype) for program in PAIRS[name]())
    x = (linear_data() if name == "linear" else images()).to(dtype)
    run = fit(*pair, x, validation=x[:10], epochs=2, output=tmp_path / "run", **QUIET)
    back = load_run(str(tmp_path / "run"))
    assert equal(values(back.model, back.guide), values(run.model, run.guide))
    assert repr(back.model) == repr(run.model) and repr(back.guide) == repr(run.guide)
    assert back.history == run.history and back.best_epoch == run.best_epoch
    assert back.config == run.config and back.path == run.path and not back.interrupted
    assert all(type(record["epoch"]) is int for record in back.history)
    assert torch.equal(back.model(None, size=2).new_zeros(1), run.model(None, size=2).new_zeros(1))


def test_the_folder_has_plain_files_alone(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == set(saving.FILES)
    rows = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]


def test_the_settings_hold_all_that_a_run_hangs_on(tmp_path: Path) -> None:
    import functools

    from torch.optim.lr_scheduler import StepLR

    fit(
        *linear_pair(),
        Split(linear_data().sigmoid(), dynamic=True, source={"name": "mine"}),
        validation=linear_data(10).sigmoid().round(),
        optimizer=functools.partial(torch.optim.AdamW, weight_decay=0.25),
        learning_rate={"model": 1e-3, "guide": 1e-4},
        scheduler=functools.partial(StepLR, step_size=2),
        epochs=np.int64(1),
        batch_size=np.int64(20),
        clip_norm=np.float32(0.5),
        patience=3,
        seed=7,
        output=tmp_path,
        progress=False,
    )
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["versions"].keys() == {"python", "ppl-vae", "torch", "pyro-ppl"}
    assert str(torch.__version__).startswith(config["versions"]["torch"])
    assert config["versions"]["ppl-vae"] == ppl_vae.__version__
    assert config["model"] == {"class": "LinearGaussian", "latent_dim": 2, "data_dim": 5, "scale": 1.0}
    assert config["guide"]["encoder"]["class"] == "MLP" and config["guide"]["encoder"]["hidden"] == [6]
    assert config["elbo"]["class"].endswith("Trace_ELBO") and config["elbo"]["num_particles"] == 1
    assert config["optimizer"] == {"class": "torch.optim.adamw.AdamW", "weight_decay": 0.25}
    assert config["scheduler"] == {"class": "torch.optim.lr_scheduler.StepLR", "step_size": 2}
    expected = {"epochs": 1, "batch_size": 20, "clip_norm": 0.5, "patience": 3, "seed": 7, "device": "cpu"}
    assert {key: config[key] for key in expected} == expected
    assert config["learning_rate"] == {"model": 1e-3, "guide": 1e-4}
    assert config["data"]["source"] == {"name": "mine"} and config["data"]["dynamic"] is True
    assert config["data"]["size"] == 40 and config["validation"]["size"] == 10


def test_the_model_is_the_best_one_and_the_checkpoint_the_last(tmp_path: Path) -> None:
    """SGD at a wild rate: validation gets worse at some epoch, on which the run ends."""
    worse = []

    def stop_when_worse(run: ppl_vae.training.Run) -> bool:
        worse.append(values(run.model, run.guide))
        return run.history[-1]["validation_elbo"] < max(r["validation_elbo"] for r in run.history)

    x = linear_data()
    run = fit(
        *linear_pair(),
        x + 3,
        validation=x,
        learning_rate=0.1,
        epochs=50,
        callbacks=[stop_when_worse],
        output=tmp_path,
        **QUIET,
    )
    assert run.best_epoch == len(run.history) - 1
    back = load_run(tmp_path)
    assert equal(values(back.model, back.guide), worse[-2]) and back.best_epoch == run.best_epoch
    last, state = saving.read_tensors(tmp_path / "checkpoint.safetensors")
    assert state["epoch"] == len(run.history)
    for role, program in (("model", "0."), ("guide", "1.")):
        for name, value in worse[-1].items():
            if name.startswith(program):
                assert torch.equal(last[f"{role}.{name.removeprefix(program)}"], value)


def test_the_history_comes_back_float_for_float(tmp_path: Path) -> None:
    records: list[Any] = [
        {"epoch": 1, "train_elbo": -1 / 3, "learning_rate": 1e-3},
        {"epoch": 2, "train_elbo": -math.inf, "learning_rate_0": 5e-324, "learning_rate_1": 1.7e308},
    ]
    saving.write_history(tmp_path, records)
    assert saving.read_history(tmp_path) == records


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_any_float_survives_the_history(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("history")
    records: list[Any] = [{"epoch": i, "elbo": number} for i, number in enumerate(numbers, 1)]
    saving.write_history(folder, records)
    assert saving.read_history(folder) == records


class Mine(nn.Module):
    """A user's model around a library network, with arguments of several kinds."""

    def __init__(self, decoder: nn.Module, scale: float = 1.0, *, sizes: tuple[int, ...] = (2, 3)) -> None:
        super().__init__()
        self.decoder, self.scale, self.sizes = decoder, scale, sizes
        self.shift = nn.Parameter(torch.zeros(5))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.decoder(z) + self.shift
            return pyro.sample("x", dist.Normal(mean, self.scale).to_event(1), obs=x)


class Forgetful(Mine):
    """A user's model that doesn't keep an argument."""

    def __init__(self, width: int) -> None:
        super().__init__(MLP(2, 5, (width,)))


def mine(seed: int = 0) -> tuple[Mine, MeanFieldGuide]:
    torch.manual_seed(seed)
    return Mine(MLP(2, 5, (4,)), 0.5, sizes=(7,)), MeanFieldGuide(MLP(5, hidden=(6,)), 2)


def test_a_users_class_comes_back_when_it_is_passed(tmp_path: Path) -> None:
    run = fit(*mine(), linear_data(), epochs=1, output=tmp_path, **QUIET)
    back = load_run(tmp_path, classes=[Mine])
    assert type(back.model) is Mine and back.model.scale == 0.5 and tuple(back.model.sizes) == (7,)
    assert equal(values(back.model, back.guide), values(run.model, run.guide))
    refuses(tmp_path, ValueError, r"^model: was made by '.*Mine', .*no class of the library.*`classes=`")
    refuses(tmp_path, ValueError, "^model: was made by", classes=[Forgetful])


def test_a_users_class_that_keeps_no_arguments_is_named(tmp_path: Path) -> None:
    guide = mine()[1]
    run = fit(Forgetful(4), guide, linear_data(), epochs=1, output=tmp_path, **QUIET)
    refuses(tmp_path, ValueError, r"^model: .*Forgetful can't be built: .*'width'", classes=[Forgetful])
    back = load_run(tmp_path, model=Forgetful(4))
    assert equal(values(back.model, back.guide), values(run.model, run.guide))


def test_instances_that_are_passed_are_filled(tmp_path: Path) -> None:
    run = fit(*mine(), linear_data(), epochs=1, output=tmp_path, **QUIET)
    model, guide = mine(seed=1)
    back = load_run(tmp_path, model=model, guide=guide)
    assert back.model is model and back.guide is guide
    assert equal(values(model, guide), values(run.model, run.guide))
    wide = Mine(MLP(2, 5, (9,)))
    before = values(wide)
    refuses(tmp_path, ValueError, r"model\.safetensors: decoder\.\S+ is .* expected .*9", model=wide)
    assert equal(values(wide), before)


def test_arguments_that_are_no_plain_data_need_the_instance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mine(nn.Sequential(nn.Linear(2, 5)), 0.5, sizes=torch.ones(2))  # type: ignore[arg-type]
    fit(model, mine()[1], linear_data(), epochs=1, output=tmp_path, **QUIET)
    refuses(tmp_path, ValueError, r"^model\.decoder: was made by 'torch.*Sequential'", classes=[Mine])
    refuses(
        tmp_path, ValueError, r"^model\.sizes: was made by 'torch\.Tensor'", classes=[Mine, nn.Sequential]
    )
    assert torch.equal(load_run(tmp_path, model=model).model.shift, model.shift)


def functions(
    seed: int, width: int = 6, *, positive: bool = False
) -> tuple[Callable, Callable, nn.ModuleDict]:
    """Return plain functions whose networks have parameters and batch norm's buffers."""
    torch.manual_seed(seed)
    nets = nn.ModuleDict(
        {
            "decoder": nn.Sequential(
                nn.Linear(2, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 5)
            ),
            "encoder": nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 2)),
        }
    )

    def model(x: Tensor) -> None:
        pyro.module("decoder", nets["decoder"])
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = nets["decoder"](z.reshape(-1, 2)).reshape(*z.shape[:-1], 5)
            of_x = dist.Gamma(mean.exp(), 1.0) if positive else dist.Normal(mean, 1.0)
            pyro.sample("x", of_x.to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", nets["encoder"])
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(nets["encoder"](x), 0.5).to_event(1))

    return model, guide, nets


@pytest.mark.parametrize("positive", [False, True])
def test_the_networks_of_plain_functions_come_back(tmp_path: Path, positive: bool) -> None:
    """Buffers too; and a model of positive data is filled although zeros are none that it can observe."""
    model, guide, nets = functions(0, positive=positive)
    x = linear_data().exp()
    fit(model, guide, x, epochs=2, output=tmp_path, **QUIET)
    assert float(nets["encoder"][0].running_mean.abs().min()) > 0
    other_model, other_guide, other = functions(1, positive=positive)
    before = {name: module.training for name, module in other.named_modules()}
    back = load_run(tmp_path, model=other_model, guide=other_guide)
    assert back.model is other_model and back.guide is other_guide and len(back.history) == 2
    assert equal(values(other), values(nets))
    assert {name: module.training for name, module in other.named_modules()} == before


def test_plain_functions_must_be_passed_and_must_fit(tmp_path: Path) -> None:
    model, guide, _ = functions(0)
    fit(model, guide, linear_data(), epochs=1, output=tmp_path, **QUIET)
    refuses(tmp_path, ValueError, r"^model: was the function '.*model'.* pass it as `model=`")
    refuses(tmp_path, ValueError, r"^guide: was the function '.*guide'.* pass it as `guide=`", model=model)
    wide_model, wide_guide, _ = functions(1, width=9)
    refuses(tmp_path, ValueError, r"model\.safetensors: .*expected.*9", model=wide_model, guide=wide_guide)


def test_a_function_beside_a_library_class_comes_back(tmp_path: Path) -> None:
    model, _, nets = functions(0)
    run = fit(model, linear_pair()[1], linear_data(), epochs=1, output=tmp_path, **QUIET)
    other_model, _, other = functions(1)
    back = load_run(tmp_path, model=other_model)
    assert equal(values(other["decoder"]), values(nets["decoder"]))
    assert equal(values(back.guide), values(run.guide))


def test_library_programs_inside_plain_functions_come_back(tmp_path: Path) -> None:
    """Each library program has a number of its own in Pyro's store, which no file may hang on."""

    def wrapped(seed: int) -> tuple[Callable, Callable, nn.ModuleList]:
        pairs = [linear_pair(seed), linear_pair(seed + 1)]

        def model(x: Tensor) -> None:
            pairs[0][0](x)

        def guide(x: Tensor) -> None:
            pairs[0][1](x)

        return model, guide, nn.ModuleList(pairs[0])

    model, guide, programs = wrapped(0)
    fit(model, guide, linear_data(), epochs=1, output=tmp_path, **QUIET)
    other_model, other_guide, other = wrapped(5)
    load_run(tmp_path, model=other_model, guide=other_guide)
    assert equal(values(other), values(programs))


def test_loading_leaves_random_streams_and_parameter_store(folder: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), get_rng_state()["numpy"][1].tolist()
    store = list(pyro.get_param_store())
    load_run(folder)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), get_rng_state()["numpy"][1].tolist()) == before[1:]
    assert list(pyro.get_param_store()) == store


def test_a_loaded_run_trains_on(folder: Path) -> None:
    back = load_run(folder)
    run = fit(back.model, back.guide, linear_data(), epochs=1, **QUIET)
    assert len(run.history) == 1


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    refuses(folder, ValueError, "^device: .*got 'cuda:99'", device="cuda:99")
    refuses(folder, ValueError, "^device: .*got 'tpu'", device="tpu")


# -- what no folder can do ---------------------------------------------------------------------------


def test_no_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pickle was loaded")

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    options = {"validation": linear_data(10), "output": tmp_path, **QUIET}
    fit(*linear_pair(), linear_data(), epochs=1, **options)
    run = fit(*linear_pair(), linear_data(), epochs=2, resume=True, **options)
    assert len(run.history) == 2 and load_run(tmp_path).history == run.history


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "stranger.Model",
        "torch.nn.modules.linear.Linear",
        "torch.hub.load",
        "ppl_vae.training.fit.fit",
        "ppl_vae.models.vae.VAE",
        "__main__.Model",
        "../stranger.py:Model",
        ["os.system"],
        {"class": "os.system"},
        None,
        7,
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["model", "guide", "guide.encoder", "guide.latent_dim"])
def test_a_folder_that_names_what_is_not_the_librarys_imports_nothing(
    folder: Path, path: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "stranger.py").write_text("raise SystemExit('imported')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)

    def name_it(config: dict[str, Any]) -> None:
        *outer, last = place.split(".")
        inner = config
        for key in outer:
            inner = inner[key]
        inner[last] = {"class": path, "command": "touch executed", "latent_dim": 2}

    change_config(folder, name_it)
    modules = set(sys.modules)
    refuses(folder, ValueError, f"^{place}: was made by .*no class of the library")
    assert set(sys.modules) == modules and not (folder / "executed").exists()


@pytest.mark.parametrize("path", ["os.system", "stranger.make"])
def test_a_folder_that_names_a_function_calls_nothing(folder: Path, path: str) -> None:
    change_config(folder, lambda config: config.update(model={"function": path, "command": "touch executed"}))
    modules = set(sys.modules)
    refuses(folder, ValueError, f"^model: was the function '{path}'")
    assert set(sys.modules) == modules


YAMLS = {
    "object": "!!python/object/apply:os.system ['touch executed']",
    "name": "model: !!python/name:os.system",
    "module": "model: !!python/module:this",
    "new": "model: !!python/object/new:subprocess.Popen [['touch', 'executed']]",
    "bomb": "a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b]",
    "merge": "a: &a {x: 1}\nmodel:\n  <<: *a",
    "itself": "a: &a [*a]",
    "deep": "[" * 5000 + "]" * 5000,
    "deep mapping": "{a: " * 5000 + "}" * 5000,
    "digits": "seed: " + "9" * 10_000,
    "date": "seed: 2020-13-45",
    "garbage": "\x00\x01\x02",
    "tab": "model:\n\t- x",
    "unclosed": "model: {class: 'VAE",
    "list": "- model\n- guide",
    "text": "model",
    "nothing": "",
    "number": "3",
    "other format": "format: 99\nmodel: {}\nguide: {}\ndata: {}",
    "no format": "model: {}\nguide: {}\ndata: {}",
    "no guide": "format: 1\nmodel: {}\ndata: {}",
    "model of text": "format: 1\nmodel: VAE\nguide: {}\ndata: {}",
    "large": "x: " + "y" * (1 << 20),
    "unhashable key": "? [a, {b: c}]\n: d",
}


@pytest.mark.parametrize("name", YAMLS)
def test_malformed_and_hostile_settings_are_refused_at_once(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "config.yaml").write_text(YAMLS[name])
    modules, start = set(sys.modules), time.perf_counter()
    reason = "aliases are not allowed" if name in ("bomb", "merge", "itself") else ""
    refuses(folder, ValueError, rf"config\.yaml: .*{reason}")
    assert time.perf_counter() - start < 5
    assert set(sys.modules) == modules and not (folder / "executed").exists()


def test_settings_of_no_text_are_refused(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(bytes(range(128, 256)) * 10)
    refuses(folder, ValueError, r"config\.yaml: malformed YAML: ")


HUGE = 1_000_000_000


@pytest.mark.parametrize(
    ("place", "size"),
    [
        ("model.latent_dim", HUGE),
        ("model.data_dim", HUGE),
        ("guide.latent_dim", HUGE),
        ("guide.encoder.in_shape", HUGE),
        ("guide.encoder.in_shape", [HUGE, HUGE, HUGE]),
        ("guide.encoder.hidden", [HUGE, HUGE]),
        ("guide.latent_dim", 10**30),
        ("guide.encoder.hidden", [10**30]),
        ("guide.encoder.hidden", [1] * 5000),
        ("model.data_dim", -5),
        ("model.data_dim", 2.5),
        ("model.data_dim", "5"),
        ("model.data_dim", True),
        ("model.data_dim", [5]),
        ("model.scale", "wide"),
        ("model.scale", -1.0),
        ("guide.encoder", 3),
        ("guide.encoder", None),
        ("guide.encoder.activation", "__class__"),
        ("guide.encoder.unknown", 1),
    ],
    ids=lambda value: str(value)[:30],
)
def test_sizes_that_do_not_fit_the_file_are_refused_before_anything_is_allocated(
    folder: Path, place: str, size: Any
) -> None:
    def set_size(config: dict[str, Any]) -> None:
        *outer, last = place.split(".")
        for key in outer:
            config = config[key]
        config[last] = size

    change_config(folder, set_size)
    start, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(folder, ValueError, rf"^{place.split('.')[0]}|model\.safetensors: ")
    assert time.perf_counter() - start < 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # KiB
    assert grown < 200 * 1024


@pytest.mark.parametrize(
    "batch",
    [
        [[[1, HUGE, 1000], "float32"]],
        [[[1, HUGE], "float32"]],
        [[[-1, 5], "float32"]],
        [[[1, 5], "load"]],
        [[[1, 5], 7]],
        [[["a"], "float32"]],
        [[[1, 1e400], "float32"]],
        [[1, 5]],
        "batch",
        None,
    ],
    ids=lambda value: str(value)[:30],
)
def test_shapes_of_a_batch_that_can_not_be_are_refused(tmp_path: Path, batch: Any) -> None:
    model, guide, _ = functions(0)
    fit(model, guide, linear_data(), epochs=1, output=tmp_path, **QUIET)
    change_config(tmp_path, lambda config: config["data"].update(batch=batch))
    refuses(tmp_path, ValueError, r"config\.yaml: expected data\.batch", model=model, guide=guide)


# -- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.yaml", "model.safetensors"])
@pytest.mark.parametrize("instead", ["nothing", "a folder"])
def test_missing_files_are_named(folder: Path, missing: str, instead: str) -> None:
    (folder / missing).unlink()
    if instead == "a folder":
        (folder / missing).mkdir()
    refuses(folder, FileNotFoundError, rf"{folder}.*{missing}")


def test_a_folder_that_is_not_there_or_no_run_is_named(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", FileNotFoundError, r"nowhere: expected the folder of a saved run")
    refuses(tmp_path, FileNotFoundError, r"expected the folder of a saved run, found no config\.yaml")
    (tmp_path / "file").write_text("text")
    refuses(tmp_path / "file", FileNotFoundError, "file: expected the folder of a saved run")


def test_history_and_checkpoint_may_be_missing(folder: Path) -> None:
    (folder / "history.csv").unlink()
    (folder / "checkpoint.safetensors").unlink()
    assert load_run(folder).history == []


def test_a_truncated_file_of_tensors_is_refused_wherever_it_ends(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for end in [0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:end])
        refuses(folder, ValueError, r"model\.safetensors: ")


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100,
        b"\xff" * 100,
        b"PK\x03\x04" + b"\x00" * 60,
        b"\x80\x04\x95garbage.",
        b"{}",
        bytes(range(256)),
    ],
    ids=["zeros", "ones", "zip", "pickle", "json", "all"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_garbage_is_refused(folder: Path, content: bytes, name: str) -> None:
    (folder / name).write_bytes(content)
    refuses(folder, ValueError, f"{name}: ")


def bad_tensors(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], object]:
    weight = "guide.head.weight"
    changes: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
        "nan": lambda t, s: t[weight].view(-1)[3:4].fill_(math.nan),
        "infinite": lambda t, s: t[weight].view(-1)[3:4].fill_(math.inf),
        "shape": lambda t, s: t.update({weight: t[weight][:, :-1].contiguous()}),
        "transposed": lambda t, s: t.update({weight: t[weight].T.contiguous()}),
        "integers": lambda t, s: t.update({weight: t[weight].long()}),
        "missing": lambda t, s: t.pop(weight),
        "unknown": lambda t, s: t.update({"guide.other": torch.zeros(1)}),
        "other program": lambda t, s: t.update({"optimizer.other": torch.zeros(1)}),
        "empty": lambda t, s: t.clear(),
    }
    return changes[name]


@pytest.mark.parametrize(
    "name",
    ["nan", "infinite", "shape", "transposed", "integers", "missing", "unknown", "other program", "empty"],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, name: str) -> None:
    change_tensors(folder / "model.safetensors", bad_tensors(name))
    refuses(folder, ValueError, r"model\.safetensors: ")


@pytest.mark.parametrize(
    "state", [None, [], {}, {"epoch": "2"}, {"epoch": None}, {"epoch": 1.5}, {"epoch": True}, {"epoch": -1}]
)
def test_a_header_without_the_epoch_is_refused(folder: Path, state: Any) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"state": json.dumps(state)})
    refuses(folder, ValueError, r"model\.safetensors: expected the epoch in its header")


@pytest.mark.parametrize(
    "metadata", [None, {"state": "{"}, {"state": "9" * 10_000}, {"state": "[" * 100_000}]
)
def test_a_header_of_no_json_is_refused(folder: Path, metadata: Any) -> None:
    path = folder / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    refuses(folder, ValueError, r"model\.safetensors: ")


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,elbo\n1,abc\n",
        b"epoch,elbo\none,2\n",
        b"epoch,elbo\n1\n",
        b"epoch,elbo\n1,2,3\n",
        b"elbo\n1\n",
        b"epoch,elbo\ninf,1\n",
        b"epoch,elbo\nnan,1\n",
        b"epoch,elbo\n1,\x00\n",
        b"epoch,elbo\n1," + b"9" * 200_000 + b"\n",
        bytes(range(256)) * 4,
        b"epoch,elbo\n1,\xff\xfe\n",
    ],
    ids=["text", "epoch", "short", "long", "no-epoch", "inf", "nan", "null", "wide", "binary", "no-utf8"],
)
def test_a_damaged_history_is_refused(folder: Path, content: bytes) -> None:
    (folder / "history.csv").write_bytes(content)
    refuses(folder, ValueError, r"history\.csv: damaged history: ")


def test_random_damage_is_refused_or_harmless(folder: Path, saved: dict[str, bytes]) -> None:
    """Whatever bytes are flipped, cut or inserted, loading ends with a run or with one of its own errors."""
    generator = random.Random(0)
    messages: list[str] = []
    for i in range(150):
        name = ("config.yaml", "model.safetensors", "history.csv")[i % 3]
        content = bytearray(saved[name])
        for _ in range(generator.choice([1, 1, 4])):
            # half of the damage is near the start, where the headers are
            place = generator.randrange(generator.choice([len(content), min(len(content), 900)]))
            kind = generator.randrange(3)
            if kind == 0:
                content[place] = generator.randrange(256)
            elif kind == 1:
                del content[place : place + generator.randrange(1, 30)]
            else:
                content[place:place] = generator.randbytes(generator.randrange(1, 8))
        (folder / name).write_bytes(content)
        try:
            run = load_run(folder)
        except (ValueError, FileNotFoundError) as error:
            messages.append(str(error))
        else:
            assert all(v.isfinite().all() for v in values(run.model, run.guide).values())
        (folder / name).write_bytes(saved[name])
    assert len(messages) > 75
    assert not [message for message in messages if "\n" in message or len(message) > 1000]


# -- damaged checkpoints -----------------------------------------------------------------------------


def resume(folder: Path, **options: Any) -> Any:
    settings = {"validation": linear_data(10), "epochs": 3, "resume": True, "output": folder}
    return fit(*linear_pair(), linear_data(), **settings | QUIET | options)


def test_the_run_resumes(folder: Path) -> None:
    assert len(resume(folder).history) == 3


def first_moment(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("exp_avg"))


CHECKPOINTS: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], object]] = {
    "no state": lambda t, s: s.clear(),
    "no optimizer": lambda t, s: s.update(optimizer=None),
    "optimizer of text": lambda t, s: s.update(optimizer="adam"),
    "optimizer of lists": lambda t, s: s.update(optimizer=[[], []]),
    "optimizer of other groups": lambda t, s: s["optimizer"]["items"][1].__setitem__(1, []),
    "no epoch": lambda t, s: s.pop("epoch"),
    "epoch of text": lambda t, s: s.update(epoch="2"),
    "epoch beyond the history": lambda t, s: s.update(epoch=7),
    "missing moment": lambda t, s: t.pop(first_moment(t)),
    "short moment": lambda t, s: t.update({first_moment(t): torch.zeros(1)}),
    "long moment": lambda t, s: t.update({first_moment(t): torch.zeros(10**6)}),
    "missing parameter": lambda t, s: t.pop("guide.head.weight"),
    "short parameter": lambda t, s: t.update({"guide.head.weight": torch.zeros(1)}),
    "nan parameter": lambda t, s: t["guide.head.weight"].fill_(math.nan),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(folder: Path, name: str) -> None:
    change_tensors(folder / "checkpoint.safetensors", CHECKPOINTS[name])
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.yaml"}
    with pytest.raises(ValueError, match=r"(checkpoint\.safetensors|history\.csv): ") as caught:
        resume(folder)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.yaml"} == before


@pytest.mark.parametrize(
    "name", ["checkpoint.safetensors", "model.safetensors", "history.csv", "config.yaml"]
)
def test_garbage_in_any_file_stops_resuming(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x00\xff garbage" * 20)
    with pytest.raises(ValueError, match=f"{name}: ") as caught:
        resume(folder)
    assert "\n" not in str(caught.value)


# -- the writing -------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    saving.write(path, b"old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(OSError, match="disk full"):
                saving.write(path, b"new")
        assert path.read_bytes() == b"old"
    saving.write(path, b"new")
    assert path.read_bytes() == b"new" and [file.name for file in tmp_path.iterdir()] == ["file"]


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
states = st.recursive(
    plain | st.just(torch.arange(3.0)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@given(states)
def test_nested_state_survives_json(state: Any) -> None:
    tensors: dict[str, Tensor] = {}
    flat = json.loads(json.dumps(saving.flatten(state, tensors, "state")))
    assert same(saving.unflatten(flat, tensors, state), state)


def test_mappings_and_tuples_take_the_types_of_the_fresh_state() -> None:
    state = {"milestones": collections.Counter([1, 4]), "betas": (0.9, 0.99), "plain": {"a": (1, 2)}}
    tensors: dict[str, Tensor] = {}
    flat = json.loads(json.dumps(saving.flatten(state, tensors, "state")))
    assert same(saving.unflatten(flat, tensors, state), state)


def test_state_that_is_no_plain_data_is_named() -> None:
    with pytest.raises(TypeError, match=r"^state\.a\.0: expected .* got <function"):
        saving.flatten({"a": [lambda: 0]}, {}, "state")


def test_a_run_shows_what_it_is(folder: Path) -> None:
    back = load_run(folder)
    shown = f"2 epochs, best_epoch={back.best_epoch}, path={str(folder)!r}"
    assert repr(back) == f"Run(LinearGaussian, MeanFieldGuide, {shown})"


def test_frozen_parameters_of_functions_are_saved(tmp_path: Path) -> None:
    def pair(bias: float) -> tuple[nn.Linear, Any, Any]:
        decoder, encoder = nn.Linear(2, 3), nn.Linear(3, 2)
        nn.init.constant_(decoder.bias, bias)
        decoder.bias.requires_grad_(False)

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder.eval())
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module("encoder", encoder)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

        return decoder, model, guide

    _, model, guide = pair(3.0)
    fit(model, guide, torch.randn(20, 3), epochs=1, output=tmp_path / "run", progress=False)
    decoder, model, guide = pair(-7.0)
    load_run(tmp_path / "run", model=model, guide=guide)
    assert decoder.bias.tolist() == [3.0, 3.0, 3.0]


def test_a_class_of_a_script_is_found_by_its_name(tmp_path: Path) -> None:
    class Scripted(MLP):
        pass

    Scripted.__module__, Scripted.__qualname__ = "__main__", "Scripted"
    model, guide = LinearGaussian(2, 3), MeanFieldGuide(Scripted(3), 2)
    fit(model, guide, torch.randn(20, 3), epochs=1, output=tmp_path / "run", progress=False)
    Scripted.__module__ = "mine"
    run = load_run(tmp_path / "run", classes=[Scripted])
    assert torch.equal(run.guide.head.weight, guide.head.weight)


def test_files_of_a_run_have_one_mode(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit(*linear_pair(), linear_data(), output=folder, epochs=1, progress=False)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
