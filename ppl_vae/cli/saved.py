"""``ppl-vae sample | plot``, and what the commands on saved runs share."""

import inspect
import io
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from ppl_vae import plots
from ppl_vae._checks import check_positive_int, check_seed
from ppl_vae._random import seeded
from ppl_vae.cli.pieces import find
from ppl_vae.cli.report import DPI
from ppl_vae.cli.settings import Given, Help, Setting, Source, format_help, settings_of, split_words
from ppl_vae.data import Dataset, load_dataset
from ppl_vae.description import describe, library_classes
from ppl_vae.evaluation import encode, interpolate, reconstruct, traverse
from ppl_vae.evaluation import sample as draw_samples
from ppl_vae.evaluation.evaluate import evaluate as evaluate_pair
from ppl_vae.evaluation.generation import Traversal
from ppl_vae.infer.placing import place
from ppl_vae.infer.running import batch_arguments
from ppl_vae.models import CVAE, SemiSupervisedVAE
from ppl_vae.models.cvae import classes_of
from ppl_vae.training import Run, load_run
from ppl_vae.training.saving import EVALUATION, read_config, write

_GROUP = "settings"
RUN_SETTINGS = {
    "split": Setting("train, validation or test", str, "test", _GROUP, "NAME"),
    "data": Setting("other data than the run's: a name or a path", group=_GROUP, metavar="NAME"),
    "root": Setting("folder that holds MNIST/raw or FashionMNIST/raw", group=_GROUP, metavar="FOLDER"),
    **settings_of(evaluate_pair, skip=("model", "guide", "data", "device", "progress"), group=_GROUP),
    "device": Setting("cpu, cuda or cuda:N", group=_GROUP, metavar="NAME"),
    "progress": Setting("show a progress bar", bool, sys.stderr.isatty(), _GROUP),
    "all": Setting(
        "measure all that suits the pair, and write RUN/report.html too", bool, False, _GROUP, "true | false"
    ),
    "gaps_size": Setting("with --all: how many data to take for inference gaps", int, 100, _GROUP),
    "gaps_steps": Setting("with --all: the most steps to the optimum of each", int, 2000, _GROUP),
    "calibration_size": Setting("with --all: how many data to draw for calibration", int, 1000, _GROUP),
    "classifier_size": Setting(
        "with --all: how many training data to take for the classifier that judges samples",
        *(int, 10_000, _GROUP),
    ),
    "size": Setting("how many data to draw", int, 64, _GROUP),
    "output": Setting(
        "an .npz file (x: draws, mean: their means, if there are) or a .png; by default RUN/samples.npz",
        group=_GROUP,
        metavar="FILE",
    ),
    "classes": Setting(
        "your own classes or functions that the run is made of, as file.py:Name,file.py:Other; nothing else "
        "that a run names is imported",
        group=_GROUP,
        metavar="NAMES",
    ),
}
EVALUATED = [name for name in inspect.signature(evaluate_pair).parameters if name in RUN_SETTINGS]
COUNTS = ("size", "gaps_size", "gaps_steps", "calibration_size", "classifier_size")  # of evaluate --all
SETTINGS_OF_RUNS = {
    command: {name: setting for name, setting in RUN_SETTINGS.items() if name in {"classes", *names}}
    for command, names in {
        "evaluate": ("split", "root", *EVALUATED, "all", *COUNTS),
        "sample": ("size", "seed", "output"),
        "plot": ("data", "root"),
    }.items()
}
SETTINGS_OF_RUNS["evaluate"]["size"] = replace(
    RUN_SETTINGS["size"], help="with --all: how many data of the split to take, at random", default=1000
)


def sample(words: list[str]) -> None:
    """Draw data from a saved run's prior."""
    run, values, _ = told("sample", "Draw data from a saved run's prior.", words)
    size, seed = check_positive_int("size", values["size"]), check_seed(values["seed"])
    output = Path(values["output"] or folder_of(run) / "samples.npz")
    if output.suffix not in (".npz", ".png"):
        raise ValueError(f"--output: expected a file ending in .npz or .png, got {str(output)!r}")
    with seeded(seed):
        samples = draw_samples(drawn_from(run), size)
    if output.suffix == ".npz":
        arrays: dict[str, Any] = {"x": samples.x.numpy()}
        if samples.mean is not None:
            arrays["mean"] = samples.mean.numpy()
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_file(output, file.getvalue())
    elif samples.mean is None:
        raise ValueError(f"--output: {output}: the likelihood has no mean to show; write an .npz")
    else:
        try:
            axes = plots.plot_samples(samples)
        except ValueError as error:
            raise ValueError(f"--output: {output}: {error}") from error
        save_figure(axes, output)
    print(f"samples: {output}")


