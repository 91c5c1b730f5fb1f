"""The commands: what they are told, what they do with it, what they print."""

import functools
import inspect
import io
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ppl_vae import plots
from ppl_vae._checks import check_choice, check_positive_int, check_seed, did_you_mean
from ppl_vae._random import seeded
from ppl_vae.cli.pieces import (
    NESTED,
    PIECES,
    ROOTS,
    arguments,
    build,
    find,
    known,
    resolve,
    settings_of_pieces,
)
from ppl_vae.cli.settings import REQUIRED, Setting, flatten, format_help, nest, settings_of, split_words
from ppl_vae.data import Dataset, load_dataset
from ppl_vae.description import describe, library_classes
from ppl_vae.evaluation import encode, evaluate, interpolate, reconstruct, sample, traverse
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import batch_arguments
from ppl_vae.training import Run, fit, load_run
from ppl_vae.training.saving import CONFIG, EVALUATION, read_config, read_yaml, write

_TEXT = str | None
_USAGE = """usage: ppl-vae COMMAND [--setting VALUE ...]

Variational autoencoders as Pyro model / guide pairs.

  fit       train a pair on data, evaluate it, draw plots, save all in a folder
  evaluate  ELBO, its parts and log p(x) of a saved run
  sample    draw data from a saved run's prior
  plot      draw the plots of a saved run again

ppl-vae fit                          a small VAE on handwritten digits, in under a minute
ppl-vae fit --data mnist --output runs/mnist
ppl-vae fit --encoder ConvEncoder --decoder ConvDecoder --latent_dim 8 --output runs/conv
ppl-vae COMMAND --help               all settings; with --guide NAME etc. those of that class"""


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: the command line after ``ppl-vae``; by default the process's.

    Returns:
        The exit code: 2 for wrong input, 1 for a loss that became NaN, 130 for Ctrl-C.
    """
    name, *rest = (sys.argv[1:] if words is None else words) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    if name == "--version":
        print(version("ppl-vae"))
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _complain(f"{name}: warning: {message}")
        warnings.filterwarnings("ignore", "interrupted: |Encountered NaN")  # said in another way
        try:
            check_choice("command", name, _COMMANDS)
            return _COMMANDS[name](["--help" if word == "-h" else word for word in rest])
        except KeyboardInterrupt:
            _complain(f"{name}: interrupted")
            return 130
        except FloatingPointError as error:
            _complain(f"{name}: error: {error}")
            return 1
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            _complain(f"{name}: error: {_as_setting(str(error) or type(error).__name__)}")
            return 2


def _complain(text: str) -> None:
    line = text.strip().splitlines()[0]
    print("ppl-vae", "".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)


def _as_setting(reason: str) -> str:
    """Write the argument that an error of the library begins with as the user types it."""
    name = re.split(r"[:.\[]", reason, maxsplit=1)[0]
    return f"--{reason}" if name in _fit_settings() | _run_settings() else reason


# -- settings of commands --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Settings by name, from the command line, from a file of the user's, or from a saved run.

    Attributes:
        values: words, or plain data.
        prefix: what comes before a setting's name in an error.
        trusted: whether what it names may be imported.
    """

    values: dict[str, Any]
    prefix: str = "--"
    trusted: bool = True


class _Settings(dict[str, tuple[Any, _Source]]):
    """Settings of several sources, of which later ones win, as they were given."""

    def __init__(self, *sources: _Source) -> None:
        super().__init__()
        for source in sources:
            for piece, info in PIECES.items():  # the settings of a class that another one replaces
                if piece in source.values and source.values[piece] != self.get(piece, [info.default])[0]:
                    for name in [name for name in self if name.startswith(f"{piece}.")]:
                        del self[name]
            self.update({name: (value, source) for name, value in source.values.items()})

    def value(self, name: str, setting: Setting) -> Any:
        """Return the value of a setting, its default if nobody gave one."""
        if name not in self:
            if setting.default is REQUIRED:
                raise ValueError(f"--{name}: expected a value, got none")
            return setting.default
        value, source = self[name]
        try:
            return setting.read(value)
        except ValueError as error:
            raise ValueError(f"{source.prefix}{name}: {error}") from None

    def values_in(self, table: Mapping[str, Setting]) -> dict[str, Any]:
        """Return the value of every setting of the table; a class's own defaults are left to the class."""
        for name, (_, source) in self.items():
            if name not in table:
                near = did_you_mean(name, [n for n in table if ("." in n) == ("." in name)])
                raise ValueError(f"{source.prefix}{name}: unknown setting{near}")
        values = {name: self.value(name, setting) for name, setting in table.items()}
        return {name: value for name, value in values.items() if name in self or "." not in name}


