"""Saved runs: a folder of plain data (YAML, safetensors, CSV), each file written whole or not at all."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from ppl_vae.description import build, describe
from ppl_vae.infer.objective import Objective
from ppl_vae.infer.placing import check_device
from ppl_vae.infer.running import Program

FORMAT = 1
CONFIG, MODEL, CHECKPOINT, HISTORY = (
    "config.yaml",
    "model.safetensors",
    "checkpoint.safetensors",
    "history.csv",
)
EVALUATION = "evaluation.yaml"
FILES = (CONFIG, MODEL, CHECKPOINT, HISTORY)
_MAX_CONFIG_BYTES = 1 << 20
_MAX_DATUM = 1 << 28  # numbers

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "uint8", "bool")
}

Record = dict[str, float]


@dataclass(repr=False)
class Run:
    """A trained pair and how it was trained.

    Attributes:
        model: the model, with the parameters of ``best_epoch``.
        guide: the guide, likewise.
        history: one record per epoch; ELBO, reconstruction and KL of each latent site in nats per datum.
        best_epoch: the epoch of the highest validation ELBO, or the last one without validation data.
        config: the resolved settings.
        path: the run's folder, if it was saved.
        interrupted: whether Ctrl-C ended the training.

    Example:
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> run = fit(model, guide, torch.randn(100, 5), epochs=2, progress=False)
        >>> run
        Run(LinearGaussian, MeanFieldGuide, 2 epochs, best_epoch=2)
        >>> [record["epoch"] for record in run.history if record["train_elbo"] < 0]
        [1, 2]
    """

    model: Program
    guide: Program
    history: list[Record]
    best_epoch: int
    config: dict[str, Any]
    path: Path | None = None
    interrupted: bool = False

    def __post_init__(self) -> None:
        if self.path is not None:
            for part, name, held in _held_of_guide(self.model):
                if not any(held is known for known in _modules(self.guide)):
                    raise ValueError(
                        f"model: expected a {type(part).__name__} of the guide that is saved with the model, "
                        f"got one of another {type(held).__name__}; set its `{name}`, or give no `output`"
                    )

    def __repr__(self) -> str:
        names = [getattr(p, "__name__", type(p).__name__) for p in (self.model, self.guide)]
        where = f", path={str(self.path)!r}" if self.path else ""
        return f"Run({', '.join(names)}, {len(self.history)} epochs, best_epoch={self.best_epoch}{where})"


def write(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old or the new content, whatever ends the process."""
    with _replacing(path) as new, open(new, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the path of a new file, which takes the old one's place once it is whole on the disk."""
    new = temporary(path)
    new.unlink(missing_ok=True)  # "xb" follows no link that a stranger put there
    with open(new, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    yield new
    with open(new, "r+b") as file:
        os.chmod(file.fileno(), mode)  # safetensors lets the owner alone read
        os.fsync(file.fileno())
    os.replace(new, path)


def temporary(path: Path) -> Path:
    """Return where ``write`` puts the new content until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the run's settings."""
    write(folder / CONFIG, yaml.safe_dump({"format": FORMAT, **config}, sort_keys=False).encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Any = None) -> None:
    """Write tensors and, in the file's header, a state of plain data."""
    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        whole = values.untyped_storage()
        if whole.data_ptr() in memory or whole.nbytes() != values.nbytes:  # shared memory is refused
            values = values.clone()
        memory.add(whole.data_ptr())
        plain[name] = values
    with _replacing(path) as new:
        safetensors.torch.save_file(plain, new, {"state": json.dumps(state)})


def write_history(folder: Path, history: list[Record]) -> None:
    """Write the history, one row per epoch; a float is written so that reading it gives the same float."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in history for key in record)))
    writer.writeheader()
    writer.writerows(history)
    write(folder / HISTORY, text.getvalue().encode())


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain data; anchors, which can blow a small file up, are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of plain data.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is malformed, too large, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a settings file, found none")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected a settings file of at most {_MAX_CONFIG_BYTES} bytes")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except OSError:
        raise
    except Exception as error:  # PyYAML lets many kinds out: an impossible date's, an endless number's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: malformed YAML: {reason[:300]}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(settings).__name__}")
    return settings


def is_run(folder: Path) -> bool:
    """Return whether the folder holds a run, rather than another program's ``config.yaml``."""
    try:
        return "format" in read_yaml(folder / CONFIG)
    except (OSError, ValueError):
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """Read a run's settings.

    Raises:
        FileNotFoundError: if the folder is no run.
        ValueError: if the settings are malformed or of another format.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: expected the folder of a saved run, found no {CONFIG} in it")
    config = read_yaml(folder / CONFIG)
    if config.pop("format", None) != FORMAT:
        raise ValueError(f"{folder / CONFIG}: expected a run of format {FORMAT}")
    for key in ("model", "guide", "data"):
        if not isinstance(config.get(key), dict):
            raise ValueError(
                f"{folder / CONFIG}: expected an entry {key!r} with settings, got {config.get(key)!r}"
            )
    return config


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read tensors and the state from the file's header.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected saved tensors, found no such file: no epoch was finished")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, state
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: damaged file of tensors: {reason[:300]}") from None


def read_history(folder: Path) -> list[Record]:
    """Read the history.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / HISTORY
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [
                {key: float(value) for key, value in row.items() if value != ""}
                for row in csv.DictReader(file)
            ]
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{path}: damaged history: {reason[:300]}") from None


def load_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy saved tensors into parameters and buffers.

    Raises:
        ValueError: if names, shapes or types differ, or values are NaN or infinite that aren't already.
    """
    check_tensors(into, tensors, path)
    with torch.no_grad():
        for name, target in into.items():
            target.copy_(tensors[name])


def check_tensors(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise unless the saved tensors have the names, shapes and kinds of ``into``."""
    for what, names in (
        ("lacks", into.keys() - tensors.keys()),
        ("has the unknown", tensors.keys() - into.keys()),
    ):
        if names:
            raise ValueError(
                f"{path}: {what} tensors {sorted(names)[:3]}: saved from another pair, or damaged"
            )
    for name, target in into.items():
        saved = tensors[name]
        if saved.shape != target.shape or saved.is_floating_point() != target.is_floating_point():
            raise ValueError(
                f"{path}: {name} is {saved.dtype} {list(saved.shape)}, "
                f"expected {target.dtype} {list(target.shape)}"
            )
        if saved.is_floating_point() and not target.is_meta:
            same = target.detach().cpu() == saved.cpu()  # a mask's infinities, say
            if not (saved.cpu().isfinite() | same).all():
                raise ValueError(f"{path}: {name} has values that are NaN or infinite")


def load_run(
    path: str | os.PathLike[str],
    *,
    model: Program | None = None,
    guide: Program | None = None,
    classes: Iterable[type] = (),
    device: str | torch.device = "cpu",
) -> Run:
    """Load a saved run: model and guide with the parameters of the best epoch.

    A run folder is data: loading it imports and executes nothing that it names. Library classes are
    built from the saved settings; what was made of your own classes or functions, you pass.

    Args:
        path: the run's folder.
        model: the model to load the parameters into, where it isn't made of library classes.
        guide: likewise the guide.
        classes: your own classes that the saved settings name and that may be built.
        device: where the parameters go.

    Raises:
        FileNotFoundError: if the folder is no saved run, or no epoch was finished.
        ValueError: if a file is damaged, names an unknown class, or doesn't fit the model and guide.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from ppl_vae import fit
        >>> from ppl_vae.guides import MeanFieldGuide
        >>> from ppl_vae.models import LinearGaussian
        >>> from ppl_vae.networks import MLP
        >>> model, guide = LinearGaussian(2, 5), MeanFieldGuide(MLP(5), 2)
        >>> with TemporaryDirectory() as runs:
        ...     run = fit(model, guide, torch.randn(100, 5), epochs=1, output=f"{runs}/pca", progress=False)
        ...     again = load_run(f"{runs}/pca")
        >>> again.model(None, size=3).shape
        torch.Size([3, 5])
    """
    device = check_device(device)
    folder = Path(path)
    config = read_config(folder)
    tensors, state = read_tensors(folder / MODEL)
    if strangers := sorted(name for name in tensors if not name.startswith(("model.", "guide."))):
        raise ValueError(f"{folder / MODEL}: has tensors of neither model nor guide: {strangers[:3]}")
    programs: dict[str, Program] = {}
    for role, given in (("model", model), ("guide", guide)):
        if given is None:
            saved = {k.removeprefix(f"{role}."): t for k, t in tensors.items() if k.startswith(f"{role}.")}
            given = _build_and_fill(config[role], role, tuple(classes), saved, folder / MODEL)
        elif isinstance(given, nn.Module):
            saved = {k.removeprefix(f"{role}."): t for k, t in tensors.items() if k.startswith(f"{role}.")}
            load_tensors(given.state_dict(keep_vars=True), saved, folder / MODEL)
        programs[role] = given
    pair = programs["model"], programs["guide"]
    for program in pair:
        if isinstance(program, nn.Module):
            program.to(device)
    if not all(isinstance(program, nn.Module) for program in pair):
        _fill_functions(*pair, config, tensors, folder / MODEL, device)
    for part in pair[1].modules() if isinstance(pair[1], nn.Module) else ():
        if isinstance(vars(part).get("model"), nn.Module):  # a reference, which was built apart
            part.model = pair[0]  # type: ignore[assignment]
    for part, name, held in _held_of_guide(pair[0]):
        setattr(part, name, _counterpart(part, name, held, pair[1]))
    epoch = state.get("epoch") if isinstance(state, dict) else None
    if type(epoch) is not int or epoch < 1:
        raise ValueError(f"{folder / MODEL}: expected the epoch in its header, got {state!r}")
    return Run(*pair, read_history(folder), epoch, config, folder)


def _modules(program: Any) -> list[nn.Module]:
    return list(program.modules()) if isinstance(program, nn.Module) else []


def _held_of_guide(model: Any) -> list[tuple[Any, str, nn.Module]]:
    """Return the parts of a model that refer to the guide or its classifier, by which name, and to what."""
    names = "guide", "classifier"  # attributes that they do not register
    held = [(part, name, vars(part).get(name)) for part in _modules(model) for name in names]
    return [(part, name, module) for part, name, module in held if isinstance(module, nn.Module)]


def _counterpart(part: Any, name: str, held: nn.Module, guide: Any) -> nn.Module:
    """Return what a part of a loaded model refers to in the loaded guide."""
    candidates = _modules(guide)
    if any(held is known for known in candidates):
        return held
    named = [getattr(known, name, None) for known in candidates]
    wanted = describe(held)
    for known in (*named, *candidates):
        if isinstance(known, nn.Module) and describe(known) == wanted:
            return known
    raise ValueError(
        f"model: expected the {name} of its {type(part).__name__}, a {type(held).__name__}, in the run's "
        "guide; pass the model as `model=`"
    )


def _build_and_fill(
    description: dict, role: str, classes: tuple[type, ...], saved: dict[str, Tensor], path: Path
) -> nn.Module:
    with torch.device("meta"):  # nothing is allocated before the sizes are known to fit the file
        check_shapes = build(description, role, classes)
    if not isinstance(check_shapes, nn.Module):
        raise ValueError(f"{role}: expected a description of a module, got {description!r}")
    check_tensors(check_shapes.state_dict(keep_vars=True), saved, path)
    with torch.random.fork_rng(devices=[]):  # the first values are drawn, then overwritten
        program = build(description, role, classes)
    floating = [t.dtype for t in saved.values() if t.is_floating_point()]
    if floating:
        program.to(floating[0])
    load_tensors(program.state_dict(keep_vars=True), saved, path)
    return program


def _fill_functions(
    model: Program,
    guide: Program,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    device: str | torch.device,
) -> None:
    """Load the networks of plain functions, found by one run on a batch of zeros of the saved shape."""
    from pyro.infer import Trace_ELBO

    try:
        shapes = [[int(size) for size in shape] for shape, _ in config["data"]["batch"]]
        if any(math.prod(shape) > _MAX_DATUM for shape in shapes):
            raise ValueError(f"a datum of more than {_MAX_DATUM} numbers")
        batch = [
            torch.zeros(shape, dtype=_DTYPES[dtype], device=device)
            for shape, (_, dtype) in zip(shapes, config["data"]["batch"], strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError):
        raise ValueError(f"{path.with_name(CONFIG)}: expected data.batch, the shapes of a batch") from None
    objective = Objective(model, guide, Trace_ELBO())
    objective.setup(*batch, check_values=False)  # zeros, which the model need not be able to observe
    load_tensors(objective.tensors(), tensors, path)


def flatten(tree: Any, tensors: dict[str, Tensor], key: str) -> Any:
    """Return nested state (an optimiser's, say) as JSON data, its tensors moved into ``tensors``.

    Raises:
        TypeError: naming the entry, if it is neither a tensor nor plain data.
    """
    if isinstance(tree, Tensor):
        tensors[key] = tree
        return {"tensor": key}
    if isinstance(tree, Mapping):
        return {"items": [[k, flatten(v, tensors, f"{key}.{k}")] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [flatten(v, tensors, f"{key}.{i}") for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{key}: expected a tensor, number, string, list or dictionary to save, got {tree!r}")


def unflatten(tree: Any, tensors: Mapping[str, Tensor], like: Any = None) -> Any:
    """Undo ``flatten``; ``like``, the state of a fresh object, gives the types of mappings and tuples."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        items = {
            k: unflatten(v, tensors, like.get(k) if isinstance(like, Mapping) else None)
            for k, v in tree["items"]
        }
        kind: Callable = type(like) if isinstance(like, dict) else dict
        return kind(items)
    if isinstance(tree, list):
        items_like = (
            like if isinstance(like, (list, tuple)) and len(like) == len(tree) else [None] * len(tree)
        )
        values = [unflatten(v, tensors, item) for v, item in zip(tree, items_like, strict=True)]
        return tuple(values) if isinstance(like, tuple) else values
    return tree