def plot(words: list[str]) -> None:
    """Draw the plots of a saved run again."""
    run, values, _ = told("plot", "Draw the plots of a saved run into RUN/plots.", words)
    print(f"plots: {draw(run, data_of(run, values))}")


def told(command: str, text: str, words: list[str]) -> tuple[Run, dict[str, Any], Given]:
    """Return the run, the settings, and what of them a command was given."""
    table = SETTINGS_OF_RUNS[command]
    folders, typed = split_words(words, switches=("all",))
    if "help" in typed:
        raise Help(format_help(f"ppl-vae {command} RUN [--setting VALUE ...]", text, table))
    given = Given(Source(typed), defaults={})
    values = given.values_in(table)
    if len(folders) != 1:
        got = ", ".join(map(repr, folders)) or "none"
        raise ValueError(f"RUN: expected the folder of a saved run, as in `ppl-vae {command} RUN`, got {got}")
    return load_saved(Path(folders[0]), values["classes"]), values, given


def load_saved(folder: Path, names: str | None) -> Run:
    """Load a run that is made of the library's classes and of the user's that are named."""
    own = [find(name.strip(), "--classes") for name in (names or "").split(",") if name.strip()]
    config = read_config(folder)
    roles = {role: config[role] for role in ("model", "guide")}
    allowed = library_classes().keys() | {path for made in own for path in describe(made).values()}
    allowed |= {f"__main__.{made.__qualname__}" for made in own}
    if missing := sorted(_paths(roles) - allowed):
        needed = ",".join(re.sub(r"^(\w+)\.(\w+)$", r"\1.py:\2", path) for path in missing)
        raise ValueError(
            f"--classes: {folder} is made of classes or functions that are not the library's; "
            f"if you trust them, add --classes {needed}"
        )
    functions = [made for made in own if not inspect.isclass(made)]
    programs = {role: made for role in roles for made in functions if describe(made) == roles[role]}
    return load_run(folder, classes=[made for made in own if inspect.isclass(made)], **programs)


def _paths(description: Any) -> set[str]:
    """Return the classes and functions that a description names."""
    if isinstance(description, list):
        return set().union(*map(_paths, description))
    if not isinstance(description, dict):
        return set()
    named = {str(description[key]) for key in ("class", "function") if key in description}
    return named.union(*map(_paths, description.values()))


def data_of(run: Run, values: Mapping[str, Any]) -> Dataset:
    """Load the data that a run was trained on, or others that were named."""
    source = run.config["data"].get("source")
    source = source if isinstance(source, dict) else {}
    name = values["data"] or source.get("name")
    if name is None:
        raise ValueError("--data: expected a name or a path, since the run was trained on tensors, got none")
    return load_data(name, values["root"], source.get("binarization"))


def load_data(name: Any, root: str | None, binarization: Any) -> Dataset:
    """Load a dataset; an error names the setting that is wrong."""
    try:
        return load_dataset(name, root, binarization)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).removeprefix("name: ")
        raise ValueError(reason if reason.startswith("binarization: ") else f"--data: {reason}") from error


def measure(run: Run, dataset: Dataset, split: str, options: Mapping[str, Any]) -> None:
    """Evaluate a run; print what was found and write it into the run's folder."""
    result = evaluate_pair(run.model, run.guide, getattr(dataset, split), **options)
    print(result)
    found = {"data": dataset.name, "split": split, "epoch": run.best_epoch} | result.summary()
    write_file(folder_of(run) / EVALUATION, yaml.safe_dump(found, sort_keys=False).encode())


