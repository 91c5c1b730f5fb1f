"""``ppl-vae compare``: what it writes and prints, the names it takes, its line about bad input."""

import importlib
import inspect
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyro.infer
import pytest

from ppl_vae import infer
from ppl_vae.cli import main
from ppl_vae.cli.comparing import parse_estimators

comparing = importlib.import_module("ppl_vae.cli.comparing")
fitting = importlib.import_module("ppl_vae.cli.fitting")

NETS = "--latent_dim 2 --encoder.hidden 4 --decoder.hidden 4"
QUICK = "--repeats 3 --reference_repeats 4 --reference_particles 10 --size 5 --progress false"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 60 vectors of 6 bits and a run on them."""
    folder = tmp_path_factory.mktemp("home")
    np.savez(folder / "bits.npz", x=np.random.default_rng(0).integers(0, 2, (60, 6)).astype("f4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(fitting, "draw", lambda run, dataset: "none")
        line = f"fit --data bits.npz --epochs 1 --num_particles 2 {NETS} --output run --progress false"
        assert main(shlex.split(line)) == 0
    return folder


@pytest.fixture
def cli(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Result]:
    """Return ``ppl-vae compare`` in a copy of ``home``."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> Result:
        capsys.readouterr()
        code = main(["compare", *shlex.split(line)])
        return Result(code, *capsys.readouterr())

    return call


def tree() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


# What it does


def test_compares_on_a_saved_run(cli: Callable[[str], Result]) -> None:
    before = tree()
    result = cli(f"run --estimators 'trace, meanfield,IWAE(3),dreg,betatc' --num_particles 2 {QUICK}")
    assert (result.code, result.err) == (0, "")
    table = pd.read_csv("run/estimators.csv", index_col="estimator")
    assert list(table.index) == ["trace", "meanfield", "IWAE(3)", "dreg", "betatc"]
    assert table.particles.tolist() == [2, 2, 3, 2, 2]
    assert np.isfinite(table[["bound", "guide_snr", "seconds_per_step", "peak_memory_mib"]]).all().all()
    assert table.bound_bias.isna().tolist() == [False] * 4 + [True]
    assert table.guide_gradient_bias[["IWAE(3)", "betatc"]].isna().all()
    assert Path("run/estimators.png").read_bytes().startswith(b"\x89PNG")
    lines = result.out.splitlines()
    assert "3 gradients of each on 5 data" in lines[0]
    assert f"{table.bound['IWAE(3)']:.2f}" in next(line for line in lines if line.startswith("IWAE(3)"))
    assert lines[-2:] == ["table: run/estimators.csv", "plot: run/estimators.png"]
    after = tree()
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 2


def test_seed_size_and_split_choose_the_data(cli: Callable[[str], Result]) -> None:
    def table(options: str) -> pd.DataFrame:
        assert cli(f"run --estimators stl {QUICK} {options} --output here/and/there").code == 0
        found = pd.read_csv("here/and/there/estimators.csv", index_col="estimator")
        return found.drop(columns=["seconds_per_step"])

    first = table("--seed 1")
    assert table("--seed 1").equals(first)
    for other in ("--seed 2", "--seed 1 --split train", "--seed 1 --size 3"):
        assert not table(other).equals(first)
    assert not Path("run/estimators.csv").exists()


def test_without_a_run_trains_the_default_pair(
    cli: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cli(f"--epochs 1 {QUICK}")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("no RUN: the pair of `ppl-vae fit --data digits` after 1 epochs\n")
    table = pd.read_csv("estimators.csv", index_col="estimator")
    assert list(table.index) == ["trace", "meanfield", "stl", "iwae", "dreg"]
    assert table.particles.tolist() == [16] * 5
    assert Path("estimators.png").exists()
    assert not Path("runs").exists()


def test_help(cli: Callable[[str], Result]) -> None:
    result = cli("--help")
    assert (result.code, result.err) == (0, "")
    assert "usage: ppl-vae compare [RUN]" in result.out
    for name in comparing.COMPARE_SETTINGS:
        assert f"--{name} " in result.out
    assert max(map(len, result.out.splitlines())) <= 110


def test_usage_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "\n  compare   " in capsys.readouterr().out


# Names


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("trace", pyro.infer.Trace_ELBO),
        ("Trace_ELBO", pyro.infer.Trace_ELBO),
        ("TraceELBO", pyro.infer.Trace_ELBO),
        ("meanfield", pyro.infer.TraceMeanField_ELBO),
        ("TraceMeanField", pyro.infer.TraceMeanField_ELBO),
        ("tracegraph", pyro.infer.TraceGraph_ELBO),
        ("traceenum", pyro.infer.TraceEnum_ELBO),
        ("enum", infer.EnumELBO),
        ("EnumELBO", infer.EnumELBO),
        ("kl", infer.KL_ELBO),
        ("STL_ELBO", infer.STL_ELBO),
        ("iwae", infer.IWAE),
        ("DREG", infer.DReG),
        ("vimco", infer.VIMCO),
        ("renyi", infer.Renyi),
        ("RenyiELBO", pyro.infer.RenyiELBO),
        ("betatc", infer.BetaTC_ELBO),
        ("scorefunction", infer.ScoreFunctionELBO),
        ("wake_sleep", infer.WakeSleep),
        ("ReweightedWakeSleep", pyro.infer.ReweightedWakeSleep),
    ],
)
def test_names_of_classes(name: str, made: type) -> None:
    for text, particles in ((name, 4), (f"{name}(6)", 6)):
        (estimator,) = parse_estimators(text, 4, 100).values()
        assert type(estimator) is made
        assert estimator.num_particles == particles


