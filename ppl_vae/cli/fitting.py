"""``ppl-vae fit``."""

import functools
import inspect
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ppl_vae
from ppl_vae._checks import check_positive_int, check_seed, check_sizes
from ppl_vae._random import seeded
from ppl_vae.cli.pieces import (
    PIECES,
    ROOTS,
    SUITED,
    arguments,
    build,
    full_name,
    is_a,
    known,
    parts,
    resolve,
    settings_of_pieces,
)
from ppl_vae.cli.saved import draw, load_data, measure
from ppl_vae.cli.settings import Given, Help, Setting, Source, format_help, settings_of, split_words
from ppl_vae.data import Dataset, semi_supervised
from ppl_vae.description import describe
from ppl_vae.guides import FlowGuide
from ppl_vae.infer.checking import check_all
from ppl_vae.infer.placing import prepare_data
from ppl_vae.likelihoods import Autoregressive, NegativeBinomial, Poisson
from ppl_vae.models import CVAE, HierarchicalVAE, SemiSupervisedVAE, VeryDeepVAE
from ppl_vae.priors import ConditionalNormal, VampPrior
from ppl_vae.training import Run
from ppl_vae.training.saving import CONFIG, read_config, read_yaml


def _fit_settings() -> dict[str, Setting]:
    data, training, folder = "data", "training", "the run's folder"
    pieces = "the pieces, whose own settings are listed below"
    of_fit = settings_of(ppl_vae.fit, group=training)
    return {
        "data": Setting(
            "digits, mnist, fashion-mnist, sprites, dsprites, an .npz file or a folder of images",
            str,
            "digits",
            data,
            "NAME",
        ),
        "binarization": Setting(
            "dynamic (fresh bits per visit), static, threshold, or null for values as they are; by default "
            "dynamic where x are bits, else null",
            *(str | None, None, data, "NAME"),
        ),
        "labels": Setting(
            "how many training data keep their label, in balance, for SemiSupervisedVAE; null for all",
            *(int | None, None, data),
        ),
        "root": Setting("folder that holds MNIST/raw or FashionMNIST/raw", group=data, metavar="FOLDER"),
        **{name: of_fit[name] for name in ("epochs", "batch_size", "learning_rate", "clip_norm", "patience")},
        "init_bias": Setting(
            "start the output bias at the data mean, where likelihood and decoder can",
            *(bool, True, training),
        ),
        **{name: of_fit[name] for name in ("compile", "precision", "seed")},
        "device": Setting("cpu, cuda or cuda:N", group=training, metavar="NAME"),
        "progress": Setting("show a progress bar", bool, sys.stderr.isatty(), training),
        "output": Setting("by default runs/ and the data's name", group=folder, metavar="FOLDER"),
        **{name: replace(of_fit[name], group=folder) for name in ("resume", "overwrite", "tensorboard")},
        "num_particles": Setting("draws per datum of the final log p(x)", int, 1000, folder),
        "config": Setting("YAML file of settings; those on the command line win", str, None, folder, "FILE"),
        "latent_dim": Setting("number of latent dimensions", int, 16, pieces),
        "latent_dims": Setting(
            "those of each layer of HierarchicalVAE, the lowest first; by default latent_dim and half of it",
            *(Sequence[int] | None, None, pieces),
        ),
        **{
            piece: Setting(
                f"{info.help}: {', '.join(known(piece))}, or your own as file.py:Name",
                *(str if info.default else str | None, info.default, pieces, "NAME"),
            )
            for piece, info in PIECES.items()
        },
    }


FIT_SETTINGS = _fit_settings()
# those that are no part of what the run is
_PASSING = {
    *("config", "output", "overwrite", "resume", "root", "epochs", "device", "progress", "tensorboard"),
    "num_particles",
}


