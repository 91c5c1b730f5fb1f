"""Tests of resuming: a run that was stopped, in whatever way, ends as one that never was."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae import fit, load_run
from ppl_vae.data import Split, load_dataset
from ppl_vae.guides import MeanFieldGuide
from ppl_vae.likelihoods import Bernoulli
from ppl_vae.models import VAE, LinearGaussian
from ppl_vae.networks import MLP
from ppl_vae.priors import StandardNormal
from ppl_vae.training import saving

QUIET: dict[str, Any] = {"progress": False, "batch_size": 40}
NETWORK: dict[str, Any] = {"hidden": (8,), "normalization": "batch", "dropout": 0.2}


def pair(seed: int = 0, **network: Any) -> tuple[VAE, MeanFieldGuide]:
    torch.manual_seed(seed)
    network = {"hidden": (8,)} | network
    model = VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8), **network)))
    return model, MeanFieldGuide(MLP((1, 8, 8), **network), 2)


load_digits = functools.cache(functools.partial(load_dataset, "digits", binarization="dynamic"))


def digits(n: int = 120) -> Split:
    train = load_digits().train
    return Split(train.x[:n], train.y[:n], dynamic=True)


def held_out() -> Tensor:
    return load_digits().validation.x[:50]


def values(*programs: nn.Module) -> list[Tensor]:
    return [v.detach().clone() for program in programs for v in program.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def interrupt_in(epoch: int) -> Callable[[Any], None]:
    def callback(run: Any) -> None:
        if len(run.history) == epoch:
            raise KeyboardInterrupt

    return callback


SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam, not fused": {"optimizer": torch.optim.Adam},
    "sgd with momentum": {
        "optimizer": functools.partial(torch.optim.SGD, momentum=0.9),
        "learning_rate": 1e-2,
    },
    "amsgrad": {"optimizer": functools.partial(torch.optim.AdamW, amsgrad=True)},
    "rmsprop": {"optimizer": functools.partial(torch.optim.RMSprop, centered=True, momentum=0.5)},
    "separate rates": {"learning_rate": {"model": 1e-2, "guide": 1e-3}},
    "clipped": {"clip_norm": 0.5},
    "step": {"scheduler": functools.partial(schedulers.StepLR, step_size=2, gamma=0.3)},
    "multistep": {"scheduler": functools.partial(schedulers.MultiStepLR, milestones=[1, 3], gamma=0.3)},
    "cosine": {"scheduler": functools.partial(schedulers.CosineAnnealingLR, T_max=4)},
    "one-cycle": {"scheduler": functools.partial(schedulers.OneCycleLR, max_lr=0.02, total_steps=4)},
    "plateau": {"scheduler": functools.partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.3)},
    "sequential": {
        "scheduler": lambda optimizer: schedulers.SequentialLR(
            optimizer,
            [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.7)],
            milestones=[2],
        )
    },
    "lambda": {"scheduler": lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.8**epoch)},
    "particles": {"elbo": Trace_ELBO(num_particles=2, vectorize_particles=True)},
    "no validation": {"validation": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_and_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    """Bit for bit: parameters, batch norm's buffers, history; with dynamic binarization and dropout.

    The run is interrupted twice; what resumes it starts from other parameters, which must not matter.
    """
    options = {"validation": held_out(), "learning_rate": 3e-3, **QUIET, **SETTINGS[name]}
    whole = fit(*pair(**NETWORK), digits(), epochs=4, output=tmp_path / "whole", **options)
    for epoch in (1, 3):
        with pytest.warns(UserWarning, match=f"interrupted: {epoch} of 4 epochs"):
            fit(
                *pair(seed=epoch - 1, **NETWORK),
                digits(),
                epochs=4,
                output=tmp_path / "parts",
                resume=True,
                callbacks=[interrupt_in(epoch)],
                **options,
            )
    run = fit(*pair(seed=9, **NETWORK), digits(), epochs=4, output=tmp_path / "parts", resume=True, **options)
    assert equal(values(run.model, run.guide), values(whole.model, whole.guide))
    assert without_time(run.history) == without_time(whole.history)
    assert run.best_epoch == whole.best_epoch and not run.interrupted
    for file in ("model.safetensors", "checkpoint.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_loader_resumes_alike(tmp_path: Path) -> None:
    """A shuffling loader draws its order from torch's stream, which is the epoch's own."""
    x = digits().x.round()
    loader = functools.partial(DataLoader, TensorDataset(x), batch_size=40, shuffle=True)
    whole = fit(*pair(), loader(), epochs=4, progress=False)
    fit(*pair(), loader(), epochs=2, output=tmp_path, progress=False)
    run = fit(*pair(seed=1), loader(), epochs=4, output=tmp_path, resume=True, progress=False)
    assert equal(values(run.model, run.guide), values(whole.model, whole.guide))


def test_plain_functions_resume_alike(tmp_path: Path) -> None:
    def programs(seed: int) -> tuple[Callable, Callable, nn.Module]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
        model = LinearGaussian(2, 5)

        def guide(x: Tensor) -> None:
            pyro.module("net", net)
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", pyro.distributions.Normal(net(x), 0.5).to_event(1))

        return (lambda x: model(x)), guide, nn.ModuleList([model, net])

    torch.manual_seed(50)
    x = torch.randn(100, 5)
    model, guide, nets = programs(0)
    fit(model, guide, x, epochs=4, **QUIET)
    for seed, epochs in ((0, 2), (1, 4)):
        other_model, other_guide, other = programs(seed)
        fit(other_model, other_guide, x, epochs=epochs, output=tmp_path, resume=True, **QUIET)
    assert equal(values(other), values(nets))


def test_more_epochs_are_allowed(tmp_path: Path) -> None:
    whole = fit(*pair(), digits(), epochs=5, **QUIET)
    fit(*pair(), digits(), epochs=2, output=tmp_path, **QUIET)
    run = fit(*pair(seed=1), digits(), epochs=5, output=tmp_path, resume=True, **QUIET)
    assert equal(values(run.model, run.guide), values(whole.model, whole.guide))
    assert load_run(tmp_path).config["epochs"] == 5


@pytest.mark.parametrize("epochs", [3, 2])
@pytest.mark.parametrize("validated", [False, True])
def test_resuming_a_finished_run_does_nothing(tmp_path: Path, epochs: int, validated: bool) -> None:
    options = {"validation": held_out() if validated else None, "output": tmp_path, **QUIET}
    whole = fit(*pair(), digits(), epochs=3, **options)
    names = [name for name in saving.FILES if name != "config.yaml"]
    before = {name: (tmp_path / name).read_bytes() for name in names}
    calls: list[Any] = []
    run = fit(*pair(seed=1), digits(), epochs=epochs, resume=True, callbacks=[calls.append], **options)
    assert equal(values(run.model, run.guide), values(whole.model, whole.guide))
    assert run.history == whole.history and run.best_epoch == whole.best_epoch and not calls
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_a_run_that_patience_stopped_stays_stopped(tmp_path: Path) -> None:
    """SGD at a wild rate: the validation ELBO soon falls."""
    options = {
        "validation": held_out(),
        "optimizer": torch.optim.SGD,
        "learning_rate": 5.0,
        "patience": 2,
        "output": tmp_path,
        **QUIET,
    }
    first = fit(*pair(), digits(), epochs=60, **options)
    assert len(first.history) == first.best_epoch + 2 < 60
    again = fit(*pair(seed=1), digits(), epochs=60, resume=True, **options)
    assert again.history == first.history
    assert equal(values(again.model, again.guide), values(first.model, first.guide))


def test_resuming_where_nothing_is_starts_afresh(tmp_path: Path) -> None:
    whole = fit(*pair(), digits(), epochs=2, **QUIET)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing" / "run"):
        run = fit(*pair(), digits(), epochs=2, output=folder, resume=True, **QUIET)
        assert equal(values(run.model, run.guide), values(whole.model, whole.guide))
        assert len(load_run(folder).history) == 2


CHANGED: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 60},
    "seed": {"seed": 1},
    "learning_rate": {"learning_rate": 1e-4},
    "optimizer": {"optimizer": torch.optim.SGD},
    "scheduler": {"scheduler": functools.partial(schedulers.StepLR, step_size=3)},
    "clip_norm": {"clip_norm": 1.0},
    "patience": {"patience": 4},
    "elbo": {"elbo": Trace_ELBO(num_particles=2)},
    "validation": {"validation": None},
    "data": {"data": digits(119)},
    "data, by their values": {"data": Split(digits().x.flip(0), digits().y, dynamic=True)},
    "data, by their labels": {"data": Split(digits().x, digits().y.flip(0), dynamic=True)},
    "data, by their bits": {"data": Split(digits().x.round(), digits().y)},
    "model": {"model": VAE(StandardNormal(2), Bernoulli(MLP(2, (1, 8, 8), (9,))))},
    "guide": {"guide": MeanFieldGuide(MLP((1, 8, 8), hidden=(8,), activation="elu"), 2)},
}


@pytest.mark.parametrize("name", CHANGED)
def test_resuming_with_other_settings_is_refused(tmp_path: Path, name: str) -> None:
    model, guide = pair()
    arguments: dict[str, Any] = {
        "model": model,
        "guide": guide,
        "data": digits(),
        "validation": held_out(),
        **QUIET,
    }
    data_of_bits = {"data": Split(digits().x.round(), digits().y)} if name.endswith("bits") else {}
    if data_of_bits:  # the same values with and without fresh bits
        arguments |= {"data": Split(digits().x.round(), digits().y, dynamic=True)}
    fit(**arguments, epochs=1, output=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    setting = name.split(",")[0]
    with pytest.raises(
        ValueError, match=f"^resume: {setting} differs from the run in .* there, .* here"
    ) as caught:
        fit(**arguments | CHANGED[name], epochs=2, output=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_one_estimator_object_may_train_and_resume(tmp_path: Path) -> None:
    """Pyro writes what it guesses of the plates into the estimator; that changes no setting."""
    elbo = TraceEnum_ELBO()
    fit(*pair(), digits(), elbo=elbo, epochs=1, output=tmp_path, **QUIET)
    run = fit(*pair(), digits(), elbo=elbo, epochs=2, output=tmp_path, resume=True, **QUIET)
    assert len(run.history) == 2


# -- a process that ends at any moment ---------------------------------------------------------------


class Killed(BaseException):
    """The end of the process, as far as the files are concerned."""


def test_a_kill_at_each_single_write_leaves_a_run_that_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that opens, syncs or renames a file of the run is once the last one."""
    options = {"validation": held_out(), "learning_rate": 3e-3, **QUIET}
    whole = fit(*pair(), digits(), epochs=2, **options)
    calls = 0
    last = 10**9

    def ending(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Killed
            return function(*args)

        return call

    monkeypatch.setattr(os, "fsync", ending(os.fsync))
    monkeypatch.setattr(os, "replace", ending(os.replace))
    fit(*pair(), digits(), epochs=2, output=tmp_path / "count", **options)
    total, done = calls, set()
    assert total == 2 * (1 + 3 + 3)  # settings; then model, history and checkpoint of two epochs
    for moment in range(1, total + 1):
        folder, calls, last = tmp_path / str(moment), 0, moment
        with pytest.raises(Killed):
            fit(*pair(), digits(), epochs=2, output=folder, **options)
        last = 10**9
        done.add(check_folder(folder))
        run = fit(*pair(), digits(), epochs=2, output=folder, resume=True, **options)
        assert equal(values(run.model, run.guide), values(whole.model, whole.guide)), moment
        assert without_time(run.history) == without_time(whole.history)
        assert equal(values(*pair_of(folder)), values(whole.model, whole.guide))
    assert done == {0, 1, 2}


def pair_of(folder: Path) -> tuple[nn.Module, nn.Module]:
    run = load_run(folder)
    return run.model, run.guide


def check_folder(folder: Path) -> int:
    """Check that a folder is a run with or without an epoch; return the number of epochs it holds."""
    if not (folder / "model.safetensors").exists():
        return 0
    run = load_run(folder)
    if run.history:
        assert [record["epoch"] for record in run.history] == list(range(1, len(run.history) + 1))
    return len(run.history)


EPOCHS, KILLS = 40, 20


def train(folder: Path, *, seed: int = 0, epochs: int = EPOCHS) -> Any:
    """Train a small pair on digits, resuming what is there."""
    torch.set_num_threads(1)
    return fit(
        *pair(seed, **NETWORK),
        digits(80),
        validation=held_out(),
        epochs=epochs,
        output=folder,
        resume=True,
        **QUIET,
    )


def warm_up() -> None:
    """Read the data and let torch import what its optimisers need: once, before children are forked."""
    digits()
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter], fused=True).step()


