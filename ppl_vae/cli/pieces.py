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
from ppl_vae.guides import GaussianMixtureGuide, HierarchicalGuide, LadderGuide
from ppl_vae.likelihoods import Autoregressive
from ppl_vae.models import HierarchicalVAE
from ppl_vae.networks import PixelHead
from ppl_vae.priors import ConditionalNormal


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
    "inner": Piece("the guide that another one starts from", "MeanFieldGuide", ("ppl_vae.guides",)),
    "encoder": Piece("the guide's network", "MLP", ("ppl_vae.networks",)),
    "flow": Piece("the flow of FlowGuide", "InverseAutoregressive", ("ppl_vae.flows",)),
    "prior_flow": Piece("the flow of FlowPrior", "MaskedAutoregressive", ("ppl_vae.flows",)),
    "classifier": Piece("the network of q(y | x)", "MLP", ("ppl_vae.networks",)),
    "network": Piece("the network of ConditionalNormal, and between layers", "MLP", ("ppl_vae.networks",)),
    "elbo": Piece("the ELBO estimator", "Trace_ELBO", ("ppl_vae.infer", "pyro.infer"), ELBO),
    "optimizer": Piece("a torch optimiser", "Adam", ("torch.optim",), Optimizer),
    "scheduler": Piece(
        "a torch scheduler, stepped every epoch", None, ("torch.optim.lr_scheduler",), LRScheduler
    ),
}
ROOTS = ("model", "guide", "elbo", "optimizer", "scheduler")
# the pieces that are arguments of others
NESTED = ("prior", "likelihood", "decoder", "encoder", "flow")
# the defaults that suit a model
SUITED = {
    "SemiSupervisedVAE": {"guide": "SemiSupervisedGuide", "elbo": "EnumELBO"},
    "GaussianMixtureVAE": {"guide": "GaussianMixtureGuide", "elbo": "EnumELBO"},
    "HierarchicalVAE": {"guide": "HierarchicalGuide"},
    "VeryDeepVAE": {"guide": "VeryDeepGuide", "decoder": "PixelHead"},
}
# classes of which the command line knows no more than where to read about them
_IN_PYTHON = {
    **dict.fromkeys(("SequenceVAE", "DeepMarkovModel", "DeepMarkovGuide"), "docs/sequences.md"),
    **dict.fromkeys(("AutoregressiveCategorical", "AutoregressiveNormal"), "docs/sequences.md"),
    **dict.fromkeys(("RecurrentEncoder", "RecurrentDecoder", "GatedTransition"), "docs/sequences.md"),
    **dict.fromkeys(("TransformerEncoder", "TransformerDecoder"), "docs/sequences.md"),
    **dict.fromkeys(("IndexedModel", "LocalGuide"), "docs/guides.md"),
}
_ENDINGS = ("prior", "guide", "vae", "elbo", "encoder", "decoder")  # that a name need not have

# arguments that come from the data, from other settings or from other pieces
_GIVEN = {*NESTED, "latent_dim", "data_dim", "x_shape", "in_shape", "out_shape", "params", "lr", "optimizer"}
_GIVEN |= {"state_shape", "out_channels", "num_classes", "latent_dims"}
_GIVEN_TO = {GaussianMixtureGuide: {"components"}, Autoregressive: {"channels"}}
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
            usable = inspect.isclass(made) and issubclass(made, base) and not inspect.isabstract(made)
            if usable and made is not base and name[:3] != "Jit":
                if name not in _IN_PYTHON and _fits(piece, made):
                    found[name] = made
    return found


def _fits(piece: str, made: Any) -> bool:
    """Return whether a class of a piece's packages can be that piece."""
    taken = inspect.signature(made).parameters
    in_shape, out_shape = "in_shape" in taken, taken.get("out_shape")
    vector = in_shape and out_shape is not None and out_shape.default is None
    fits = {
        "encoder": vector or (in_shape and out_shape is None),
        "decoder": out_shape is not None or made is PixelHead,
        "classifier": vector,
        "network": vector,
        "inner": "encoder" in taken and "model" not in taken,
        "prior_flow": getattr(made, "invertible", True),
    }
    return fits.get(piece, True)


def short_names(piece: str) -> dict[str, Any]:
    """Return a piece's classes by all that the user may call them, in small letters without ``_``.

    Endings such as ``Guide`` and the ``Trace`` of Pyro's estimators need not be there. Whole names win over
    shortened ones, the library's over others.
    """
    named = [(_keys(name), made) for name, made in known(piece).items()]
    found: dict[str, Any] = {}
    for short in (False, True):
        for keys, made in named:
            for key in keys if short else keys[:1]:
                found.setdefault(key, made)
    return found


def _keys(name: str) -> list[str]:
    """Return what a class may be called, its whole name first."""
    key = short = name.lower().replace("_", "")
    for ending in _ENDINGS:
        short = short.removesuffix(ending)
    return list(dict.fromkeys(k for k in (key, short, short.removeprefix("trace")) if k))