def fit(words: list[str]) -> None:
    """Train a pair, evaluate it, draw plots."""
    positional, typed = split_words(words)
    asks_help = typed.pop("help", None) is not None
    if positional:
        raise ValueError(f"expected --setting VALUE, got {positional[0]!r}")
    sources = [_read_config(typed["config"])] if "config" in typed else []
    sources.append(Source(typed))
    given, saved = given_by(*sources), None
    data, output, overwrite, resume = (
        given.value(name, FIT_SETTINGS[name]) for name in ("data", "output", "overwrite", "resume")
    )
    if resume and overwrite:
        raise ValueError("--resume: expected either --resume or --overwrite, got both")
    folder = Path(output or f"runs/{Path(data).resolve().stem or 'data'}")
    if resume and (folder / CONFIG).is_file():
        saved = _settings_of_run(read_config(folder), folder / CONFIG)
        given = given_by(saved, *sources)
    chosen = choose_pieces(given, typed)
    table = suited_settings(given) | settings_of_pieces(chosen)
    if asks_help:
        text = "Train a pair on data, evaluate it, draw plots, and save all in a folder."
        raise Help(format_help("ppl-vae fit [--setting VALUE ...]", text, table))
    values = given.values_in(table)
    bits = {"Bernoulli": True, "Autoregressive": values.get("likelihood.levels", 2) == 2}
    if "binarization" not in given and bits.get(values["likelihood"]):
        values["binarization"] = "dynamic"
    check_positive_int("num_particles", values["num_particles"])
    if saved is not None:
        _check_unchanged(given, values, given_by(saved), table)
    kept = values if saved is None else saved.values
    command = {name: value for name, value in kept.items() if name in given and name not in _PASSING}
    own = [f"--{piece}={values[piece]}" for piece in chosen if values[piece] not in {None, *known(piece)}]
    own += [f"--{k}={typed[k]}" for k in ("root", "device", "num_particles") if k in typed]
    again = shlex.join(["ppl-vae", "fit", "--output", str(folder), *own, "--resume"])
    try:
        run, dataset = train(values | {"output": folder, "notes": {"command": command}}, chosen)
        if run.interrupted:
            raise KeyboardInterrupt
        measure(run, dataset, "test", {k: values[k] for k in ("num_particles", "device", "progress")})
        print(f"plots: {draw(run, dataset)}")
    except KeyboardInterrupt:
        if not (folder / CONFIG).is_file():  # nothing to continue yet
            raise
        raise KeyboardInterrupt(f"interrupted; continue with `{again}`") from None
    print(f"run: {folder}")


def given_by(*sources: Source) -> Given:
    """Return what sources set, later ones winning."""
    full = [
        replace(
            source,
            values={k: full_name(v, k) if k in PIECES else v for k, v in source.values.items()},
        )
        for source in sources
    ]
    return Given(*full, defaults={piece: info.default for piece, info in PIECES.items()})


def suited_settings(given: Given) -> dict[str, Setting]:
    """Return the settings of ``fit``, with the defaults that suit the model that is given."""
    suited = SUITED.get(given.value("model", FIT_SETTINGS["model"]), {})
    return FIT_SETTINGS | {k: replace(FIT_SETTINGS[k], default=name) for k, name in suited.items()}


