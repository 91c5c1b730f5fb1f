"""The command line: what it does with good input, and the one line that it says about bad input."""

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from ppl_vae.cli import main
from ppl_vae.cli.settings import PLAIN, Setting, settings_of

cli_module = importlib.import_module("ppl_vae.cli")
fitting = importlib.import_module("ppl_vae.cli.fitting")

SMALL = "--latent_dim 2 --epochs 1 --num_particles 2"
NETS = "--encoder.hidden 4 --decoder.hidden 4"
BITS = f"fit --data bits.npz {SMALL} {NETS}"  # 48 vectors of 6 bits to train on
PROGRAM = (sys.executable, "-c", "import sys; from ppl_vae.cli import main; sys.exit(main())")
RUN = ("config.yaml", "model.safetensors", "checkpoint.safetensors", "history.csv")

MINE = '''
import pyro
import pyro.distributions as dist
import torch
from helper import WIDTH
from torch import nn
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.models import VAE

class MyModel(VAE):
    """A model."""

class MyGuide(MeanFieldGuide):
    """A guide."""

class MyEncoder(nn.Module):
    """Features of 6 numbers.

    Args:
        width: how many features.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.width = self.out_features = width
        self.linear = nn.Linear(6, width)

    def forward(self, x):
        return self.linear(x)

encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)

def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

def _guide(x, site, repeats):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x), dim=-1):
        loc, log_scale = encoder(x).repeat(1, repeats).chunk(2, -1)
        pyro.sample(site, dist.Normal(loc, log_scale.exp()).to_event(1))

def guide(x):
    _guide(x, "z", 1)

def other_site(x):
    _guide(x, "w", 1)

def other_shape(x):
    _guide(x, "z", 2)

def sgd(parameters):
    return torch.optim.SGD(parameters)

def explode(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else 1e30)
'''


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small data, the user's own code and a saved run."""
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    bits, grey = rng.integers(0, 2, (60, 6)).astype("f4"), rng.random((60, 6)).astype("f4")
    y = np.arange(60) % 3
    np.savez(folder / "bits.npz", x=bits, y=y)
    np.savez(folder / "real.npz", x=rng.normal(size=(60, 6)))
    np.savez(folder / "images.npz", x=rng.random((30, 8, 8)).astype("f4"), y=np.arange(30) % 3)
    np.savez(folder / "wide.npz", x=np.tile(bits, 2))
    np.savez(folder / "grey.npz", x=grey)
    np.savez(folder / "beyond.npz", x=1.5 * grey)
    np.savez(folder / "empty.npz", x=bits[:0])
    np.savez(folder / "labels.npz", x=bits, y=y - 1)
    np.savez(folder / "more_labels.npz", x_train=bits, y_train=y, x_test=bits, y_test=y + 1)
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        spoiled = grey.copy()
        spoiled[7, 2] = value
        np.savez(folder / f"{name}.npz", x=spoiled)
    (folder / "truncated.npz").write_bytes((folder / "bits.npz").read_bytes()[:80])
    (folder / "no_images").mkdir()
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.txt").write_text("ten years of work")
    (folder / "papers" / "config.yaml").write_text("of: another program\n")
    (folder / "a_file").write_text("text")
    (folder / "mine_cli.py").write_text(MINE)
    (folder / "helper.py").write_text("WIDTH = 3\n")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "raising.py").write_text("1 / 0\n")
    for name, text in {
        "short": "encoder: MLP\nencoder.hidden: 5\n",
        "long": "encoder: {class: MLP, hidden: [5, 5]}\nlikelihood: Normal\n"
        "learning_rate: {model: 1e-3, guide: 3e-4}\nscheduler: null\n",
        "linear": "model: LinearGaussian\nbinarization: null\n",
        "unknown": "epoch: 3\n",
        "unknown_of_class": "encoder: {hiden: 3}\n",
        "wrong_type": "epochs: many\n",
        "no_class": "encoder: null\n",
        "list": "- 1\n",
        "malformed": "epochs: [1\n",
        "nothing": "",
        "binary": b"\xff\xfe\x00",
        "inner": "config: short.yaml\n",
        "code": "model: !!python/object/apply:os.system ['touch executed']\n",
    }.items():
        (folder / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture(scope="module")
def saved(home: Path) -> Path:
    """Return a saved run of one epoch, with its plots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(shlex.split(f"{BITS} --output saved")) == 0
    return home / "saved"


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in a copy of ``home``; what the user's code brings into the process leaves it again."""
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def run(here: Path, saved: Path) -> Path:
    """Return a copy of the saved run, ``run`` in the working folder."""
    shutil.copytree(saved, here / "run")
    return Path("run")


@pytest.fixture
def cli(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Result]:
    """Return the command line in this process; ``fit`` draws no plots there, to save time."""
    monkeypatch.setattr(fitting, "draw", lambda run, dataset: "none")

    def call(line: str) -> Result:
        capsys.readouterr()
        code = main(shlex.split(line))
        return Result(code, *capsys.readouterr())

    return call


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every file's content and every folder below ``folder``, but for Python's caches."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def config(folder: str | Path) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


def assert_refused(result: Result, *parts: str) -> None:
    """Fail unless the exit code is 2 and there is one line on stderr with all the parts."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("ppl-vae ")
    for part in parts:
        assert part in result.err


# Help


@pytest.mark.parametrize("line", ["", "--help", "-h", "help"])
def test_help_shows_every_command(line: str, cli: Callable[[str], Result]) -> None:
    result = cli(line)
    assert (result.code, result.err) == (0, "")
    for command in ("fit", "evaluate", "sample", "plot"):
        assert f"\n  {command} " in result.out


def test_version(cli: Callable[[str], Result]) -> None:
    assert cli("--version") == (0, f"{importlib.import_module('ppl_vae').__version__}\n", "")


def test_help_of_fit_is_for_reading(cli: Callable[[str], Result]) -> None:
    result = cli("fit --help")
    assert (result.code, result.err) == (0, "")
    words = " ".join(result.out.split())
    assert words.index("--data NAME") < words.index("--epochs") < words.index("--guide NAME")
    assert words.index("--guide NAME") < words.index("--encoder MLP: --encoder.hidden int | Sequence[int]")
    assert "VeryDeepGuide, or your own as file.py:Name (default: MeanFieldGuide)" in words
    assert "the guide's network: MLP, ConvEncoder, ResidualMLP, or your own" in words
    assert "the likelihood's network: MLP, ConvDecoder, PixelHead, ResidualMLP, or your own" in words
    for noise in (
        "`",
        ":math:",
        ":func:",
        "class_path",
        ".help",
        "max_plate_nesting",
        "fused",
        "out_features:",
    ):
        assert noise not in result.out
    assert max(map(len, result.out.splitlines())) <= 110


def test_help_of_fit_follows_the_classes_on_the_line(cli: Callable[[str], Result]) -> None:
    line = "fit --encoder ConvEncoder --likelihood Normal --scheduler CosineAnnealingLR -h"
    words = " ".join(cli(line).out.split())
    assert "--encoder ConvEncoder: --encoder.hidden int number of features" in words
    assert "--encoder.channels int | Sequence[int]" in words
    assert "--likelihood.scale float | learned | elementwise | network" in words
    assert "--scheduler.T_max int Maximum number of iterations (required)" in words
    assert "--decoder.channels" not in words
    assert "--decoder" not in cli("fit --model LinearGaussian --help").out.split("--model LinearGaussian:")[1]


@pytest.mark.parametrize("command", ["evaluate", "sample", "plot"])
def test_help_of_the_commands_on_runs(command: str, cli: Callable[[str], Result]) -> None:
    result = cli(f"{command} --help")
    assert (result.code, result.err) == (0, "")
    assert f"usage: ppl-vae {command} RUN" in result.out
    assert "--classes" in result.out
    assert ("--num_particles" in result.out) == (command == "evaluate")


# A run from end to end


def test_a_run_has_all_its_files(saved: Path, cli: Callable[[str], Result]) -> None:
    files = sorted(tree(saved))
    assert files == sorted([*RUN, "evaluation.yaml", "plots", "plots/history.png", "plots/latents.png"])
    assert config(saved)["notes"]["command"] == {
        "data": "bits.npz",
        "latent_dim": 2,
        "encoder.hidden": 4,
        "decoder.hidden": 4,
    }


def test_fit_prints_and_keeps_its_evaluation(cli: Callable[[str], Result]) -> None:
    result = cli(BITS)
    assert (result.code, result.err) == (0, "")
    kept = yaml.safe_load(Path("runs/bits/evaluation.yaml").read_text())
    assert (kept["split"], kept["data"], kept["num_data"], kept["num_particles"]) == (
        "test",
        "bits.npz",
        6,
        2,
    )
    assert f"ELBO {kept['elbo']['mean']:>26.2f}" in result.out
    assert result.out.endswith("plots: none\nrun: runs/bits\n")


def test_fit_draws_images(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["history", "interpolation", "latents", "reconstructions", "samples", "traversal"]
    assert main(shlex.split(f"fit --data images.npz {SMALL} {NETS} --output o")) == 0
    assert sorted(path.stem for path in Path("o/plots").iterdir()) == names
    assert main(["sample", "o", "--size", "4", "--output", "s.png"]) == 0
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_gives_the_numbers_of_fit_again(run: Path, cli: Callable[[str], Result]) -> None:
    before = (run / "evaluation.yaml").read_bytes()
    result = cli("evaluate run --num_particles 2")
    assert (result.code, result.err) == (0, "")
    assert (run / "evaluation.yaml").read_bytes() == before


def test_evaluate_takes_split_particles_seed_and_other_data(run: Path, cli: Callable[[str], Result]) -> None:
    def kept(options: str) -> dict[str, Any]:
        assert cli(f"evaluate run {options}").code == 0
        return yaml.safe_load((run / "evaluation.yaml").read_text())

    first = kept("--split train --num_particles 3 --seed 1")
    assert (first["split"], first["num_data"], first["num_particles"]) == ("train", 48, 3)
    assert kept("--split train --num_particles 3 --seed 2")["elbo"] != first["elbo"]
    assert kept("--split train --num_particles 3 --seed 1") == first
    assert kept("--data grey.npz --num_particles 2")["data"] == "grey.npz"  # binarised as the run's data were


def test_sample_is_seeded(run: Path, cli: Callable[[str], Result]) -> None:
    assert cli("sample run").out == "samples: run/samples.npz\n"
    with np.load(run / "samples.npz") as drawn:
        assert drawn["x"].shape == drawn["mean"].shape == (64, 6)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert cli(f"sample run --size 5 --seed {seed} --output {name}.npz").code == 0
    a, b, c = (np.load(f"{name}.npz")["x"] for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_plot_draws_again(run: Path, cli: Callable[[str], Result]) -> None:
    shutil.rmtree(run / "plots")
    assert cli("plot run") == (0, "plots: run/plots\n", "")
    assert sorted(path.name for path in (run / "plots").iterdir()) == ["history.png", "latents.png"]


# Settings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "--elbo TraceMeanField_ELBO",
            {"elbo": {"class": "pyro.infer.trace_mean_field_elbo.TraceMeanField_ELBO"}},
        ),
        (
            "--elbo RenyiELBO --elbo.num_particles 5 --elbo.alpha 0.5",
            {"elbo": {"num_particles": 5, "alpha": 0.5}},
        ),
        (
            "--optimizer AdamW --optimizer.weight_decay 0.01 --optimizer.betas '[0.8, 0.9]'",
            {"optimizer": {"weight_decay": 0.01, "betas": [0.8, 0.9]}},
        ),
        ("--scheduler CosineAnnealingLR --scheduler.T_max 10", {"scheduler": {"T_max": 10}}),
        (
            "--learning_rate '{model: 1e-3, guide: 3e-4}'",
            {"learning_rate": {"model": 0.001, "guide": 0.0003}},
        ),
        (
            "--learning-rate=1e-2 --clip_norm 1 --patience 3",
            {"learning_rate": 0.01, "clip_norm": 1, "patience": 3},
        ),
        (
            "--data real.npz --binarization null --likelihood Normal --likelihood.scale network",
            {"model": {"likelihood": {"class": "Normal", "scale": "network"}}},
        ),
        (
            "--data real.npz --binarization None --likelihood Normal --likelihood.scale 0.5",
            {"model": {"likelihood": {"class": "Normal", "scale": 0.5}}},
        ),
        (
            "--data grey.npz --binarization null --likelihood ContinuousBernoulli",
            {"model": {"likelihood": {"class": "ContinuousBernoulli"}}, "data": {"dynamic": False}},
        ),
        (
            "--data images.npz --encoder ConvEncoder --decoder ConvDecoder --decoder.channels '[4]'",
            {
                "model": {
                    "likelihood": {
                        "decoder": {"class": "ConvDecoder", "channels": [4], "out_shape": [1, 8, 8]}
                    }
                }
            },
        ),
        ("--config short.yaml", {"guide": {"encoder": {"hidden": 4}}}),  # the command line wins
        ("--config long.yaml --likelihood Bernoulli", {"guide": {"encoder": {"hidden": 4}}}),
        ("--overwrite --tensorboard=false --seed 3", {"seed": 3}),
        ("--init_bias false", {}),
        ("--encoder ppl_vae.networks.MLP", {"guide": {"encoder": {"class": "MLP"}}}),
    ],
)
def test_settings_reach_the_run(line: str, expected: dict[str, Any], cli: Callable[[str], Result]) -> None:
    result = cli(f"{BITS} --output o {line}")
    assert (result.code, result.err) == (0, "")

    def compare(part: Any, whole: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                compare(value, whole[key])
        else:
            assert part == whole

    compare(expected, config("o"))


def test_config_gives_settings_and_the_line_other_classes(cli: Callable[[str], Result]) -> None:
    assert cli(f"fit --data images.npz {SMALL} --config long.yaml --binarization null --output a").code == 0
    made = config("a")
    assert made["guide"]["encoder"]["hidden"] == [5, 5]
    assert made["model"]["likelihood"]["class"] == "Normal"
    assert made["learning_rate"] == {"model": 0.001, "guide": 0.0003}
    # hidden: [5, 5] is a setting of the file's MLP, not of the line's ConvEncoder
    assert cli(f"fit --data images.npz {SMALL} --config long.yaml --encoder ConvEncoder --output b").code == 0
    assert config("b")["guide"]["encoder"]["hidden"] == 256
    assert cli(f"fit --data bits.npz {SMALL} --config long.yaml --model LinearGaussian --output c").code == 0
    assert config("c")["model"]["class"] == "LinearGaussian"


def test_config_of_a_run_repeats_it(run: Path, cli: Callable[[str], Result]) -> None:
    assert cli("fit --config run/config.yaml --output again --num_particles 2").code == 0
    assert Path("again/model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert cli("fit --config run/config.yaml --output again --overwrite --seed 1").code == 0
    assert config("again")["seed"] == 1


def test_switches_stand_anywhere(run: Path, cli: Callable[[str], Result]) -> None:
    assert cli("fit --resume --output run --num_particles 2").code == 0
    assert cli("fit --output run --num_particles 2 --resume").code == 0
    assert cli("fit --resume true --output run --overwrite=false --num_particles 2").code == 0
    assert_refused(
        cli("fit --output run --resume false"), "--output: run holds a run; set overwrite or resume"
    )


def test_annotations_that_are_no_plain_data_are_left_out() -> None:
    class Made:
        def __init__(
            self, a: int, b: "Path | float" = 1.0, c: Callable[[], int] = int, e=3, **f: int
        ) -> None: ...

    def unresolved(d: "Missing" = 2) -> None: ...  # noqa: F821

    assert settings_of(unresolved)["d"].type == PLAIN
    settings = settings_of(Made, "x.", skip={"a"})
    assert settings.keys() == {"x.b", "x.c", "x.e"}
    assert [settings[name].type for name in ("x.b", "x.c", "x.e")] == [float, PLAIN, int | float]
    assert Setting("", PLAIN).read({"class_path": "this.That"}) == {"class_path": "this.That"}
    assert "this" not in sys.modules


# The user's own code


def test_own_classes(cli: Callable[[str], Result]) -> None:
    own = "--model mine_cli.py:MyModel --guide mine_cli.py:MyGuide --encoder mine_cli.py:MyEncoder"
    result = cli(f"fit --data bits.npz {SMALL} {own} --encoder.width 4 --output o")
    assert (result.code, result.err) == (0, "")
    assert config("o")["guide"]["encoder"] == {"class": "mine_cli.MyEncoder", "width": 4}
    names = ["mine_cli.py:MyEncoder", "mine_cli.py:MyGuide", "mine_cli.py:MyModel"]
    for command in ("evaluate", "sample", "plot"):
        assert_refused(cli(f"{command} o"), f"add --classes {','.join(names)}\n")
    assert_refused(cli(f"sample o --classes {names[0]}"), f"add --classes {','.join(names[1:])}\n")
    assert cli(f"evaluate o --classes {','.join(names)} --num_particles 2").code == 0
    assert cli(f"sample o --classes '{', '.join(names)}'").code == 0
    assert_refused(cli("fit --resume --output o"), own)
    assert cli(f"fit --resume --output o {own} --epochs 2 --num_particles 2").code == 0
    assert_refused(
        cli("fit --resume --output o --model VAE --guide MeanFieldGuide --encoder MLP"), "--model: "
    )


@pytest.mark.filterwarnings("default::UserWarning")
def test_own_functions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = "--model mine_cli.py:model --guide mine_cli.py:guide --optimizer mine_cli.py:sgd"
    assert main(shlex.split(f"fit --data images.npz {SMALL} --output p {own}")) == 2
    assert "can't run on a batch of shape [1, 1, 8, 8]" in capsys.readouterr().err
    assert main(shlex.split(f"fit --data bits.npz {SMALL} --output o {own}")) == 0
    assert capsys.readouterr().err == ""
    assert main(["evaluate", "o"]) == 2
    assert "add --classes mine_cli.py:guide,mine_cli.py:model\n" in capsys.readouterr().err
    classes = ["--classes", "mine_cli.py:guide,mine_cli.py:model"]
    assert main(["evaluate", "o", "--num_particles", "2", *classes]) == 0
    capsys.readouterr()
    assert main(["sample", "o", *classes]) == 2  # a model that draws nothing
    assert "error: model: can't be called as model(None, size=64)" in capsys.readouterr().err


# Resuming and stopping


def test_resume_takes_the_settings_of_the_run(run: Path, cli: Callable[[str], Result]) -> None:
    before = config(run)
    assert cli("fit --resume --output run --epochs 3 --num_particles 2").code == 0
    assert len((run / "history.csv").read_text().splitlines()) == 1 + 3
    assert config(run) == before | {"epochs": 3}
    assert cli(f"{BITS} --output straight --epochs 3").code == 0
    assert (run / "checkpoint.safetensors").read_bytes() == Path(
        "straight/checkpoint.safetensors"
    ).read_bytes()


def test_resume_of_nothing_starts(cli: Callable[[str], Result]) -> None:
    assert cli(f"{BITS} --resume --output new").code == 0
    assert (Path("new") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--latent_dim 3", "--latent_dim: the run to resume was made with 2, got 3"),
        ("--encoder.hidden 5", "--encoder.hidden: the run to resume was made with 4, got 5"),
        ("--encoder ConvEncoder", "--encoder: the run to resume was made with 'MLP', got 'ConvEncoder'"),
        ("--seed 1", "--seed: the run to resume was made with 0, got 1"),
        ("--learning_rate 0.1", "--learning_rate: the run to resume was made with 0.001, got 0.1"),
        ("--data real.npz", "--data: the run to resume was made with 'bits.npz', got 'real.npz'"),
        ("--config long.yaml", "--encoder.hidden: the run to resume was made with 4, got [5, 5]"),
    ],
)
def test_resume_with_another_setting_is_refused(
    setting: str, message: str, run: Path, cli: Callable[[str], Result]
) -> None:
    before = tree(run)
    assert_refused(cli(f"fit --resume --output run {setting} --epochs 2"), message)
    assert tree(run) == before


def test_ctrl_c_saves_and_says_how_to_continue(home: Path, here: Path, cli: Callable[[str], Result]) -> None:
    line = f"{BITS} --output stopped --epochs 1000000"
    with subprocess.Popen(
        [*PROGRAM, *shlex.split(line)],
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as started:
        waited = time.monotonic()
        while not (home / "stopped" / "checkpoint.safetensors").exists():
            assert started.poll() is None
            assert time.monotonic() - waited < 120
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        try:
            _, err = started.communicate(timeout=60)
        finally:
            started.kill()  # or leaving the context would wait for it
    assert (started.returncode, err) == (
        130,
        "ppl-vae fit: interrupted; continue with `ppl-vae fit --output stopped --num_particles=2 --resume`\n",
    )
    epochs = len((home / "stopped" / "history.csv").read_text().splitlines()) - 1
    shutil.move(home / "stopped", here / "stopped")
    assert cli(f"fit --output stopped --resume --epochs {epochs + 1} --num_particles 2").code == 0
    assert len(Path("stopped/history.csv").read_text().splitlines()) == 1 + epochs + 1


@pytest.mark.parametrize("batch_size", ["--batch_size 10", "--batch_size 48"])  # the one step is the last
def test_loss_that_becomes_nan_keeps_the_last_good_epoch(
    batch_size: str, cli: Callable[[str], Result]
) -> None:
    result = cli(f"{BITS} --epochs 5 --output o --scheduler mine_cli.py:explode --optimizer SGD {batch_size}")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "became" in result.err
    assert "in epoch 2, " in result.err
    assert "the parameters are those of epoch 1" in result.err
    assert len(Path("o/history.csv").read_text().splitlines()) == 1 + 1
    for name in ("model", "checkpoint"):
        tensors = load_file(f"o/{name}.safetensors")
        assert max(float(t.abs().max()) for t in tensors.values() if t.numel()) < 100
    assert cli("evaluate o --num_particles 2").code == 0


def test_loss_that_is_nan_at_once_leaves_no_run(cli: Callable[[str], Result]) -> None:
    result = cli(f"{BITS} --output o --optimizer SGD --learning_rate 1e30 --batch_size 10 --tensorboard")
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "in epoch 1, step" in result.err
    assert "site" in result.err or "parameter" in result.err
    assert not Path("o").exists()


# One line for what is wrong

ALWAYS = [
    ("fitt", "unknown 'fitt' (did you mean 'fit'?)"),
    ("--epochs 3", "unknown '--epochs'; expected one of 'fit', 'evaluate', 'compare', 'sample', 'plot'"),
    ("fit digits", "expected --setting VALUE, got 'digits'"),
    # settings
    ("fit --epoch 3", "--epoch: unknown setting (did you mean 'epochs'?)"),
    ("fit --encoder.hiden 3", "--encoder.hiden: unknown setting (did you mean 'encoder.hidden'?)"),
    ("fit --likelihood.scale 3", "--likelihood.scale: unknown setting"),
    ("fit --model LinearGaussian --decoder MLP", "--decoder: the other pieces take no decoder"),
    ("fit --epochs", "--epochs: expected int, got no value"),
    ("fit --encoder --decoder MLP", "--encoder: expected str, got no value"),
    ("fit --epochs many", "--epochs: expected int, got 'many'"),
    ("fit --epochs 1.5", "--epochs: expected int, got '1.5'"),
    ("fit --resume maybe", "--resume: expected true | false, got 'maybe'"),
    ("fit --encoder.hidden 64,64", "--encoder.hidden: expected int | Sequence[int], got '64,64'"),
    ("fit --scheduler CosineAnnealingLR", "--scheduler.T_max: expected a value, got none"),
    ("fit --resume --overwrite", "--resume: expected either --resume or --overwrite, got both"),
    # names
    ("fit --encoder MPL", "--encoder: unknown 'MPL' (did you mean 'MLP'?)"),
    ("fit --decoder ConvEncoder", "--decoder: unknown 'ConvEncoder' (did you mean 'ConvDecoder'?)"),
    ("fit --guide MeanFeild", "--guide: unknown 'MeanFeild' (did you mean 'MeanFieldGuide'?)"),
    ("fit --elbo IWEA", "--elbo: unknown 'IWEA' (did you mean 'IWAE'?); expected "),
    ("fit --elbo TraecELBO", "--elbo: unknown 'TraecELBO' (did you mean 'Trace_ELBO'?)"),
    ("fit --optimizer Adan", "--optimizer: unknown 'Adan' (did you mean 'Adam'?)"),
    ("fit --data digts", "--data: unknown 'digts' (did you mean 'digits'?)"),
    ("fit --binarization dynamc", "--binarization: unknown 'dynamc' (did you mean 'dynamic'?)"),
    ("fit --encoder.activation rleu", "--encoder.activation: unknown 'rleu' (did you mean 'relu'?)"),
    ("fit --decoder.init hee", "--decoder.init: unknown 'hee' (did you mean 'he'?)"),
    # numbers
    *(
        (f"fit --{name} 0", f"--{name}: expected a whole number above 0, got 0")
        for name in ("epochs", "latent_dim")
    ),
    ("fit --epochs -1", "--epochs: expected a whole number above 0, got -1"),
    ("fit --num_particles 0", "--num_particles: expected a whole number above 0, got 0"),
    ("fit --batch_size -5", "--batch_size: expected a whole number above 0, got -5"),
    ("fit --patience 0", "--patience: expected a whole number above 0, got 0"),
    ("fit --clip_norm 0", "--clip_norm: expected a finite number above 0, got 0.0"),
    ("fit --learning_rate 0", "--learning_rate: expected a finite number above 0, got 0.0"),
    ("fit --learning_rate -1e-3", "--learning_rate: expected a finite number above 0, got -0.001"),
    ("fit --learning_rate .nan", "--learning_rate: expected a finite number above 0, got nan"),
    (
        "fit --learning_rate '{model: 1}'",
        "--learning_rate: expected a number or {'model': ..., 'guide': ...}",
    ),
    ("fit --seed -1", "--seed: expected a whole number from 0, got -1"),
    ("fit --encoder.hidden 0", "--encoder.hidden: expected a whole number above 0, got 0"),
    ("fit --encoder.hidden [8,-1]", "--encoder.hidden[1]: expected a whole number above 0, got -1"),
    ("fit --encoder.dropout 1.5", "--encoder.dropout: expected a number in [0, 1), got 1.5"),
    (
        "fit --elbo BetaTC_ELBO --elbo.size 10",
        "--elbo.size: expected at least the batch's 48 data, got 10",
    ),
    ("fit --elbo DIP_ELBO --elbo.site w", "--elbo.site: "),
    (
        "fit --elbo ReweightedWakeSleep --elbo.num_particles 1",
        "--elbo: Reweighted Wake Sleep needs to be run with more than one particle",
    ),
    ("fit --elbo IWAE --elbo.num_particles 99999999999999999999", "error: "),
    ("fit --elbo.num_particles 0", "--elbo.num_particles: expected a whole number above 0, got 0"),
    (
        "fit --optimizer.weight_decay -1",
        "--optimizer: Adam can't be made for these parameters: Invalid weight_decay",
    ),
    ("fit --scheduler StepLR --scheduler.step_size 0", "--scheduler: StepLR fails after epoch 1: "),
    (
        "fit --likelihood Normal --likelihood.scale 0",
        "--likelihood.scale: expected a finite number above 0, got 0.0",
    ),
    ("fit --device tpu", "--device: expected 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
    ("fit --device cuda:9", "--device: expected a device of this machine, got 'cuda:9'"),
    # data
    (
        "fit --data nan.npz",
        "--data: nan.npz: x: expected finite x, got 1 NaN or infinite values, first in row 7",
    ),
    (
        "fit --data inf.npz",
        "--data: inf.npz: x: expected finite x, got 1 NaN or infinite values, first in row 7",
    ),
    ("fit --data grey.npz --binarization null", "--data: datum 0 is outside the support of site 'x'"),
    ("fit --data grey.npz --binarization null", "use ContinuousBernoulli"),
    ("fit --data beyond.npz", "--binarization: expected values in [0, 1], got ["),
    ("fit --data beyond.npz --binarization null", "--data: datum "),
    ("fit --data beyond.npz --binarization null --likelihood ContinuousBernoulli", "--data: datum "),
    (
        "fit --data empty.npz",
        "--data: empty.npz: x: expected x of shape [n, *event] with n above 0, got [0, 6]",
    ),
    ("fit --data no_images", "--data: no_images: expected images ("),
    ("fit --data labels.npz", "--data: labels.npz: y: expected labels that are whole numbers from 0"),
    (
        "fit --data more_labels.npz",
        "--data: more_labels.npz: y_test: expected labels 0..2, as in y_train, got 3",
    ),
    ("fit --data truncated.npz", "--data: truncated.npz: expected an .npz of plain arrays, got "),
    ("fit --data missing.npz", "--data: no file or folder 'missing.npz'"),
    ("fit --data a_file", "--data: expected an .npz file or a folder of images, got the file 'a_file'"),
    (
        "fit --data images.npz --model LinearGaussian",
        "--model: LinearGaussian takes data of shape [n, d], got [n, 1, 8, 8]",
    ),
    (
        "fit --data bits.npz --encoder ConvEncoder",
        "--encoder.in_shape: expected the shape (C, H, W) of an image, got (6,)",
    ),
    ("fit --data mnist --root no_images", "--data: mnist: not under root: put train-images-idx3-ubyte.gz"),
    # the user's own code
    (
        "fit --data wide.npz --encoder mine_cli.py:MyEncoder",
        "--data: model and guide can't run on a batch of shape [1, 12]",
    ),
    (
        "fit --model mine_cli.py:model --guide mine_cli.py:other_site",
        "--guide: lacks the model's latent sites ['z']; it has ['w']",
    ),
    (
        "fit --model mine_cli.py:model --guide mine_cli.py:other_shape",
        "site 'z': model and guide disagree on shapes",
    ),
    ("fit --model mine_cli.py:MyModle", "--model: mine_cli.py has no 'MyModle' (did you mean 'MyModel'?)"),
    ("fit --model missing.py:M", "--model: expected a Python file, found none at missing.py"),
    ("fit --model mine_cli.py", "--model: expected file.py:Name or package.Name, got 'mine_cli.py'"),
    ("fit --model broken.py:M", "--model: broken.py fails: SyntaxError: "),
    ("fit --model raising.py:M", "--model: raising.py fails: ZeroDivisionError: division by zero"),
    (
        "fit --model no.such.Model",
        "--model: can't import 'no.such': ModuleNotFoundError: No module named 'no'",
    ),
    (
        "fit --elbo ppl_vae.networks.MLP",
        "--elbo: expected a class derived from ELBO, got ppl_vae.networks.MLP",
    ),
    (
        "fit --encoder mine_cli.py:model",
        "--guide.features: expected the number of features that function gives",
    ),
    # configuration
    ("fit --config missing.yaml", "--config: missing.yaml: expected a settings file, found none"),
    ("fit --config no_images", "--config: no_images: expected a settings file, found none"),
    ("fit --config list.yaml", "--config: list.yaml: expected a mapping of settings, got list"),
    ("fit --config nothing.yaml", "--config: nothing.yaml: expected a mapping of settings, got NoneType"),
    ("fit --config malformed.yaml", "--config: malformed.yaml: malformed YAML: "),
    ("fit --config binary.yaml", "--config: binary.yaml: malformed YAML: "),
    ("fit --config code.yaml", "--config: code.yaml: malformed YAML: could not determine a constructor"),
    ("fit --config unknown.yaml", "--config unknown.yaml: epoch: unknown setting (did you mean 'epochs'?)"),
    (
        "fit --config unknown_of_class.yaml",
        "--config unknown_of_class.yaml: encoder.hiden: unknown setting (did you",
    ),
    ("fit --config wrong_type.yaml", "--config wrong_type.yaml: epochs: expected int, got 'many'"),
    ("fit --config no_class.yaml", "--config no_class.yaml: encoder: expected str, got None"),
    (
        "fit --config inner.yaml",
        "--config inner.yaml: config: expected the settings themselves, got another file",
    ),
    ("fit --config linear.yaml --decoder MLP", "--decoder: the other pieces take no decoder"),
    # output
    ("fit --output /proc/x", "--output: can't write to /proc/x: "),
    ("fit --output a_file", "--output: expected a folder, a_file is a file"),
    ("fit --output a_file/run", "--output: can't write to a_file/run: Not a directory"),
    ("fit --output papers", "--output: papers holds other files than a run; choose another folder"),
    (
        "fit --output papers --overwrite",
        "--output: papers holds other files than a run; choose another folder",
    ),
    ("fit --output papers --resume", "papers/config.yaml: expected a run of format 1"),
    # commands on runs
    ("evaluate", "RUN: expected the folder of a saved run, as in `ppl-vae evaluate RUN`, got none"),
    ("plot a b", "RUN: expected the folder of a saved run, as in `ppl-vae plot RUN`, got 'a', 'b'"),
    ("sample missing", "missing: expected the folder of a saved run, found no config.yaml in it"),
    ("evaluate papers", "papers/config.yaml: expected a run of format 1"),
]


@pytest.mark.parametrize(("line", "message"), ALWAYS, ids=[line for line, _ in ALWAYS])
def test_one_line_says_what_is_wrong(
    line: str, message: str, here: Path, cli: Callable[[str], Result]
) -> None:
    if line.startswith("fit ") and "--data" not in line:
        line += " --data bits.npz"
    if line.startswith("fit ") and "--epochs" not in line and "wrong_type" not in line:
        line += " --epochs 1"
    before = tree(here)
    assert_refused(cli(line), message)
    if any(name in line for name in ("StepLR", "BetaTC", "DIP", "IWAE ")):
        Path("runs").rmdir()  # the parent of a run that was started
    assert tree(here) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "fit --output run --data bits.npz",
            "--output: run holds a run; set overwrite or resume, or choose another",
        ),
        ("fit --output run --overwrite --data nan.npz", "--data: nan.npz: x: expected finite x"),
        ("fit --output run --overwrite --latent_dim 0", "--latent_dim: expected a whole number above 0"),
        ("evaluate run --split tset", "--split: unknown 'tset' (did you mean 'test'?)"),
        ("evaluate run --num_particles 0", "--num_particles: expected a whole number above 0, got 0"),
        ("evaluate run --memory -1", "--memory: expected a finite number above 0, got -1"),
        ("evaluate run --seed -1", "--seed: expected a whole number from 0, got -1"),
        ("evaluate run --device cuda:9", "--device: expected a device of this machine, got 'cuda:9'"),
        ("evaluate run --sed 1", "--sed: unknown setting (did you mean 'seed'?)"),
        ("evaluate run --data wide.npz", "--data: x: expected shape [*batch, 6], got [2, 12]"),
        ("evaluate run --data nan.npz", "--data: nan.npz: x: expected finite x"),
        ("evaluate run --classes mine_cli.py:Other", "--classes: mine_cli.py has no 'Other'"),
        ("sample run --size 0", "--size: expected a whole number above 0, got 0"),
        ("sample run --output s.jpg", "--output: expected a file ending in .npz or .png, got 's.jpg'"),
        (
            "sample run --output no/such/s.npz",
            "--output: can't write no/such/s.npz: No such file or directory",
        ),
        (
            "sample run --output s.png",
            "--output: s.png: result.mean: images [C, H, W] are needed, got data of shape [6]",
        ),
        ("plot run --data mist", "--data: unknown 'mist' (did you mean 'mnist'?)"),
    ],
)
def test_one_line_says_what_is_wrong_with_a_run(
    line: str, message: str, here: Path, run: Path, cli: Callable[[str], Result]
) -> None:
    before = tree(here)
    assert_refused(cli(line), message)
    assert tree(here) == before


def test_bad_input_to_the_program_itself(home: Path) -> None:
    before = tree(home)
    done = subprocess.run([*PROGRAM, "fit", "--data", "nan.npz"], cwd=home, capture_output=True, text=True)
    assert_refused(Result(done.returncode, done.stdout, done.stderr), "--data: nan.npz: x: expected finite x")
    assert tree(home) == before


@pytest.mark.parametrize(
    ("command", "reason", "said"),
    [
        ("fit", "size: too small", "size: too small"),
        ("sample", "size: too small", "--size: too small"),
        ("evaluate", "epochs: too small", "epochs: too small"),
        ("evaluate", "num_particles: none", "--num_particles: none"),
        ("plot", "num_particles: none", "num_particles: none"),
        ("compare", "repeats: one", "--repeats: one"),
        ("fit", "repeats: one", "repeats: one"),
        ("fit", "x: of another shape", "--data: x: of another shape"),
        ("sample", "x: of another shape", "x: of another shape"),
    ],
)
def test_only_settings_of_the_command_are_named_as_such(
    command: str,
    reason: str,
    said: str,
    cli: Callable[[str], Result],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(words: list[str]) -> None:
        raise ValueError(reason)

    monkeypatch.setitem(cli_module._COMMANDS, command, fail)
    assert cli(command).err == f"ppl-vae {command}: error: {said}\n"


def test_debugging_shows_where_an_error_came_from(
    cli: Callable[[str], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPL_VAE_DEBUG", "1")
    with pytest.raises(ValueError, match="latent_dim: expected a whole number above 0"):
        cli("fit --latent_dim 0")


def test_failure_of_the_machine_is_one_line(run: Path, cli: Callable[[str], Result]) -> None:
    result = cli("sample run --size 1000000000000000")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert "ppl-vae sample: error: " in result.err


# Damaged and hostile runs


@pytest.mark.parametrize("size", [0, 0.5])
@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
def test_damaged_run(name: str, size: float, here: Path, run: Path, cli: Callable[[str], Result]) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(size * len(content))])
    before = tree(here)
    for command in ("evaluate", "sample", "plot"):
        assert_refused(cli(f"{command} run"), f"run/{name}: ")
        assert tree(here) == before


@pytest.mark.parametrize("name", ["config.yaml", "checkpoint.safetensors", "history.csv"])
def test_damaged_run_is_not_resumed(name: str, here: Path, run: Path, cli: Callable[[str], Result]) -> None:
    (run / name).write_bytes(b"epoch\nnone\n")
    before = tree(here)
    assert_refused(cli("fit --resume --output run"), f"run/{name}: ")
    assert tree(here) == before


def test_run_without_an_epoch(here: Path, run: Path, cli: Callable[[str], Result]) -> None:
    for name in ("model.safetensors", "checkpoint.safetensors", "history.csv"):
        (run / name).unlink()
    assert_refused(cli("evaluate run"), "run/model.safetensors: ", "no epoch was finished")
    assert cli("fit --resume --output run --num_particles 2").code == 0


def test_run_made_in_python_is_not_resumed_here(here: Path, run: Path, cli: Callable[[str], Result]) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(config(run) | {"notes": None}))
    assert_refused(cli("fit --resume --output run"), "run/config.yaml: expected a run of `ppl-vae fit`")


EVIL = {"class": "evil.Evil", "in_shape": 6}
HOSTILE = [
    {"model": {"class": "os.system", "command": "touch executed"}},
    {"model": {"class": "evil.Evil"}},
    {"model": {"function": "evil.evil"}},
    {"guide": {"class": "MeanFieldGuide", "encoder": EVIL, "latent_dim": 2}},
    {"guide": {"class": ["evil.Evil"]}},
    {"model": {"class": "VAE", "prior": {"class_path": "evil.Evil"}, "likelihood": None}},
    {"model": {"class": "evil\x1b[2J.Evil"}},
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("command", ["evaluate run", "sample run", "plot run"])
def test_a_strangers_run_executes_nothing(
    command: str, change: dict[str, Any], here: Path, run: Path, cli: Callable[[str], Result]
) -> None:
    plant(here, run, change)
    before = tree(here)
    assert_refused(cli(command))
    assert tree(here) == before
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "line", ["fit --resume --output run --epochs 2", "fit --config run/config.yaml --output o"]
)
@pytest.mark.parametrize(
    "command",
    [
        {"model": "evil.py:Evil"},
        {"model": {"class": "evil.py:Evil"}},
        {"guide": "evil.evil"},
        {"encoder": "os.system"},
        {"optimizer": {"class": "evil.py:Evil"}},
        {"optimizer": {"class": "Adam", "betas": {"class_path": "evil.Evil"}}},
        {"optimizer": {"class": "Adam", "foreach": {"class_path": "evil.Evil"}}},
        {"scheduler": {"class": "LambdaLR", "lr_lambda": "evil.evil"}},
        {"scheduler": {"class": "LambdaLR", "lr_lambda": {"class_path": "evil.Evil"}}},
        {"elbo": {"class": "Trace_ELBO", "jit_options": {"class_path": "evil.Evil"}, "num_particles": 0}},
        {"learning_rate": {"class_path": "evil.Evil"}},
        {"latent_dim": {"class_path": "evil.Evil"}},
        {"data": {"class_path": "evil.Evil"}},
        {"encoder": {"class": ["evil.Evil"]}},
        {"encoder": {"class": {"class_path": "evil.Evil"}}},
        {"config": "evil.yaml", "model": 3},
        {1: 2},
        ["evil.Evil"],
    ],
    ids=str,
)
def test_a_strangers_settings_execute_nothing(
    command: Any, line: str, here: Path, run: Path, cli: Callable[[str], Result]
) -> None:
    if isinstance(command, dict):
        command = config(run)["notes"]["command"] | command
    plant(here, run, {"notes": {"command": command}})
    before = tree(here)
    assert_refused(cli(line))
    assert tree(here) == before
    assert "evil" not in sys.modules


def test_a_strangers_run_writes_nowhere_else(here: Path, run: Path, cli: Callable[[str], Result]) -> None:
    command = config(run)["notes"]["command"] | {"output": "papers", "overwrite": True, "root": "papers"}
    plant(here, run, {"notes": {"command": command}})
    (run / ".evaluation.yaml.tmp").symlink_to(here / "a_file")
    shutil.rmtree(run / "plots")
    (run / "plots").symlink_to(here / "papers")
    assert_refused(cli("plot run"), "run/plots: expected a folder, got a link")
    papers = tree(here / "papers")
    assert cli("evaluate run --num_particles 2").code == 0
    assert cli("fit --config run/config.yaml --num_particles 2").code == 0
    assert tree(here / "papers") == papers
    assert (here / "a_file").read_text() == "text"
    assert (here / "runs" / "bits" / "model.safetensors").is_file()


def plant(here: Path, run: Path, change: dict[str, Any]) -> None:
    """Change a run's settings, with code beside it that leaves a trace when it is imported."""
    (run / "config.yaml").write_text(yaml.safe_dump(config(run) | change))
    for folder in (here, run):
        (folder / "evil.py").write_text("open('executed', 'w').close()\nclass Evil: ...\ndef evil(*_): ...\n")