def full_name(name: Any, piece: str) -> Any:
    """Return the name of the class that a shorter one stands for, other names as they are."""
    if not isinstance(name, str) or name in (classes := known(piece)):
        return name
    made = short_names(piece).get(name.lower().replace("_", ""))
    return next((full for full, one in classes.items() if one is made), name)


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
    modules = [importlib.import_module(package) for package in PIECES[piece].packages]
    for full, page in _IN_PYTHON.items():
        if name.lower() in _keys(full) and any(hasattr(module, full) for module in modules):
            raise ValueError(f"--{piece}: {full} is for use in Python: see {page}")
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


def parts(piece: str, made: Any) -> dict[str, tuple[str, ...]]:
    """Return the pieces that each argument of a piece is made of."""
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in NESTED}
    if piece == "model":
        found |= {"classifier": ("classifier",)}
        if is_a(made, HierarchicalVAE):
            found |= {"layers": ("network",)}
    elif piece == "prior":
        found |= {"flow": ("prior_flow",), "network": ("network",), "guide": ("guide",)}
    elif piece in ("guide", "inner"):
        found |= {"classifier": ("classifier",), "model": ("model",), "guide": ("inner",)}
        if is_a(made, (HierarchicalGuide, LadderGuide)):
            found |= {"encoders": ("encoder", "network")}
    return {name: found[name] for name in arguments(made) if name in found}


def is_a(made: Any, cls: type | tuple[type, ...]) -> bool:
    """Return whether a piece is chosen to be of a class."""
    return inspect.isclass(made) and issubclass(made, cls)


def settings_of_pieces(chosen: Mapping[str, Any]) -> dict[str, Setting]:
    """Return the settings of the chosen classes, such as ``encoder.hidden``."""
    found: dict[str, Setting] = {}
    for piece, made in chosen.items():
        if inspect.isclass(made):
            group = f"--{piece} {made.__name__}"
            given = _GIVEN.union(*(names for cls, names in _GIVEN_TO.items() if issubclass(made, cls)))
            skip = given | parts(piece, made).keys()
            found |= settings_of(made, f"{piece}.", skip=skip, hide=_HIDDEN, group=group)
    return found


def build(
    piece: str,
    chosen: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Mapping[str, Any]],
    built: dict[str, Any],
) -> Any:
    """Build a piece of its settings, the data's sizes, and the pieces that are its arguments.

    Args:
        piece: which one.
        chosen: the class or function of each piece.
        options: the settings of each piece, which win over its sizes.
        sizes: for each piece the arguments that come from the data and the number of latent dimensions.
        built: the pieces that are there already, to which it is added.

    Raises:
        ValueError: naming the piece, if it can't be built.
    """
    if piece in built:
        if built[piece] is _UNDER_WAY:
            raise ValueError(
                f"--guide: {chosen['guide'].__name__} is made of the model, and its prior "
                f"{chosen['prior'].__name__} of the guide; choose another of the two"
            )
        return built[piece]
    built[piece] = _UNDER_WAY
    built[piece] = _make(piece, chosen, options, sizes, built)
    return built[piece]


_UNDER_WAY = object()


def _make(
    piece: str,
    chosen: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, Mapping[str, Any]],
    built: dict[str, Any],
    **own: Any,
) -> Any:
    """Build a piece, of some sizes of its own."""
    made = chosen[piece]
    given: dict[str, Any] = {}
    if not inspect.isclass(made):
        return made
    taken, of_parts = {**sizes[piece], **own}, parts(piece, made)
    for name in arguments(made):
        if name == "layers" and name in of_parts:
            given[name] = [
                ConditionalNormal(_make("network", chosen, options, sizes, built, in_shape=above), latent_dim)
                for above, latent_dim in taken["layers"]
            ]
        elif name == "encoders" and name in of_parts:
            given[name] = networks = [build("encoder", chosen, options, sizes, built)]
            for below in taken["latent_dims"][:-1]:
                size = networks[-1].out_features if is_a(made, LadderGuide) else below
                networks.append(_make("network", chosen, options, sizes, built, in_shape=size))
        elif name in of_parts:
            part = of_parts[name][0]
            if (piece, part) == ("prior", "guide") and "inner" in chosen:
                part = "inner"  # of which the guide is made, and the model no part
            if part in chosen:  # a model takes the classifier that the guide has
                given[name] = build(part, chosen, options, sizes, built)
        elif name in taken:
            given[name] = taken[name]
        elif name == "data_dim":
            shape = ", ".join(map(str, taken["x_shape"]))
            raise ValueError(f"--{piece}: {made.__name__} takes data of shape [n, d], got [n, {shape}]")
    try:
        return made(**{**given, **options[piece]})
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise ValueError(f"--{piece}{'.' if name in arguments(made) else ': '}{error}") from error