def _read_config(word: Any) -> Source:
    """Return the settings of the user's file, or those in the ``config.yaml`` of a run."""
    try:
        path = Path(FIT_SETTINGS["config"].read(word))
        settings = read_yaml(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--config: {error}") from error
    if "format" in settings:
        return _settings_of_run(settings, path)
    if "config" in settings:
        raise ValueError(f"--config {path}: config: expected the settings themselves, got another file")
    return Source(_flatten(settings), f"--config {path}: ")


def _settings_of_run(config: Mapping[str, Any], path: Path) -> Source:
    """Return the settings that ``fit`` kept in a run."""
    notes = config.get("notes")
    command = notes.get("command") if isinstance(notes, dict) else None
    if not isinstance(command, dict):
        raise ValueError(f"{path}: expected a run of `ppl-vae fit`; go on with this one in Python")
    kept = {name: value for name, value in _flatten(command).items() if name not in _PASSING}
    return Source(kept | {"epochs": config.get("epochs")}, f"{path}: ", trusted=False)


def _flatten(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Return ``{"encoder": {"class": "MLP", "init": None}}`` as ``encoder`` and ``encoder.init``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in PIECES and isinstance(value, Mapping):
            flat |= {key if name == "class" else f"{key}.{name}": entry for name, entry in value.items()}
        else:
            flat[str(key)] = value
    return flat


def choose_pieces(given: Given, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class or function of each piece; forget the settings of pieces that none takes."""
    strange = [
        f"--{piece} {name}"
        for piece, (name, source) in given.items()
        if not source.trusted and isinstance(name, str) and piece in PIECES and name not in known(piece)
    ]
    if strange:
        raise ValueError(
            "--resume, --config: nothing that a run names is imported; if you trust what it is made of, "
            f"add {' '.join(strange)}"
        )
    chosen: dict[str, Any] = {}
    table = suited_settings(given)

    def choose(piece: str) -> None:
        if piece in chosen:
            return
        chosen[piece] = resolve(given.value(piece, table[piece]), piece)
        for name, made_of in parts(piece, chosen[piece]).items():
            if (piece, name) != ("model", "classifier"):  # it is the guide's
                for part in made_of:
                    choose(part)

    for piece in ROOTS:
        choose(piece)
    for name in list(given):
        piece = name.partition(".")[0]
        if piece in PIECES and piece not in chosen:
            _, source = given.pop(name)
            if name in typed or not typed.keys() & PIECES.keys():
                raise ValueError(f"{source.prefix}{name}: the other pieces take no {piece}")
    return chosen


def _check_unchanged(
    given: Given, values: Mapping[str, Any], saved: Given, table: Mapping[str, Setting]
) -> None:
    """Raise if a setting differs from the one of the run to resume."""
    for name in given:
        if name not in _PASSING:
            before = saved.value(name, table[name])
            if describe(before) != describe(values[name]):
                got = values[name]
                raise ValueError(f"--{name}: the run to resume was made with {before!r}, got {got!r}")


def train(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[Run, Dataset]:
    """Build the pair for the data and train it."""
    check_positive_int("latent_dim", values["latent_dim"])
    seed = check_seed(values["seed"])
    options: dict[str, dict[str, Any]] = {piece: {} for piece in chosen}
    for name, value in values.items():
        piece, dot, argument = name.partition(".")
        if dot:
            options[piece][argument] = value
    if chosen["optimizer"] is torch.optim.Adam:
        options["optimizer"].setdefault("fused", True)
    dataset = load_data(values["data"], values["root"], values["binarization"])
    sizes = _sizes(values, chosen, options, dataset)
    if values["labels"] is not None:
        dataset = _keep_labels(dataset, values["labels"], seed, chosen["model"])
    x, built = dataset.train.x, dict[str, Any]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**64)
        model, guide, elbo = (build(piece, chosen, options, sizes, built) for piece in ROOTS[:3])
        prior: Any = getattr(model, "prior", None)
        if isinstance(prior, VampPrior):
            _check_posterior(prior, chosen)
            if prior.components <= len(x):
                prior.init_pseudo_inputs(x)
    likelihood: Any = getattr(model, "likelihood", None)
    decoder = getattr(likelihood, "decoder", None)
    if values["init_bias"] and hasattr(likelihood, "init_bias") and hasattr(decoder, "output_bias"):
        if x.min() >= 0 and (x.max() <= 1 or isinstance(likelihood, (Poisson, NegativeBinomial))):
            likelihood.init_bias(x)
    made = {
        "model": model,
        "guide": guide,
        "elbo": elbo,
        "data": dataset.train,
        "validation": dataset.validation,
        "optimizer": functools.partial(chosen["optimizer"], **options["optimizer"]),
        "scheduler": chosen["scheduler"] and functools.partial(chosen["scheduler"], **options["scheduler"]),
    }
    cpu = torch.device("cpu")
    with seeded(seed):  # what the run is measured on at its end
        check_all(model, guide, prepare_data(dataset.test, "data", cpu), "data", cpu)
    taken = inspect.signature(ppl_vae.fit).parameters
    try:
        run = ppl_vae.fit(**{k: v for k, v in values.items() if k in taken} | made)
    except ValueError as error:  # what an estimator finds wrong with its arguments when it runs
        name = str(error).partition(":")[0]
        if name in arguments(chosen["elbo"]) and name not in taken:
            raise ValueError(f"--elbo.{error}") from error
        raise
    return run, dataset


def _sizes(
    values: Mapping[str, Any],
    chosen: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    dataset: Dataset,
) -> dict[str, dict[str, Any]]:
    """Return for each piece the arguments that come from the data and from other settings."""
    model, x, x_shape = chosen["model"], dataset.train.x, dataset.x_shape
    top = below = values["latent_dim"]  # of the prior, and what the decoder takes
    sizes: dict[str, dict[str, Any]] = {piece: {"x_shape": x_shape} for piece in PIECES}
    sizes["guide"]["latent_dims"] = (top,)
    if is_a(model, HierarchicalVAE):
        dims = values["latent_dims"]
        dims = check_sizes("latent_dims", [top, max(1, top // 2)] if dims is None else dims)
        skip = options["model"].get("skip", False)
        above = [sum(dims[i:]) if skip else dims[i] for i in range(len(dims))]
        top, below = dims[-1], above[0]
        sizes["model"]["layers"] = list(zip(above[1:], dims[:-1], strict=True))[::-1]
        sizes["guide"]["latent_dims"] = dims
    elif values["latent_dims"] is not None:
        raise ValueError(f"--latent_dims: {_name(model)} has one layer; set --latent_dim")
    for piece in PIECES:
        sizes[piece]["latent_dim"] = top
    for piece in ("encoder", "guide", "classifier"):
        sizes[piece]["in_shape"] = x_shape
    sizes["decoder"] |= {"in_shape": below, **_decoder_shape(chosen, options, x_shape)}
    if is_a(model, VeryDeepVAE):
        channels, sides = options["model"]["channels"], options["model"]["sizes"]
        if not sides or len(x_shape) != 3:
            raise ValueError(f"--model: VeryDeepVAE takes images and their sizes, got x of {list(x_shape)}")
        state = (channels, sides[-1], sides[-1])
        sizes["decoder"] |= {"in_shape": math.prod(state), "state_shape": state}
    if len(x_shape) == 1:
        sizes["model"] |= {"data_dim": x_shape[0]}
    sizes["likelihood"]["channels"] = x_shape[0]
    sizes["guide"]["components"] = options.get("model", {}).get("components")
    sizes["prior"]["bounds"] = (0.0, 1.0) if x.min() >= 0 and x.max() <= 1 else None
    if is_a(chosen["guide"], FlowGuide) or is_a(chosen.get("inner"), FlowGuide):
        sizes["flow"]["context_dim"] = 64
    if is_a(model, (CVAE, SemiSupervisedVAE)):
        classes = _num_classes(dataset, model)
        for piece in ("model", "prior"):
            sizes[piece]["num_classes"] = classes
        sizes["classifier"]["out_shape"] = sizes["network"]["in_shape"] = classes
        for piece in ("encoder", "decoder"):
            sizes[piece]["context"] = _check_context(piece, chosen, classes)
    elif is_a(chosen.get("prior"), ConditionalNormal):
        raise ValueError(f"--prior: ConditionalNormal needs labels, which {_name(model)} does not give it")
    return sizes


def _decoder_shape(
    chosen: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]], x_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Return the decoder's outputs: as many for each value of x as the likelihood says."""
    likelihood, given = chosen.get("likelihood"), options.get("likelihood", {})
    first = x_shape[0]
    if callable(outputs := getattr(likelihood, "outputs", None)):
        taken = inspect.signature(outputs).parameters
        # of a wrong number the likelihood itself says what is wrong
        first *= max(1, outputs(**{name: value for name, value in given.items() if name in taken}))
    elif is_a(likelihood, Autoregressive):
        first = given.get("features") or first
    return {"out_shape": (first, *x_shape[1:]), "out_channels": first}


def _check_posterior(prior: VampPrior, chosen: Mapping[str, Any]) -> None:
    """Raise unless the posterior of the VampPrior's guide is a function of x alone."""
    taken = inspect.signature(prior.guide.posterior).parameters.values()
    if is_a(chosen["model"], (CVAE, SemiSupervisedVAE)) or sum(p.default is p.empty for p in taken) > 1:
        guide, model = type(prior.guide).__name__, _name(chosen["model"])
        raise ValueError(
            f"--prior: VampPrior needs a guide whose posterior is one of x alone, got --guide {guide} "
            f"with {model}"
        )


def _num_classes(dataset: Dataset, model: Any) -> int:
    """Return the number of classes, or raise if the data have no labels."""
    y = dataset.train.y
    if y is None or y.ndim > 1:
        raise ValueError(f"--data: {_name(model)} needs labels, {dataset.name} has none")
    return int(y.max()) + 1


def _check_context(piece: str, chosen: Mapping[str, Any], classes: int) -> int:
    """Return the number of classes, or raise if a network can't take the label."""
    made: Any = chosen.get(piece)
    if is_a(made, nn.Module):
        taken = list(inspect.signature(made.forward).parameters.values())[1:]
        if len(taken) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in taken):
            raise ValueError(
                f"--{piece}: {made.__name__} takes no label, which {_name(chosen['model'])} gives it"
            )
    return classes


def _keep_labels(dataset: Dataset, labels: int, seed: int, model: Any) -> Dataset:
    """Return the data with so many labels left for training."""
    if not is_a(model, SemiSupervisedVAE):
        raise ValueError(f"--labels: {_name(model)} does not take data without a label; got {labels}")
    return replace(dataset, train=semi_supervised(dataset.train, labels, seed=seed))


def _name(made: Any) -> str:
    return f"--model {getattr(made, '__name__', made)}"