def test_every_class_has_its_name() -> None:
    for name in infer.__all__:
        made: Any = getattr(infer, name)
        if isinstance(made, type) and issubclass(made, pyro.infer.ELBO) and not inspect.isabstract(made):
            assert type(parse_estimators(name, 4, 100)[name]) is made


def test_options_that_come_from_elsewhere() -> None:
    made: dict[str, Any] = dict(parse_estimators("trace,betatc,trace(1)", 4, 100))
    assert made["trace"].vectorize_particles
    assert not made["trace(1)"].vectorize_particles
    assert made["betatc"].size == 100


# Bad input


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("run --estimators iwea", ["--estimators: unknown 'iwea' (did you mean 'iwae'?)"]),
        ("run --estimators meanfild", ["did you mean 'meanfield'?"]),
        ("run --estimators ''", ["--estimators: expected names such as trace,iwae(50), got ''"]),
        ("run --estimators 'iwae(many)'", ["--estimators: expected names", "'iwae(many)'"]),
        ("run --estimators 'iwae(0)'", ["--estimators: iwae(0): expected a whole number above 0"]),
        ("run --estimators stl,stl", ["--estimators: expected each once, got 'stl' twice"]),
        ("run --estimators iwae,IWAE", ["--estimators: expected each once, got 'iwae' and 'IWAE', which"]),
        ("run --estimators 'dreg(16), DReG'", ["got 'dreg(16)' and 'DReG', which are the same"]),
        ("run --estimators 'trace(3),traceelbo(3)'", ["got 'trace(3)' and 'traceelbo(3)', which are"]),
        ("run --estimators 'reweightedwakesleep(1)'", ["--estimators: reweightedwakesleep(1): Reweighted"]),
        ("run --estimators 'iwae(99999999999999999999)'", ["--estimators: iwae(99999999999999999999): "]),
        ("--repeats 1", ["--repeats: expected at least 2, got 1"]),
        ("--reference_particles 0", ["--reference_particles: expected a whole number above 0, got 0"]),
        ("--reference_repeats 1", ["--reference_repeats: expected 0 or at least 2, got 1"]),
        ("bits.npz", ["RUN: expected the folder of a saved run, got the file bits.npz"]),
        ("run --output bits.npz/sub", ["--output: can't write to bits.npz/sub: Not a directory"]),
        ("--output bits.npz/sub", ["--output: can't write to bits.npz/sub: Not a directory"]),
        ("--output /proc", ["--output: can't write to /proc: "]),
        ("run --output /proc/x", ["--output: can't write to /proc/x: "]),
        ("run --estimators miwae --num_particles 3", ["--estimators: miwae: num_groups: expected a divisor"]),
        ("run --estimators trace_mmd", ["--estimators: trace_mmd: ", "kernel"]),
        ("run --estimators stl --repeats 1", ["--repeats: expected at least 2, got 1"]),
        ("run --estimators stl --repeats many", ["--repeats: expected int, got 'many'"]),
        ("run --num_particles 0", ["--num_particles: expected a whole number above 0, got 0"]),
        ("run --size 0", ["--size: expected a whole number above 0, got 0"]),
        ("run --split tset", ["--split: unknown 'tset' (did you mean 'test'?)"]),
        ("run --seed -1", ["--seed: expected a whole number from 0"]),
        ("run --device cuda:99", ["--device: "]),
        ("run --epochs 3", ["--epochs: expected only without the folder of a saved run, got 3"]),
        ("--classes a.py:B", ["--classes: expected only with the folder of a saved run"]),
        ("run other", ["other: expected the folder of a saved run, found no config.yaml in it"]),
        ("nowhere", ["nowhere"]),
        ("run --estimator stl", ["--estimator: unknown setting (did you mean 'estimators'?)"]),
        ("run --output bits.npz", ["--output: expected a folder, got the file bits.npz"]),
        ("--epochs 0", ["--epochs: expected a whole number above 0, got 0"]),
        ("--data nowhere.npz", ["--data: ", "nowhere.npz"]),
    ],
)
def test_bad_input_is_one_line(line: str, parts: list[str], cli: Callable[[str], Result]) -> None:
    before = tree() if line.startswith("run") else None
    result = cli(f"{line} --progress false")
    assert result.code == 2, result
    assert result.err.count("\n") == 1
    assert result.err.startswith("ppl-vae compare: error: ")
    for part in parts:
        assert part in result.err
    if before is not None:
        assert result.out == ""
        assert tree() == before


@pytest.mark.parametrize(
    "line", ["--repeats 1", "--reference_particles 0", "--reference_repeats 1", "--output bits.npz/sub"]
)
def test_what_can_be_checked_is_before_any_training(line: str, cli: Callable[[str], Result]) -> None:
    assert cli(f"{line} --progress false").out == ""  # it says so when it trains


@pytest.mark.parametrize("line", ["--repeats 1", "--reference_particles 0", "--reference_repeats 1"])
def test_numbers_are_checked_before_any_loading(line: str, cli: Callable[[str], Result]) -> None:
    assert cli(f"nowhere {line}").err.startswith(f"ppl-vae compare: error: {line.split()[0]}: ")


def test_estimator_that_the_pair_does_not_allow_is_named(cli: Callable[[str], Result], home: Path) -> None:
    result = cli(f"run --estimators 'stl,vimco,dip' --size 1 {QUICK.replace('--size 5', '')}")
    assert result.code == 2
    assert result.err.startswith(
        "ppl-vae compare: error: --estimators: dip: data: expected a batch of at least 2"
    )
    assert not Path("run/estimators.csv").exists()
