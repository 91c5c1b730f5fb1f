"""Modules as plain data: the class and its constructor's arguments, nested.

The library's classes keep each constructor argument as an attribute of the same name, so that a
built module can be described, and built again, from the constructor's signature alone.
"""

import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import nn

from ppl_vae._checks import did_you_mean

MAX_LENGTH = 1000  # of a list of sizes, each of which costs a layer
PACKAGES = ("models", "guides", "priors", "likelihoods", "networks", "flows")


def library_classes() -> dict[str, type]:
    """Return the library's public classes of models, guides and what they are made of, by name."""
    modules = [importlib.import_module(f"ppl_vae.{package}") for package in PACKAGES]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: value for name, value in found.items() if inspect.isclass(value)}


def describe(value: Any) -> Any:
    """Return ``value`` as plain data: numbers, strings, lists and dictionaries.

    A module becomes ``{"class": name, argument: ...}``, a function ``{"function": path}`` and a
    ``functools.partial`` the same with its keywords. Of a tensor or an array the class alone is kept.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return describe(value.func) | {key: describe(item) for key, item in value.keywords.items()}
    if inspect.isclass(value):
        return {"class": _path(value)}
    if callable(value) and hasattr(value, "__qualname__"):  # a function, not an object that can be called
        return {"function": _path(value)}
    try:
        parameters = dict(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):  # a type of an extension, a tensor's say
        parameters = {}
    arguments = {
        name: describe(getattr(value, name))
        for name, parameter in parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and hasattr(value, name)
    }
    return {"class": _path(type(value))} | arguments


def _path(value: Any) -> str:
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if library_classes().get(name) is value:
        return name
    return f"{getattr(value, '__module__', type(value).__module__)}.{name}"


def build(description: Any, name: str, classes: Iterable[type] = ()) -> Any:
    """Build what ``describe`` described, from the library's classes and ``classes`` alone.

    Nothing is imported: a class that is neither the library's nor among ``classes`` is an error.

    Args:
        description: plain data as ``describe`` returns it.
        name: what the description is, for errors.
        classes: further classes that may be built.

    Raises:
        ValueError: naming the entry, if a class is unknown or refuses its arguments.
    """
    own = {_path(cls): cls for cls in classes} | {f"__main__.{cls.__qualname__}": cls for cls in classes}
    known = library_classes() | own
    return _build(description, name, known)


def _build(description: Any, name: str, known: Mapping[str, type]) -> Any:
    if isinstance(description, list):
        return tuple(_build(item, f"{name}[{i}]", known) for i, item in enumerate(description))
    if not isinstance(description, dict):
        return description
    if "function" in description:
        raise ValueError(
            f"{name}: was the function {description['function']!r}, which is no class of the library; "
            f"pass it as `{name.split('.')[0]}=`"
        )
    path = description.get("class")
    if not isinstance(path, str) or path not in known:
        raise ValueError(
            f"{name}: was made by {path!r}, which is no class of the library{did_you_mean(path, known)}; "
            f"pass the {name.split('.')[0]} as `{name.split('.')[0]}=` or its class in `classes=`"
        )
    if path in library_classes():
        for key, item in description.items():
            if isinstance(item, list) and len(item) > MAX_LENGTH:
                raise ValueError(f"{name}.{key}: expected at most {MAX_LENGTH} entries, got {len(item)}")
    arguments = {
        key: _build(item, f"{name}.{key}", known) for key, item in description.items() if key != "class"
    }
    try:
        return known[path](**arguments)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: {path} can't be built: {reason[:300]}") from error
