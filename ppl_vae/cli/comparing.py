"""``ppl-vae compare``."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import ELBO

from ppl_vae import plots
from ppl_vae._checks import check_choice, check_positive_int, check_seed, did_you_mean
from ppl_vae._random import seeded
from ppl_vae.cli.comparing_runs import compare_runs
from ppl_vae.cli.fitting import FIT_SETTINGS, choose_pieces, given_by, train
from ppl_vae.cli.pieces import settings_of_pieces, short_names
from ppl_vae.cli.saved import (
    RUN_SETTINGS,
    data_of,
    folder_of,
    load_saved,
    open_folder,
    save_figure,
    write_file,
)
from ppl_vae.cli.settings import Given, Help, Setting, Source, format_help, settings_of, split_words
from ppl_vae.data import Dataset
from ppl_vae.evaluation import compare_estimators
from ppl_vae.evaluation.estimators import check_repeats
from ppl_vae.infer.placing import place
from ppl_vae.training import Run

_GROUP = "settings"
_OF_COMPARISON = settings_of(compare_estimators, group=_GROUP)
COMPARE_SETTINGS = {
    "estimators": Setting(
        "classes of ppl_vae.infer or pyro.infer, with or without Trace and ELBO, such as trace, iwae(50)",
        *(str, "trace,meanfield,stl,iwae,dreg", _GROUP, "NAMES"),
    ),
    "num_particles": Setting(
        "draws per datum of those without a number of their own; of several runs by default 1000",
        *(int, 16, _GROUP),
    ),
    "size": Setting(
        "how many data of the split to take, at random; of several runs by default 1000", int, 100, _GROUP
    ),
    **{name: RUN_SETTINGS[name] for name in ("split", "data", "root")},
    **{
        name: _OF_COMPARISON[name] for name in ("repeats", "seed", "reference_particles", "reference_repeats")
    },
    **{name: RUN_SETTINGS[name] for name in ("memory", "device", "progress")},
    **{
        name: replace(RUN_SETTINGS[name], help=RUN_SETTINGS[name].help.replace("with --all", "several runs"))
        for name in ("gaps_size", "gaps_steps")
    },
    "epochs": Setting("without RUN: how long to train the pair of `ppl-vae fit`", int, 10, _GROUP),
    "output": Setting(
        "folder for estimators.csv and estimators.png, of several runs for comparison.html and "
        "comparison.yaml; by default RUN, without RUN or with several the current one",
        *(str | None, None, _GROUP, "FOLDER"),
    ),
    "classes": RUN_SETTINGS["classes"],
}
_OF_RUNS = {"num_particles": 1000, "size": 1000}  # defaults of several runs
_ONLY_OF_RUNS = ("memory", "gaps_size", "gaps_steps")
_OF_ESTIMATORS = ("estimators", "repeats", "reference_particles", "reference_repeats", "epochs")


def compare(words: list[str]) -> None:
    """Compare several saved runs, or estimators on one, or on the default pair after a few epochs."""
    folders, typed = split_words(words)
    if "help" in typed:
        text = (
            "Compare several saved runs on the same data, in a report: ELBO, its parts, log p(x), inference "
            "gaps, settings, images. Of one run, compare ELBO estimators: their bounds, noise and bias of "
            "their gradients, time and memory; without RUN, on the default pair of `ppl-vae fit`, which is "
            "trained first."
        )
        usage = "ppl-vae compare [RUN] [RUN ...] [--setting VALUE ...]"
        raise Help(format_help(usage, text, COMPARE_SETTINGS))
    given = Given(Source(typed), defaults={})
    values = given.values_in(COMPARE_SETTINGS)
    if len(folders) > 1:
        for name in _OF_ESTIMATORS:
            if name in given:
                raise ValueError(
                    f"--{name}: expected only with one saved run or none, whose estimators are compared; got "
                    f"{len(folders)} runs"
                )
        defaults = {name: default for name, default in _OF_RUNS.items() if name not in given}
        compare_runs(folders, values | defaults, words)
        return
    for name in _ONLY_OF_RUNS:
        if name in given:
            raise ValueError(f"--{name}: expected only with several saved runs, got {values[name]!r}")
    for name, allowed in (("epochs", not folders), ("classes", bool(folders))):
        if name in given and not allowed:
            when = "without" if name == "epochs" else "with"
            raise ValueError(
                f"--{name}: expected only {when} the folder of a saved run, got {values[name]!r}"
            )
    seed, size = check_seed(values["seed"]), check_positive_int("size", values["size"])
    num_particles = check_positive_int("num_particles", values["num_particles"])
    check_choice("split", values["split"], ("train", "validation", "test"))
    check_repeats(values["repeats"], values["reference_particles"], values["reference_repeats"])
    parse_estimators(values["estimators"], num_particles, 1)  # before any training
    if folders:
        if Path(folders[0]).is_file():
            raise ValueError(f"RUN: expected the folder of a saved run, got the file {folders[0]}")
        run = load_saved(Path(folders[0]), values["classes"])
        output = open_folder(Path(values["output"] or folder_of(run)))
        dataset = data_of(run, values)
    else:
        output = open_folder(Path(values["output"] or "."))
        run, dataset = _train_default(values)
    estimators = parse_estimators(values["estimators"], num_particles, len(dataset.train))
    place(values["device"], run.model, run.guide)
    split = getattr(dataset, values["split"])
    with seeded(seed):
        batch = split.batch(torch.randperm(len(split))[:size])
    names = ("repeats", "reference_particles", "reference_repeats", "progress")
    taken = {name: values[name] for name in names}
    result = compare_estimators(run.model, run.guide, batch, estimators, seed=seed, **taken)
    print(result)
    write_file(output / "estimators.csv", result.table.to_csv().encode())
    save_figure(plots.plot_estimators(result), output / "estimators.png")
    print(f"table: {output / 'estimators.csv'}\nplot: {output / 'estimators.png'}")


def _train_default(values: Mapping[str, Any]) -> tuple[Run, Dataset]:
    """Train the default pair of ``ppl-vae fit`` in memory."""
    shared = ("data", "root", "seed", "device", "progress", "epochs")
    typed = {name: values[name] for name in shared if values[name] is not None}
    given = given_by(Source(typed))
    chosen = choose_pieces(given, typed)
    settings = given.values_in(FIT_SETTINGS | settings_of_pieces(chosen))
    settings |= {"binarization": "dynamic", "output": None}
    check_positive_int("epochs", settings["epochs"])
    epochs = settings["epochs"]
    print(f"no RUN: the pair of `ppl-vae fit --data {settings['data']}` after {epochs} epochs", flush=True)
    return train(settings, chosen)


def parse_estimators(text: str, num_particles: int, data_size: int) -> dict[str, ELBO]:
    """Return estimators by the names that the user typed, such as ``trace,iwae(50)``.

    Args:
        text: names of classes with commas between them; case, ``Trace`` and ``ELBO`` need not be given, a
            number in parentheses is that one's ``num_particles``.
        num_particles: of those without a number.
        data_size: N, for those that need the number of training data.

    Raises:
        ValueError: for an unknown name, with the nearest one, or one that can't be built.
    """
    classes = short_names("elbo")
    named: dict[str, ELBO] = {}
    words: dict[Any, str] = {}  # by what they stand for
    for word in (word.strip() for word in text.split(",")):
        match = re.fullmatch(r"(\w+)\s*(?:\(\s*(\d+)\s*\))?", word)
        if match is None:
            raise ValueError(f"--estimators: expected names such as trace,iwae(50), got {word!r}")
        key = match[1].lower().replace("_", "")
        if key not in classes:
            raise ValueError(
                f"--estimators: unknown {match[1]!r}{did_you_mean(key, classes)}; expected classes of "
                "ppl_vae.infer or pyro.infer such as trace, meanfield, stl, iwae, dreg, vimco"
            )
        made = classes[key]
        particles = check_positive_int(f"--estimators: {word}", int(match[2])) if match[2] else num_particles
        options = {
            "num_particles": particles,
            "size": data_size,
            "vectorize_particles": particles > 1,
            "max_plate_nesting": 1,
            "strict_enumeration_warning": False,
        }
        arguments = inspect.signature(made).parameters
        other = words.setdefault((made, particles if "num_particles" in arguments else None), word)
        if other != word or word in named:
            got = f"{word!r} twice" if other == word else f"{other!r} and {word!r}, which are the same"
            raise ValueError(f"--estimators: expected each once, got {got}")
        try:
            named[word] = made(**{k: v for k, v in options.items() if k in arguments})
        except (TypeError, ValueError, AssertionError, OverflowError) as error:
            raise ValueError(f"--estimators: {word}: {error}") from error
    return named