def _fit_settings() -> dict[str, Setting]:
    """Return the settings of ``fit`` but those of the classes."""
    data, training, folder = "data", "training", "the run's folder"
    pieces = "the pieces, whose own settings are listed below"
    of_fit = settings_of(fit, group=training)
    return {
        "data": Setting(
            "digits, mnist, fashion-mnist, an .npz file or a folder of images", str, "digits", data, "NAME"
        ),
        "binarization": Setting(
            "dynamic (fresh bits per visit), static, threshold, or null for values as they are",
            *(_TEXT, "dynamic", data, "NAME"),
        ),
        "root": Setting("folder that holds MNIST/raw or FashionMNIST/raw", _TEXT, None, data, "FOLDER"),
        **{name: of_fit[name] for name in ("epochs", "batch_size", "learning_rate", "clip_norm", "patience")},
        "init_bias": Setting(
            "start the output bias at the logit of the data mean, where likelihood and decoder can",
            *(bool, True, training),
        ),
        "seed": of_fit["seed"],
        "device": Setting("cpu, cuda or cuda:N", _TEXT, None, training, "NAME"),
        "progress": _progress(training),
        "output": Setting("by default runs/ and the data's name", _TEXT, None, folder, "FOLDER"),
        **{name: replace(of_fit[name], group=folder) for name in ("resume", "overwrite", "tensorboard")},
        "num_particles": Setting("draws per datum of the final log p(x)", int, 1000, folder),
        "config": Setting("YAML file of settings; those on the command line win", str, None, folder, "FILE"),
        "latent_dim": Setting("number of latent dimensions", int, 16, pieces),
        **{
            piece: Setting(
                f"{info.help}: {', '.join(known(piece))}, or your own as file.py:Name",
                *(str if info.default else _TEXT, info.default, pieces, "NAME"),
            )
            for piece, info in PIECES.items()
        },
    }


def _run_settings() -> dict[str, Setting]:
    """Return the settings of the commands on saved runs."""
    group = "settings"
    return {
        "split": Setting("train, validation or test", str, "test", group),
        "data": Setting("other data than the run's: a name or a path", _TEXT, None, group, "NAME"),
        "root": Setting("folder that holds MNIST/raw or FashionMNIST/raw", _TEXT, None, group, "FOLDER"),
        **settings_of(evaluate, skip=("model", "guide", "data", "device", "progress"), group=group),
        "device": Setting("cpu, cuda or cuda:N", _TEXT, None, group, "NAME"),
        "progress": _progress(group),
        "size": Setting("how many data to draw", int, 64, group),
        "output": Setting(
            "an .npz file (x: draws, mean: their means) or a .png; by default RUN/samples.npz",
            *(_TEXT, None, group, "FILE"),
        ),
        "classes": Setting(
            "your own classes or functions that the run is made of: file.py:Name,file.py:Other; nothing else "
            "that a run names is imported",
            *(_TEXT, None, group, "NAMES"),
        ),
    }


def _progress(group: str) -> Setting:
    return Setting("show a progress bar", bool, sys.stderr.isatty(), group)


# -- fit -------------------------------------------------------------------------------------------

# settings that are no part of what the run is
_PASSING = {
    *("config", "output", "overwrite", "resume", "root", "epochs", "device", "progress", "tensorboard"),
    "num_particles",
}