def draw(run: Run, dataset: Dataset) -> Path:
    """Draw every plot that the run and its data allow into the run's folder, and return where they are."""
    folder, model, guide = folder_of(run) / "plots", run.model, run.guide
    if folder.is_symlink():  # in a stranger's run it may lead anywhere
        raise ValueError(f"{folder}: expected a folder, got a link")
    device = place(None, model, guide)
    test = dataset.test.to(device)
    with seeded(0):
        batch = batch_arguments(model, test.batch(torch.arange(min(len(test), 5000), device=device)))
        drawings: dict[str, Callable[[], Any]] = {"history": lambda: plots.plot_history(run.history)}
        images = len(dataset.x_shape) == 3 and dataset.x_shape[0] in (1, 3)
        of_z = ["traversal", "interpolation"] if images else []
        if images:
            few = tuple(tensor[:30] for tensor in batch)
            drawings |= {
                "reconstructions": lambda: plots.plot_reconstructions(reconstruct(model, guide, *few)),
                "samples": lambda: plots.plot_samples(draw_samples(drawn_from(run), 64)),
            }
        try:
            y = None if test.y is None or test.y.ndim > 1 else test.y[: len(batch[0])]
            latents = encode(guide, *batch, y=y)
        except ValueError as error:  # the model has several layers, or one of another name
            warnings.warn(f"no plot of {', '.join(['latents', *of_z])}: {error}", stacklevel=2)
        else:
            drawings["latents"] = lambda: plots.plot_latents(latents)
            if isinstance(model, (CVAE, SemiSupervisedVAE)):
                if images:
                    reason = "x depends on the label, not on z alone"
                    warnings.warn(f"no plot of {', '.join(of_z)}: {reason}", stacklevel=2)
            elif images:
                z, pairs = latents.z.to(device), min(5, len(latents.z) // 2)
                start, end = z[:pairs], z[pairs : 2 * pairs]
                drawings |= {
                    "traversal": lambda: plots.plot_traversal(traverse_busiest(model, z)),
                    "interpolation": lambda: plots.plot_interpolation(interpolate(model, start, end)),
                }
        for name, drawing in drawings.items():
            try:
                axes = drawing()
            except Exception as error:  # a program of the user's need not allow all
                warnings.warn(f"no plot of {name}: {error}", stacklevel=2)
            else:
                save_figure(axes, folder / f"{name}.png")
    return folder


def traverse_busiest(model: Any, z: torch.Tensor) -> Traversal:
    """Traverse the ten dimensions in which these latents ``[n, latent]`` differ most."""
    busiest = z.var(0, correction=0).topk(min(10, z.shape[1])).indices.sort().values.tolist()
    return traverse(model, torch.zeros_like(z[0]), dims=busiest)


def drawn_from(run: Run) -> Any:
    """Return the program to draw data from: the model, with the classes in turn if it needs labels."""
    batch = run.config["data"].get("batch")
    labels = batch[1:] if isinstance(batch, list) else None
    if not isinstance(run.model, CVAE) or labels != [[[1], "int64"]]:
        return run.model
    classes = classes_of(run.model)
    return run.model if classes is None else _EachClass(run.model, classes)


class _EachClass(nn.Module):
    """A model that is given the classes in turn as labels.

    Args:
        model: a program of ``(x, y)``.
        classes: the number of classes.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = model
        self.classes = classes

    def forward(self, x: None = None, *, size: int) -> Any:
        """Draw data of labels 0, 1, ..., 0, 1, ..."""
        device = next(self.model.parameters()).device
        return self.model(x, torch.arange(size, device=device) % self.classes)


def folder_of(run: Run) -> Path:
    """Return the folder of a run that was saved."""
    return run.path or Path()


def open_folder(folder: Path) -> Path:
    """Make the output's folder, or raise if nothing can be written there."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"--output: can't write to {folder}: {error.strerror}") from error
    return folder


def png_of(axes: Any) -> bytes:
    """Return the figure of some axes as a PNG, and close it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    try:
        axes.figure.savefig(file, dpi=DPI, bbox_inches="tight")
    finally:
        plt.close(axes.figure)
    return file.getvalue()


def save_figure(axes: Any, path: Path) -> None:
    """Write the figure of some axes as an image."""
    write_file(path, png_of(axes))


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a command's output, or raise naming it."""
    try:
        path.parent.mkdir(exist_ok=True)
        write(path, content)
    except OSError as error:
        raise OSError(f"--output: can't write {path}: {error.strerror}") from error
