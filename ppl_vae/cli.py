"""The command line: ``ppl-vae fit | evaluate | sample | plot``.

The settings of each piece are those of its class's constructor, the settings of a command those of
the function behind it. Errors in what the user gave end with one line and exit code 2.
"""

import argparse
import functools
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from ppl_vae._checks import check_positive_int, did_you_mean
from ppl_vae.data import Dataset, load_dataset
from ppl_vae.evaluation import evaluate
from ppl_vae.training import Run, fit, load_run
from ppl_vae.training.saving import CONFIG, read_yaml, write

SWITCHES = ("overwrite", "resume", "tensorboard", "progress", "init_bias")
# settings of a command that are no part of what the run is
PASSING = (
    "config",
    "output",
    "overwrite",
    "resume",
    "progress",
    "epochs",
    "device",
    "tensorboard",
    "num_particles",
    "root",
)


@dataclass(frozen=True)
class Part:
    """A piece that the user chooses by name."""

    help: str
    default: str | None
    packages: tuple[str, ...]
    given: tuple[str, ...]  # constructor arguments that come from the data or from other pieces


PARTS = {
    "model": Part(
        "the model", "VAE", ("ppl_vae.models",), ("prior", "likelihood", "latent_dim", "data_dim", "x_shape")
    ),
    "prior": Part("p(z)", "StandardNormal", ("ppl_vae.priors",), ("latent_dim",)),
    "likelihood": Part("p(x | z)", "Bernoulli", ("ppl_vae.likelihoods",), ("decoder",)),
    "decoder": Part("the likelihood's network", "MLP", ("ppl_vae.networks",), ("in_shape", "out_shape")),
    "guide": Part(
        "q(z | x)", "MeanFieldGuide", ("ppl_vae.guides",), ("encoder", "latent_dim", "x_shape", "features")
    ),
    "encoder": Part("the guide's network", "MLP", ("ppl_vae.networks",), ("in_shape", "out_shape")),
    "elbo": Part("the ELBO estimator", "Trace_ELBO", ("ppl_vae.infer", "pyro.infer"), ()),
    "optimizer": Part("a torch optimiser", "Adam", ("torch.optim",), ("params", "lr")),
    "scheduler": Part(
        "a torch scheduler, stepped every epoch", None, ("torch.optim.lr_scheduler",), ("optimizer",)
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {
        "fit": _fit,
        "evaluate": _evaluate,
        "sample": _sample,
        "plot": _plot,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    if words[0] == "--version":
        print(importlib.metadata.version("ppl-vae"))
        return 0
    name, rest = words[0], words[1:]
    if name not in commands:
        print(
            f"ppl-vae: error: unknown command {name!r}{did_you_mean(name, commands)}; "
            f"expected one of {', '.join(commands)}",
            file=sys.stderr,
        )
        return 2
    warnings.showwarning = lambda message, *_, **__: print(
        f"ppl-vae {name}: warning: {message}", file=sys.stderr
    )
    try:
        return commands[name](rest)
    except KeyboardInterrupt:
        print(f"ppl-vae {name}: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"ppl-vae {name}: error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("PPL_VAE_DEBUG"):
            raise
        print(f"ppl-vae {name}: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2


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


# -- fit -------------------------------------------------------------------------------------------


def _fit(words: list[str]) -> int:
    settings = _parse_fit(words)
    output = Path(settings["output"])
    chosen = {part: _resolve(part, settings[part]["class"]) for part in PARTS}
    dataset = load_dataset(settings["data"], root=settings["root"], binarization=settings["binarization"])
    latent_dim = check_positive_int("latent_dim", settings["latent_dim"])
    seed = settings["seed"]
    torch.manual_seed(seed if isinstance(seed, int) and seed >= 0 else 0)
    model, guide = _pair(chosen, settings, dataset.x_shape, latent_dim)
    if settings["init_bias"] and hasattr(getattr(model, "likelihood", None), "init_bias"):
        if hasattr(model.likelihood.decoder, "output_bias") and dataset.train.x.min() >= 0:
            model.likelihood.init_bias(dataset.train.x)
    plain = {k: v for k, v in settings.items() if k not in PASSING}
    run = fit(
        model,
        guide,
        dataset.train,
        validation=dataset.validation,
        elbo=_call(chosen["elbo"], "elbo", settings["elbo"]),
        optimizer=functools.partial(chosen["optimizer"], **_options(settings["optimizer"])),
        scheduler=functools.partial(chosen["scheduler"], **_options(settings["scheduler"]))
        if chosen["scheduler"]
        else None,
        notes={"command": plain},
        **{name: settings[name] for name in _fit_settings() if name in settings},
    )
    if run.interrupted:
        return 130
    _report(run, dataset, settings["num_particles"], settings["device"], settings["progress"])
    print(f"run: {output}")
    return 0


def _pair(
    chosen: Mapping[str, Any], settings: Mapping[str, Any], x_shape: tuple[int, ...], latent_dim: int
) -> tuple[Any, Any]:
    """Build model and guide: each piece gets its settings, and what it needs of data and other pieces."""
    out_shape = x_shape
    if settings["likelihood"].get("scale") == "network":
        out_shape = (2 * x_shape[0], *x_shape[1:])
    sizes = {"latent_dim": latent_dim, "x_shape": x_shape, "data_dim": x_shape[0]}

    def make(part: str, **given: Any) -> Any:
        made = chosen[part]
        if not inspect.isclass(made):  # a plain function is a program as it is
            return made
        wanted = inspect.signature(made).parameters
        for name in given.keys() & {"prior", "likelihood", "encoder", "decoder"}:
            if name in wanted:
                given[name] = given[name]()
        known = {name: value for name, value in (sizes | given).items() if name in wanted}
        return _call(made, part, settings[part], **known)

    decoder = functools.partial(make, "decoder", in_shape=latent_dim, out_shape=out_shape)
    model = make(
        "model",
        prior=functools.partial(make, "prior"),
        likelihood=functools.partial(make, "likelihood", decoder=decoder),
    )
    guide = make("guide", encoder=functools.partial(make, "encoder", in_shape=x_shape))
    return model, guide


def _call(made: Any, part: str, settings: Mapping[str, Any], **given: Any) -> Any:
    try:
        return made(**given, **_options(settings))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"--{part}: {error}") from error


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "class"}


def _fit_settings() -> list[str]:
    skipped = {"model", "guide", "data", "validation", "callbacks", "notes", *PARTS}
    return [name for name in inspect.signature(fit).parameters if name not in skipped]


def _parse_fit(words: list[str]) -> dict[str, Any]:
    words = _switches(words)
    words = _config_words(words) + _without_config(words)
    chosen = {part: _last_value(words, part) or PARTS[part].default for part in PARTS}
    parser = _parser("fit", "Train a pair on data, evaluate it, draw plots, and save all in a folder.")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; those given here win")
    parser.add_argument(
        "--data", default="digits", help="digits, mnist, fashion-mnist, an .npz file or a folder of images"
    )
    parser.add_argument("--root", help="folder that holds MNIST/raw or FashionMNIST/raw")
    parser.add_argument(
        "--binarization",
        type=str | None,
        default="dynamic",
        help="dynamic (fresh bits per visit), static, threshold or null (grey values)",
    )
    parser.add_argument("--latent_dim", type=int, default=16, help="the number of latent dimensions")
    parser.add_argument(
        "--init_bias",
        type=bool,
        default=True,
        help="start the output bias at the logit of the data mean, where likelihood and decoder can",
    )
    parser.add_argument(
        "--num_particles", type=int, default=1000, help="draws per datum of the final evaluation's log p(x)"
    )
    for part, info in PARTS.items():
        made = _resolve(part, chosen[part])
        if inspect.isclass(made):
            skip: set[str | int] = {name for name in inspect.signature(made).parameters if name in info.given}
            parser.add_class_arguments(made, part, skip=skip, fail_untyped=False)
        parser.add_argument(f"--{part}.class", default=chosen[part]).help = argparse.SUPPRESS
        _name_option(parser, part, info)
    keep = set(_fit_settings())
    parser.add_function_arguments(
        fit, skip={name for name in inspect.signature(fit).parameters if name not in keep}, fail_untyped=False
    )
    parser.set_defaults(output="runs/digits")
    if chosen["optimizer"] == "Adam":
        parser.set_defaults({"optimizer.fused": True})
    data = _last_value(words, "data")
    if data:
        parser.set_defaults(output=f"runs/{Path(data).stem}")
    settings = _parse(parser, [_part_word(word) for word in words])
    return settings | {part: settings[part] or {"class": chosen[part]} for part in PARTS}


def _name_option(parser: ArgumentParser, part: str, info: Part) -> None:
    """Let ``--help`` show ``--part NAME``."""
    names = ", ".join(_known(part)) if len(_known(part)) < 12 else f"a class of {info.packages[-1]}"
    text = f"{info.help}: {names}, or your own as file.py:Name (default: {info.default})".replace("%", "%%")
    for action in parser._actions:
        if f"--{part}" in action.option_strings:
            action.help, action.metavar = text, "NAME"
            return
    parser.add_argument(f"--{part}", metavar="NAME", help=text)


def _config_words(words: list[str]) -> list[str]:
    """Return the settings of ``--config``, or of the run to resume, as words of the command line."""
    path = _last_value(words, "config")
    output = _last_value(words, "output")
    if path is None and output and _last_value(words, "resume") == "true":
        path = str(Path(output) / CONFIG) if (Path(output) / CONFIG).is_file() else None
    if path is None:
        return []
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: expected a YAML file, found none at {path}")
    settings = read_yaml(Path(path))
    if isinstance(settings.get("notes"), dict):  # the settings that a run keeps
        settings = {"epochs": settings.get("epochs", 100), **(settings["notes"].get("command") or {})}
    result = []
    for key, value in settings.items():
        entries = value if key in PARTS and isinstance(value, dict) else {"": value}
        for name, entry in entries.items():
            flag = f"--{key}" if name in ("", "class") else f"--{key}.{name}"
            if name in ("", "class") and key in PARTS and entry is None:
                continue
            result.append(f"{flag}={entry if isinstance(entry, str) else json.dumps(entry)}")
    return result


def _without_config(words: list[str]) -> list[str]:
    result, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--config":
            skip = True
        elif not word.startswith("--config="):
            result.append(word)
    return result


def _part_word(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"{name}.class{equals}{value}" if name.removeprefix("--") in PARTS else word


def _switches(words: list[str]) -> list[str]:
    """Let ``--resume`` stand for ``--resume true``."""
    result = []
    for i, word in enumerate(words):
        alone = i + 1 == len(words) or words[i + 1].startswith("--")
        result.append(f"{word}=true" if word.removeprefix("--") in SWITCHES and alone else word)
    return result


def _last_value(words: list[str], name: str) -> str | None:
    value = None
    for i, word in enumerate(words):
        if word == f"--{name}" and i + 1 < len(words):
            value = words[i + 1]
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


# -- classes by name -------------------------------------------------------------------------------


def _known(part: str) -> dict[str, Any]:
    from pyro.infer import ELBO

    found: dict[str, Any] = {}
    for package in PARTS[part].packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", dir(module)):
            value = getattr(module, name)
            if inspect.isclass(value) and not name.startswith("_"):
                if part == "elbo" and (not issubclass(value, ELBO) or value is ELBO):
                    continue
                found[name] = value
    return found


def _resolve(part: str, name: str | None) -> Any:
    """Return the class or function of a short name, ``package.module.Name`` or ``file.py:Name``."""
    if name is None:
        return None
    known = _known(part)
    if name in known:
        return known[name]
    location, colon, attribute = name.rpartition(":")
    if not colon:
        location, _, attribute = name.rpartition(".")
    if not location:
        raise ValueError(
            f"--{part}: unknown {name!r}{did_you_mean(name, known)}; expected one of {', '.join(known)}, "
            "or your own as file.py:Name"
        )
    module = _import(part, location)
    if not hasattr(module, attribute):
        near = did_you_mean(attribute, [n for n in dir(module) if not n.startswith("_")])
        raise ValueError(f"--{part}: {location} has no {attribute!r}{near}")
    return getattr(module, attribute)


def _import(part: str, location: str) -> Any:
    if not location.endswith(".py"):
        try:
            return importlib.import_module(location)
        except ImportError as error:
            raise ValueError(f"--{part}: can't import {location!r}: {error}") from None
    path = Path(location)
    if not path.is_file():
        raise FileNotFoundError(f"--{part}: expected a Python file, found none at {location}")
    if path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) == str(path.resolve()):
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None:
        raise ValueError(f"--{part}: can't import {location}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise ValueError(f"--{part}: {location} fails: {type(error).__name__}: {error}") from error
    return module


# -- saved runs ------------------------------------------------------------------------------------


def _evaluate(words: list[str]) -> int:
    parser = _run_parser("evaluate", "Measure ELBO, its parts and log p(x) of a saved run, nats per datum.")
    parser.add_argument("--split", default="test", help="train, validation or test")
    own: set[str | int] = {"model", "guide", "data"}
    parser.add_function_arguments(evaluate, skip=own, fail_untyped=False)
    settings = _parse(parser, _switches(words))
    run, dataset = _load(settings)
    if settings["split"] not in ("train", "validation", "test"):
        near = did_you_mean(settings["split"], ["train", "validation", "test"])
        raise ValueError(f"--split: expected train, validation or test, got {settings['split']!r}{near}")
    names = [name for name in inspect.signature(evaluate).parameters if name not in own]
    split = getattr(dataset, settings["split"])
    result = evaluate(run.model, run.guide, split, **{name: settings[name] for name in names})
    print(result)
    return 0


def _sample(words: list[str]) -> int:
    parser = _run_parser("sample", "Draw data from a saved run's prior.")
    parser.add_argument("--size", type=int, default=64, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--output", help="an .npz file (x: draws, mean: means) or a .png; default RUN/samples.npz"
    )
    settings = _parse(parser, words)
    output = Path(settings["output"] or Path(settings["run"]) / "samples.npz")
    if output.suffix not in (".npz", ".png"):
        raise ValueError(f"--output: expected a file ending in .npz or .png, got {str(output)!r}")
    check_positive_int("size", settings["size"])
    run = _load_run(settings)

    from ppl_vae._random import seeded
    from ppl_vae.evaluation.generation import sample

    with seeded(settings["seed"]):
        samples = sample(run.model, settings["size"])
    if output.suffix == ".npz":
        import numpy as np

        np.savez(output, x=samples.x.numpy(), mean=samples.mean.numpy())
    else:
        from ppl_vae.plots import plot_samples

        _save(plot_samples(samples), output)
    print(f"samples: {output}")
    return 0


def _plot(words: list[str]) -> int:
    settings = _parse(_run_parser("plot", "Draw the plots of a saved run into RUN/plots."), words)
    run, dataset = _load(settings)
    print(f"plots: {_draw(run, dataset)}")
    return 0


def _run_parser(command: str, description: str) -> ArgumentParser:
    parser = _parser(command, description)
    parser.add_argument("run", metavar="RUN", help="the folder of a saved run")
    parser.add_argument("--data", help="other data than the run's: a name or a path, as for `ppl-vae fit`")
    parser.add_argument("--root", help="folder that holds MNIST/raw or FashionMNIST/raw")
    parser.add_argument(
        "--classes",
        type=list[str],
        default=[],
        metavar="[file.py:Name, ...]",
        help="your own classes that the run is made of; without it nothing of a run's folder is executed",
    )
    return parser


def _load_run(settings: Mapping[str, Any]) -> Run:
    classes = [_resolve("model", name) for name in settings["classes"]]
    return load_run(settings["run"], classes=classes)


def _load(settings: Mapping[str, Any]) -> tuple[Run, Dataset]:
    run = _load_run(settings)
    source = run.config["data"].get("source")
    if not isinstance(source, dict):
        source = {}
    name = settings["data"] or source.get("name")
    if name is None:
        raise ValueError("--data: the run was trained on tensors of yours; name the data, a file or a folder")
    return run, load_dataset(name, root=settings["root"], binarization=source.get("binarization"))


def _report(run: Run, dataset: Dataset, num_particles: int, device: Any, progress: bool) -> None:
    result = evaluate(
        run.model, run.guide, dataset.test, num_particles=num_particles, device=device, progress=progress
    )
    import yaml

    folder = run.path or Path()
    write(
        folder / "evaluation.yaml",
        yaml.safe_dump({"split": "test"} | result.summary(), sort_keys=False).encode(),
    )
    print(result)
    print(f"plots: {_draw(run, dataset)}")


def _draw(run: Run, dataset: Dataset) -> Path:
    """Draw every plot that the run's data allow into its folder of plots."""
    from ppl_vae import plots
    from ppl_vae._random import seeded
    from ppl_vae.evaluation.generation import encode, interpolate, reconstruct, sample, traverse
    from ppl_vae.infer.placing import place
    from ppl_vae.infer.running import batch_arguments

    folder = (run.path or Path()) / "plots"
    folder.mkdir(exist_ok=True)
    device = place(None, run.model, run.guide)
    test = dataset.test.to(device)
    images = len(dataset.x_shape) == 3 and dataset.x_shape[0] in (1, 3)
    with seeded(0):
        batch = batch_arguments(run.model, test.batch(torch.arange(min(len(test), 5000), device=device)))
        latents = encode(run.guide, *batch, y=None if test.y is None else test.y[: len(batch[0])])
        drawn = {"history": plots.plot_history(run.history), "latents": plots.plot_latents(latents)}
        if images:
            few = tuple(tensor[:30] for tensor in batch)
            pairs = min(5, len(latents.z) // 2)
            z = latents.z.to(device)
            drawn |= {
                "reconstructions": plots.plot_reconstructions(reconstruct(run.model, run.guide, *few)),
                "samples": plots.plot_samples(sample(run.model, 64)),
                "traversal": plots.plot_traversal(traverse(run.model, torch.zeros_like(z[0]))),
                "interpolation": plots.plot_interpolation(
                    interpolate(run.model, z[:pairs], z[pairs : 2 * pairs])
                ),
            }
    for name, axes in drawn.items():
        _save(axes, folder / f"{name}.png")
    return folder


def _save(axes: Any, path: Path) -> None:
    try:
        axes.figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise OSError(f"output: can't write {path}: {error.strerror}") from None


# -- parsing ---------------------------------------------------------------------------------------


def _parser(command: str, description: str) -> ArgumentParser:
    usage = f"ppl-vae {command}{' RUN' if command != 'fit' else ''} [--setting VALUE ...]"
    return ArgumentParser(
        prog=f"ppl-vae {command}", usage=usage, description=description, exit_on_error=False
    )


def _parse(parser: ArgumentParser, words: list[str]) -> dict[str, Any]:
    """Return the settings as nested dictionaries; one line says what is wrong with them."""
    try:
        settings: Namespace = parser.parse_args(words)
    except SystemExit:
        raise
    except Exception as error:
        raise ValueError(_one_line(str(error), parser)) from None
    return {
        key: vars(value) if isinstance(value, Namespace) else value for key, value in vars(settings).items()
    }


def _one_line(message: str, parser: ArgumentParser) -> str:
    text = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (--[\w.]+)", text):
        options = [o for action in parser._actions for o in action.option_strings if o.startswith("--")]
        return f"unknown setting {match[1]}{did_you_mean(match[1], options)}"
    text = re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", text)
    text = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", text)
    text = re.sub(
        r"Does not validate against any of the Union subtypes Subtypes: [\[(](.*?)[\])] Errors: .* "
        r"Given value: (.*)$",
        r"expected one of \1; got \2",
        text,
    )
    return re.sub(r"Expected an? (.*?)\. Got value: (.*)$", r"expected \1, got \2", text)