def in_child(task: Callable[[], object]) -> int:
    """Run a task in a fork of this process; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def wait_for(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(root: Path) -> dict[str, Any]:
    """Train once in peace, and once killed at random moments; return what was seen.

    The moments are spread over the whole run, from a process's start to the last epoch's file: each kill
    waits until some more epochs, 0 to 4, are in the history, and then for up to an epoch's time or, for 0,
    for up to the time that starting takes.
    """
    warm_up()
    child, begin = in_child(functools.partial(train, root / "whole")), time.perf_counter()
    started = wait_until(root / "whole", 1) - begin
    assert wait_for(child) == 0
    epoch_time = (time.perf_counter() - begin - started) / EPOCHS
    generator = random.Random(0)
    epochs, ended = [], 0
    for i in range(KILLS):
        wait = i % 5
        # the network's start matters until an epoch is saved, and no more
        seed = i if (root / "killed" / saving.CHECKPOINT).exists() else 0
        child = in_child(functools.partial(train, root / "killed", seed=seed))
        if wait:
            wait_until(root / "killed", min(check_history(root / "killed") + wait, EPOCHS))
        time.sleep(generator.uniform(0.0, 1.5 * epoch_time if wait else 1.5 * started))
        os.kill(child, signal.SIGKILL)
        ended += wait_for(child) == -signal.SIGKILL
        epochs.append(check_folder(root / "killed"))
    assert wait_for(in_child(functools.partial(train, root / "killed", seed=99))) == 0
    same = [
        (root / "killed" / name).read_bytes() == (root / "whole" / name).read_bytes()
        for name in ("model.safetensors", "checkpoint.safetensors")
    ]
    histories = [without_time(load_run(root / name).history) for name in ("killed", "whole")]
    return {"epochs": epochs, "ended": ended, "same": same, "same_history": histories[0] == histories[1]}


def interrupt(root: Path) -> dict[str, Any]:
    """Train without end until Ctrl-C comes in the third epoch or later; return what the run says then."""

    def task() -> None:
        run = train(root / "run", epochs=10**6)
        told = {"interrupted": run.interrupted, "epochs": len(run.history), "best": run.best_epoch}
        back = load_run(root / "run")
        told["same"] = equal(values(run.model, run.guide), values(back.model, back.guide))
        told["same_history"] = run.history == back.history
        (root / "told.json").write_text(json.dumps(told))

    child = in_child(task)
    wait_until(root / "run", 3)
    os.kill(child, signal.SIGINT)
    assert wait_for(child) == 0
    return json.loads((root / "told.json").read_text())


def check_history(folder: Path) -> int:
    return len(saving.read_history(folder)) if folder.exists() else 0


def wait_until(folder: Path, epochs: int) -> float:
    """Return the time when a run's history has so many epochs."""
    deadline = time.perf_counter() + 30
    while check_history(folder) < epochs:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"{epochs} epochs")
        time.sleep(0.001)
    return time.perf_counter()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what this file, as a process that forks its children, sees: torch is imported once for all."""
    root = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, __file__, str(root)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(seen: dict[str, dict[str, Any]]) -> None:
    killed = seen["killed"]
    assert killed["same"] == [True, True] and killed["same_history"]
    assert killed["epochs"] == sorted(killed["epochs"])  # no kill loses a finished epoch
    assert killed["ended"] > KILLS / 2 and killed["epochs"][-1] > EPOCHS / 2, killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ctrl_c_ends_with_the_last_epoch_saved(seen: dict[str, dict[str, Any]]) -> None:
    stopped = seen["interrupted"]
    assert stopped["interrupted"] and stopped["epochs"] >= 3
    assert stopped["same"] and stopped["same_history"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps({"killed": kill_and_resume(folder), "interrupted": interrupt(folder)}))
