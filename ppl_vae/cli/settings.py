"""Settings: their names, types and help from signatures, their values from words and YAML files."""

import argparse
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

REQUIRED = inspect.Parameter.empty
BARE = object()  # a setting named without a value: true, if it is a switch
_ANY = bool | int | float | list | dict | str | None
_TYPE_NAMES = {bool: "[true|false]", int: "INT", float: "NUMBER", str: "TEXT", NoneType: "null"}


@dataclass(frozen=True)
class Setting:
    """Something that the user can set.

    Attributes:
        help: what it is, in a phrase.
        type: the type of its values, which are plain data.
        default: its value when nobody sets it, or ``REQUIRED``.
        group: its heading in the help; None hides it there.
        metavar: what stands for its value in the help; by default its type.
    """

    help: str
    type: Any = str
    default: Any = None
    group: str | None = None
    metavar: str | None = None

    def read(self, value: Any) -> Any:
        """Return the value that a word of the command line or an entry of a file stands for.

        Raises:
            ValueError: if it is of another type.
        """
        members = get_args(self.type) or (self.type,)
        if value is BARE and bool in members:
            return True
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=self.type)
        try:
            result = parser.parse_object({"value": value}).value
        except ArgumentError:
            result = REQUIRED
        if result is REQUIRED or (result is None and NoneType not in members):
            raise ValueError(
                f"expected {_type_text(self.type)}, got {'no value' if value is BARE else repr(value)}"
            )
        return result


def settings_of(
    made: Callable[..., Any],
    prefix: str = "",
    *,
    skip: Collection[str] = (),
    hide: Collection[str] = (),
    group: str | None = None,
) -> dict[str, Setting]:
    """Return the arguments of a class's constructor, or of a function, as settings.

    Args:
        made: the class or function.
        prefix: what their names start with.
        skip: arguments that are no settings.
        hide: arguments that the help leaves out.
        group: their heading in the help.
    """
    try:
        signature = inspect.signature(made, eval_str=True)
    except NameError:  # an annotation that only a type checker understands
        signature = inspect.signature(made)
    texts: dict[str, str | None] = {}
    for owner in reversed(made.__mro__) if inspect.isclass(made) else [made]:
        texts |= {p.arg_name: p.description for p in docstring_parser.parse(owner.__doc__ or "").params}
    return {
        prefix + name: Setting(
            _phrase(texts.get(name) or ""),
            _plain_type(parameter.annotation, parameter.default) or _ANY,
            parameter.default,
            None if name in hide else group,
        )
        for name, parameter in signature.parameters.items()
        if name not in skip and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def _plain_type(annotation: Any, default: Any = None) -> Any:
    """Return the part of a type that is plain data, None if there is none.

    Classes and callables are left out: jsonargparse would import what their values name.
    """
    if annotation is REQUIRED:
        guessed = {bool: bool, int: int | float, float: float, str: str}
        return guessed.get(type(default))
    if annotation in _TYPE_NAMES or get_origin(annotation) is Literal:
        return annotation
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin not in (Union, UnionType, tuple, list, dict, Iterable, Sequence, Mapping):
        return None
    inner = [_plain_type(part) for part in parts]
    if origin in (Union, UnionType):
        plain = [part for part in inner if part is not None]
        return functools.reduce(operator.or_, plain) if plain else None
    return None if None in inner else (Sequence if origin is Iterable else origin)[tuple(inner)]


def _type_text(kind: Any) -> str:
    if kind in _TYPE_NAMES:
        return _TYPE_NAMES[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(str(choice) for choice in inner)
    if kind == _ANY:
        return "VALUE"
    texts = [_type_text(part) for part in inner]
    if origin in (Union, UnionType):
        return "|".join(texts)
    if origin is tuple:
        return f"[{', '.join(texts)}]"
    return f"{{{texts[0]}: {texts[1]}}}" if len(texts) == 2 else f"[{texts[0]}, ...]"


def _phrase(description: str) -> str:
    """Return the first paragraph of an argument's description without reStructuredText or its default."""
    text = " ".join(description.split("\n\n")[0].split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("`_", "").replace("`", "").replace("\\", "")
    return re.sub(r"[ (]+[Dd]efault( is|s to|:).*", "", text).rstrip(".")


def format_help(usage: str, description: str, settings: Mapping[str, Setting]) -> str:
    """Return the help of a command: its settings under their headings."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    groups = {s.group: parser.add_argument_group(s.group) for s in settings.values() if s.group}
    for name, setting in settings.items():
        if setting.group is None:
            continue
        text, default = setting.help, setting.default
        if default is REQUIRED:
            text += " (required)"
        elif default is not None:
            text += f" (default: {_value_text(default)})"
        groups[setting.group].add_argument(
            f"--{name}",
            metavar=setting.metavar or _type_text(setting.type),
            help=text.replace("%", "%%").strip(),
        )
    return parser.format_help().rstrip()


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)


def split_words(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the words that are no settings, and the settings by name.

    ``--name value`` and ``--name=value`` are the same; ``--name`` alone is ``BARE``. The last one wins.
    """
    positional: list[str] = []
    named: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        value: Any = text
        if not equals:
            value = BARE if not rest or rest[0].startswith("--") else rest.pop(0)
        named[name.replace("-", "_")] = value
    return positional, named


def flatten(settings: Mapping[str, Any], pieces: Collection[str]) -> dict[str, Any]:
    """Return ``{"encoder": {"class": "MLP", "a": 1}}`` as ``{"encoder": "MLP", "encoder.a": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if key in pieces and isinstance(value, Mapping):
            flat |= {key if name == "class" else f"{key}.{name}": entry for name, entry in value.items()}
        else:
            flat[str(key)] = value
    return flat


def nest(flat: Mapping[str, Any], pieces: Collection[str]) -> dict[str, Any]:
    """Undo ``flatten``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        piece, dot, name = key.partition(".")
        if piece in pieces:
            nested.setdefault(piece, {})[name if dot else "class"] = value
        else:
            nested[key] = value
    return nested