def _fit(words: list[str]) -> int:
    positional, typed = split_words(words)
    wants_help = typed.pop("help", None) is not None
    if positional:
        raise ValueError(f"expected --setting VALUE, got {positional[0]!r}")
    core, sources, saved = _fit_settings(), [_Source(typed)], None
    if "config" in typed:
        sources.insert(0, _read_config(_Settings(*sources).value("config", core["config"])))
    settings = _Settings(*sources)
    data, output, overwrite, resume = (
        settings.value(name, core[name]) for name in ("data", "output", "overwrite", "resume")
    )
    if resume and overwrite:
        raise ValueError("--resume: expected either --resume or --overwrite, got both")
    folder = Path(output or f"runs/{Path(data).resolve().stem or 'data'}")
    if resume and (folder / CONFIG).is_file():
        saved = _settings_of_run(read_config(folder), folder / CONFIG)
        settings = _Settings(saved, *sources)
    chosen = _choose(settings, core, typed)
    table = core | settings_of_pieces(chosen)
    if wants_help:
        text = "Train a pair on data, evaluate it, draw plots, and save all in a folder."
        print(format_help("ppl-vae fit [--setting VALUE ...]", text, table))
        return 0
    values = settings.values_in(table)
    check_positive_int("num_particles", values["num_particles"])
    if saved is None:
        command = {name: values[name] for name in settings if name not in _PASSING}
    else:
        command = {name: value for name, value in saved.values.items() if name not in _PASSING}
        _check_unchanged(settings, values, table, saved)
    own = [f"--{piece}={values[piece]}" for piece in chosen if values[piece] not in {None, *known(piece)}]
    try:
        run, dataset = _train(
            values | {"output": folder, "notes": {"command": nest(command, PIECES)}}, chosen
        )
        if run.interrupted:
            raise KeyboardInterrupt
        _measure(
            run, dataset, "test", {name: values[name] for name in ("num_particles", "device", "progress")}
        )
        print(f"plots: {_draw(run, dataset)}")
    except KeyboardInterrupt:
        again = shlex.join(["ppl-vae", "fit", "--output", str(folder), *own, "--resume"])
        _complain(f"fit: interrupted; continue with `{again}`")
        return 130
    print(f"run: {folder}")
    return 0


