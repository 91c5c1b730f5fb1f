"""The pieces of a run: chosen by name, imported if they are the user's own, built of their settings."""

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ppl_vae._checks import did_you_mean
from ppl_vae.cli.settings import Setting, settings_of


@dataclass(frozen=True)
class Piece:
    """What the user chooses by name: a class of ``packages`` below ``base``, or one of his own."""

    help: str
    default: str | None
    packages: tuple[str, ...]
    base: type = nn.Module


PIECES = {
    "model": Piece("p(x, z)", "VAE", ("ppl_vae.models",)),
    "prior": Piece("the model's p(z)", "StandardNormal", ("ppl_vae.priors",)),
    "likelihood": Piece("the model's p(x | z)", "Bernoulli", ("ppl_vae.likelihoods",)),
    "decoder": Piece("the likelihood's network", "MLP", ("ppl_vae.networks",)),
    "guide": Piece("q(z | x)", "MeanFieldGuide", ("ppl_vae.guides",)),
    "encoder": Piece("the guide's network", "MLP", ("ppl_vae.networks",)),
    "flow": Piece("the flow of FlowGuide", "InverseAutoregressive", ("ppl_vae.flows",)),
    "elbo": Piece("the ELBO estimator", "Trace_ELBO", ("ppl_vae.infer", "pyro.infer"), ELBO),
    "optimizer": Piece("a torch optimiser", "Adam", ("torch.optim",), Optimizer),
    "scheduler": Piece(
        "a torch scheduler, stepped every epoch", None, ("torch.optim.lr_scheduler",), LRScheduler
    ),
}
ROOTS = ("model", "guide", "elbo", "optimizer", "scheduler")
NESTED = ("prior", "likelihood", "decoder", "encoder", "flow")  # pieces that are arguments of others

# arguments that come from the data, from other settings or from other pieces
_GIVEN = {*NESTED, "latent_dim", "data_dim", "x_shape", "in_shape", "out_shape", "params", "lr", "optimizer"}
# arguments of Pyro's and torch's classes that seldom matter here: taken, but not listed
_HIDDEN = {
    *("max_plate_nesting", "max_iarange_nesting", "strict_enumeration_warning", "tail_adaptive_beta"),
    *("jit_options", "ignore_jit_warnings", "retain_graph", "last_epoch"),
    *("foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"),
}


def known(piece: str) -> dict[str, Any]:
    """Return the classes that a piece's short names stand for."""
    base, found = PIECES[piece].base, {}
    for package in PIECES[piece].packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", dir(module)):
            made = getattr(module, name)
            if inspect.isclass(made) and issubclass(made, base) and made is not base and name[:3] != "Jit":
                taken = inspect.signature(made).parameters
                out_shape = taken.get("out_shape")
                fits = {
                    "encoder": out_shape is None or out_shape.default is None,
                    "decoder": out_shape is not None,
                    "guide": "encoder" in taken,
                    "model": "model" not in taken,
                }
                if fits.get(piece, True):
                    found[name] = made
    return found


def resolve(name: str | None, piece: str) -> Any:
    """Return the class or function that is chosen for a piece by a short name or as ``find`` takes it.

    Raises:
        ValueError, FileNotFoundError: naming the piece, if there is no such thing.
    """
    if name is None:
        return None
    choices, base = known(piece), PIECES[piece].base
    if name in choices:
        return choices[name]
    if not re.search(r"\w[.:]\w", name):
        expected = ", ".join([*choices, "or your own as file.py:Name"])
        raise ValueError(f"--{piece}: unknown {name!r}{did_you_mean(name, choices)}; expected {expected}")
    made = find(name, f"--{piece}")
    if inspect.isclass(made) and not issubclass(made, base):
        raise ValueError(f"--{piece}: expected a class derived from {base.__name__}, got {name}")
    return made


def find(name: str, setting: str) -> Any:
    """Return what ``file.py:Name`` or ``package.Name`` stands for."""
    location, _, attribute = name.rpartition(":" if ":" in name else ".")
    if not location or not attribute or name.endswith(".py"):
        raise ValueError(f"{setting}: expected file.py:Name or package.Name, got {name!r}")
    module = _import(location, setting)
    if not hasattr(module, attribute):
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ValueError(f"{setting}: {location} has no {attribute!r}{did_you_mean(attribute, public)}")
    return getattr(module, attribute)


def _import(location: str, setting: str) -> Any:
    if not location.endswith(".py"):
        try:
            return importlib.import_module(location)
        except Exception as error:
            raise ValueError(
                f"{setting}: can't import {location!r}: {type(error).__name__}: {error}"
            ) from error
    path = Path(location).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{setting}: expected a Python file, found none at {location}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        raise ValueError(f"{setting}: rename {location}: there is another module {path.stem!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{setting}: can't import {location}")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise ValueError(f"{setting}: {location} fails: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def arguments(made: Any) -> list[str]:
    """Return the names of a class's arguments; a function or an object is a piece as it is."""
    return list(inspect.signature(made).parameters) if inspect.isclass(made) else []


def settings_of_pieces(chosen: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings of the chosen classes, such as ``encoder.hidden``."""
    found: dict[str, Setting] = {}
    for piece, made in chosen.items():
        if inspect.isclass(made):
            group = f"--{piece} {made.__name__}"
            found |= settings_of(made, f"{piece}.", skip=_GIVEN, hide=_HIDDEN, group=group)
    return found


def build(
    piece: str,
    chosen: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Mapping[str, Any]],
) -> Any:
    """Build a piece of its settings, the data's sizes, and the pieces that are its arguments.

    Args:
        piece: which one.
        chosen: the class or function of each piece.
        options: the settings of each piece.
        sizes: for each piece the arguments that come from the data and the number of latent dimensions.

    Raises:
        ValueError: naming the piece, if it can't be built.
    """
    made, given = chosen[piece], {}
    if not inspect.isclass(made):
        return made
    for name in arguments(made):
        if name in NESTED:
            given[name] = build(name, chosen, options, sizes)
        elif name in sizes[piece]:
            given[name] = sizes[piece][name]
        elif name == "data_dim":
            shape = ", ".join(map(str, sizes[piece]["x_shape"]))
            raise ValueError(f"--{piece}: {made.__name__} takes data of shape [n, d], got [n, {shape}]")
    try:
        return made(**given, **options[piece])
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ValueError(f"--{piece}{'.' if name in arguments(made) else ': '}{error}") from error