def _read_config(path: str) -> _Source:
    """Return the settings of the user's file, or those in the ``config.yaml`` of a run."""
    try:
        settings = read_yaml(Path(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"--config: {error}") from error
    if "format" in settings:
        return _settings_of_run(settings, Path(path))
    if "config" in settings:
        raise ValueError(f"--config {path}: config: expected the settings themselves, got another file")
    return _Source(flatten(settings, PIECES), f"--config {path}: ")


def _settings_of_run(config: Mapping[str, Any], path: Path) -> _Source:
    """Return the settings that ``fit`` kept in a run."""
    notes = config.get("notes")
    command = notes.get("command") if isinstance(notes, dict) else None
    if not isinstance(command, dict):
        raise ValueError(f"{path}: expected a run of `ppl-vae fit`; go on with this one in Python")
    kept = {name: value for name, value in flatten(command, PIECES).items() if name not in _PASSING}
    return _Source(kept | {"epochs": config.get("epochs")}, f"{path}: ", trusted=False)


def _choose(settings: _Settings, core: Mapping[str, Setting], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class or function of each piece; forget the settings of pieces that none takes."""
    chosen: dict[str, Any] = {}
    given = {piece: settings[piece] for piece in PIECES if piece in settings}
    strange = [
        f"--{p} {name}" for p, (name, source) in given.items() if not (source.trusted or name in known(p))
    ]
    if strange:
        raise ValueError(
            f"--resume, --config: nothing that a run names is imported; if you trust what this one is made of, "
            f"add {' '.join(strange)}"
        )

    def choose(piece: str) -> None:
        chosen[piece] = resolve(settings.value(piece, core[piece]), piece)
        for argument in arguments(chosen[piece]):
            if argument in NESTED:
                choose(argument)

    for piece in ROOTS:
        choose(piece)
    for name in list(settings):
        piece = name.partition(".")[0]
        if piece in PIECES and piece not in chosen:
            _, source = settings.pop(name)
            if name in typed or not typed.keys() & PIECES.keys():
                raise ValueError(f"{source.prefix}{name}: the other pieces take no {piece}")
    return chosen


def _check_unchanged(
    settings: _Settings, values: Mapping[str, Any], table: Mapping[str, Setting], saved: _Source
) -> None:
    """Raise if a setting differs from the one of the run to resume."""
    before = _Settings(saved)
    for name in settings:
        if name not in _PASSING:
            old = before.value(name, table[name])
            if describe(old) != describe(values[name]):
                raise ValueError(f"--{name}: the run to resume was made with {old!r}, got {values[name]!r}")


def _train(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[Run, Dataset]:
    """Build the pair for the data and train it."""
    latent_dim, seed = check_positive_int("latent_dim", values["latent_dim"]), check_seed(values["seed"])
    options: dict[str, dict[str, Any]] = {piece: {} for piece in chosen}
    for name, value in values.items():
        piece, dot, argument = name.partition(".")
        if dot:
            options[piece][argument] = value
    dataset = _load_data(values["data"], values["root"], values["binarization"])
    x_shape = out_shape = dataset.x_shape
    if options.get("likelihood", {}).get("scale") == "network":
        out_shape = (2 * x_shape[0], *x_shape[1:])
    data_dim = x_shape[0] if len(x_shape) == 1 else None
    sizes = {piece: {"latent_dim": latent_dim, "x_shape": x_shape, "data_dim": data_dim} for piece in chosen}
    if "decoder" in chosen:
        sizes["decoder"] |= {"in_shape": latent_dim, "out_shape": out_shape}
    if "encoder" in chosen:
        sizes["encoder"] |= {"in_shape": x_shape}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        model, guide, elbo = (build(piece, chosen, options, sizes) for piece in ("model", "guide", "elbo"))
    likelihood: Any = getattr(model, "likelihood", None)
    in_range = dataset.train.x.min() >= 0 and dataset.train.x.max() <= 1
    if values["init_bias"] and in_range and hasattr(likelihood, "init_bias"):
        if hasattr(likelihood.decoder, "output_bias"):
            likelihood.init_bias(dataset.train.x)
    if chosen["optimizer"] is torch.optim.Adam:
        options["optimizer"] = {"fused": True} | options["optimizer"]
    optimizer, scheduler = (
        made and functools.partial(made, **options[piece])
        for piece, made in ((piece, chosen[piece]) for piece in ("optimizer", "scheduler"))
    )
    own = {"model", "guide", "data", "validation", "elbo", "optimizer", "scheduler"}
    run = fit(
        model,
        guide,
        dataset.train,
        validation=dataset.validation,
        elbo=elbo,
        optimizer=optimizer,
        scheduler=scheduler,
        **{
            name: values[name]
            for name in inspect.signature(fit).parameters
            if name in values and name not in own
        },
    )
    return run, dataset


# -- saved runs ------------------------------------------------------------------------------------


def _evaluate(words: list[str]) -> int:
    own = tuple(name for name in inspect.signature(evaluate).parameters if name in _run_settings())
    text = "Measure ELBO, its parts and log p(x) of a saved run; keep them in RUN/evaluation.yaml."
    told = _told("evaluate", text, words, ("split", *own, "root", "classes"))
    if told is None:
        return 0
    folder, values = told
    check_choice("split", values["split"], ("train", "validation", "test"))
    run = _load_run(folder, values["classes"])
    dataset = _data_of(run, values)
    _measure(run, dataset, values["split"], {name: values[name] for name in own if name != "data"})
    return 0


def _sample(words: list[str]) -> int:
    told = _told(
        "sample", "Draw data from a saved run's prior.", words, ("size", "seed", "output", "classes")
    )
    if told is None:
        return 0
    folder, values = told
    size, seed = check_positive_int("size", values["size"]), check_seed(values["seed"])
    output = Path(values["output"] or folder / "samples.npz")
    if output.suffix not in (".npz", ".png"):
        raise ValueError(f"--output: expected a file ending in .npz or .png, got {str(output)!r}")
    run = _load_run(folder, values["classes"])
    with seeded(seed):
        samples = sample(run.model, size)
    if output.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, x=samples.x.numpy(), mean=samples.mean.numpy())
        _write(output, file.getvalue())
    else:
        _save_figure(plots.plot_samples(samples), output)
    print(f"samples: {output}")
    return 0


def _plot(words: list[str]) -> int:
    text = "Draw the plots of a saved run into RUN/plots."
    told = _told("plot", text, words, ("data", "root", "classes"))
    if told is None:
        return 0
    folder, values = told
    run = _load_run(folder, values["classes"])
    print(f"plots: {_draw(run, _data_of(run, values))}")
    return 0


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fit": _fit,
    "evaluate": _evaluate,
    "sample": _sample,
    "plot": _plot,
}


def _told(
    command: str, description: str, words: list[str], names: Sequence[str]
) -> tuple[Path, dict[str, Any]] | None:
    """Return the run's folder and the settings of a command on it; None if it was asked for help."""
    table = {name: setting for name, setting in _run_settings().items() if name in names}
    folders, typed = split_words(words)
    if "help" in typed:
        print(format_help(f"ppl-vae {command} RUN [--setting VALUE ...]", description, table))
        return None
    if len(folders) != 1:
        got = ", ".join(map(repr, folders)) or "none"
        raise ValueError(f"RUN: expected the folder of a saved run, as in `ppl-vae {command} RUN`, got {got}")
    return Path(folders[0]), _Settings(_Source(typed)).values_in(table)


def _load_run(folder: Path, names: str | None) -> Run:
    """Load a run that is made of the library's classes and of the user's that are named."""
    own = [find(name.strip(), "--classes") for name in (names or "").split(",") if name.strip()]
    config = read_config(folder)
    allowed = {path for made in own for path in describe(made).values()}
    missing = _paths({role: config[role] for role in ("model", "guide")}) - allowed - library_classes().keys()
    if missing:
        needed = ",".join(re.sub(r"^(\w+)\.(\w+)$", r"\1.py:\2", path) for path in sorted(missing))
        raise ValueError(
            f"--classes: {folder} is made of classes or functions that are not the library's; "
            f"if you trust them, add --classes {needed}"
        )
    programs = {
        role: made
        for role in ("model", "guide")
        for made in own
        if not inspect.isclass(made) and describe(made) == config[role]
    }
    return load_run(folder, classes=[made for made in own if inspect.isclass(made)], **programs)


def _paths(description: Any) -> set[str]:
    """Return the classes and functions that a description names."""
    if isinstance(description, list):
        return set().union(*map(_paths, description))
    if not isinstance(description, dict):
        return set()
    named = {str(description[key]) for key in ("class", "function") if key in description}
    return named.union(*map(_paths, description.values()))


def _data_of(run: Run, values: Mapping[str, Any]) -> Dataset:
    """Load the data that a run was trained on, or others that were named."""
    source = run.config["data"].get("source")
    source = source if isinstance(source, dict) else {}
    name = values["data"] or source.get("name")
    if name is None:
        raise ValueError("--data: expected a name or a path, since the run was trained on tensors, got none")
    return _load_data(name, values["root"], source.get("binarization"))


def _load_data(name: Any, root: str | None, binarization: Any) -> Dataset:
    try:
        return load_dataset(name, root, binarization)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).removeprefix("name: ")
        raise ValueError(reason if reason.startswith("binarization: ") else f"--data: {reason}") from error


def _measure(run: Run, dataset: Dataset, split: str, options: Mapping[str, Any]) -> None:
    """Evaluate a run; print what was found and write it into the run's folder."""
    result = evaluate(run.model, run.guide, getattr(dataset, split), **options)
    print(result)
    found = {"data": dataset.name, "split": split, "epoch": run.best_epoch} | result.summary()
    _write(_folder(run) / EVALUATION, yaml.safe_dump(found, sort_keys=False).encode())


def _folder(run: Run) -> Path:
    return run.path or Path()


def _draw(run: Run, dataset: Dataset) -> Path:
    """Draw every plot that the run and its data allow into the run's folder."""
    folder = _folder(run) / "plots"
    device = place(None, run.model, run.guide)
    test = dataset.test.to(device)
    with seeded(0):
        batch = batch_arguments(run.model, test.batch(torch.arange(min(len(test), 5000), device=device)))
        latents = encode(run.guide, *batch, y=None if test.y is None else test.y[: len(batch[0])])
        z, pairs = latents.z.to(device), min(5, len(latents.z) // 2)
        drawings: dict[str, Callable[[], Any]] = {
            "history": lambda: plots.plot_history(run.history),
            "latents": lambda: plots.plot_latents(latents),
        }
        if len(dataset.x_shape) == 3 and dataset.x_shape[0] in (1, 3):
            few = tuple(tensor[:30] for tensor in batch)
            drawings |= {
                "reconstructions": lambda: plots.plot_reconstructions(
                    reconstruct(run.model, run.guide, *few)
                ),
                "samples": lambda: plots.plot_samples(sample(run.model, 64)),
                "traversal": lambda: plots.plot_traversal(traverse(run.model, torch.zeros_like(z[0]))),
                "interpolation": lambda: plots.plot_interpolation(
                    interpolate(run.model, z[:pairs], z[pairs : 2 * pairs])
                ),
            }
        for name, draw in drawings.items():
            try:
                axes = draw()
            except Exception as error:  # a program of the user's need not allow all
                warnings.warn(f"no plot of {name}: {error}", stacklevel=2)
            else:
                _save_figure(axes, folder / f"{name}.png")
    return folder


def _save_figure(axes: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    axes.figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(axes.figure)
    _write(path, file.getvalue())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        write(path, content)
    except OSError as error:
        raise OSError(f"--output: can't write {path}: {error.strerror}") from error
