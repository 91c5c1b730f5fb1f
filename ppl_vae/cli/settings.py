"""Settings: their names, types and help from signatures, their values from words and files."""

import argparse
import functools
import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

from ppl_vae._checks import did_you_mean

REQUIRED = inspect.Parameter.empty
BARE = object()  # a setting named without a value: true, if it is a switch
PLAIN = bool | int | float | list | dict | str | None


class Help(Exception):
    """The help that was asked for."""


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
    type: Any = str | None
    default: Any = None
    group: str | None = None
    metavar: str | None = None

    def read(self, value: Any) -> Any:
        """Return the value that a word, or an entry of a file, stands for.

        Raises:
            ValueError: if it is of another type.
        """
        members = get_args(self.type) or (self.type,)
        if value is BARE and bool in members:
            return True
        if value == "None" and NoneType in members:
            return None
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=self.type)
        try:
            result = parser.parse_object({"value": value}).value
        except ArgumentError:
            result = REQUIRED
        if result is REQUIRED or (result is None and NoneType not in members):
            got = "no value" if value is BARE else repr(value)
            near = did_you_mean(value, choices) if (choices := _choices(self.type)) else ""
            raise ValueError(f"expected {_type_text(self.type)}, got {got}{near}")
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
            _plain_type(parameter.annotation, parameter.default) or PLAIN,
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
        guess = {bool: bool, int: int | float, float: float, str: str}
        return guess.get(type(default))
    if annotation in (bool, int, float, str, NoneType) or get_origin(annotation) is Literal:
        return annotation
    origin = get_origin(annotation)
    if origin not in (Union, UnionType, tuple, list, dict, Iterable, Sequence, Mapping):
        return None
    inner = [_plain_type(part) for part in get_args(annotation)]
    if origin in (Union, UnionType):
        plain = [part for part in inner if part is not None]
        return functools.reduce(operator.or_, plain) if plain else None
    return None if None in inner else (Sequence if origin is Iterable else origin)[tuple(inner)]


def _choices(kind: Any) -> list[Any]:
    """Return the words that a type allows, if it lists them."""
    parts = [kind, *get_args(kind)]
    return [word for part in parts if get_origin(part) is Literal for word in get_args(part)]


def _type_text(kind: Any) -> str:
    if kind is bool:
        return "true | false"
    if kind is NoneType:
        return "None"
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(kind)))
    return re.sub(r"\w+\.", "", str(kind)) if get_args(kind) else kind.__name__


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
            text += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        metavar = setting.metavar or _type_text(setting.type)
        groups[setting.group].add_argument(f"--{name}", metavar=metavar, help=text.replace("%", "%%").strip())
    return parser.format_help().rstrip()


def split_words(words: Sequence[str], *, switches: Collection[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """Return the words that are no settings, and the settings by name.

    ``--name value`` and ``--name=value`` are the same; ``--name`` alone is ``BARE``. The last one wins.
    The word after a switch is its value only if it is true or false.
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
        name = name.replace("-", "_")
        if not equals:
            bare = not rest or rest[0].startswith("--")
            bare = bare or (name in switches and rest[0].lower() not in ("true", "false"))
            value = BARE if bare else rest.pop(0)
        named[name] = value
    return positional, named


@dataclass(frozen=True)
class Source:
    """Settings by name, from the command line, from a file of the user's, or from a saved run.

    Attributes:
        values: words, or plain data.
        prefix: what comes before a setting's name in an error.
        trusted: whether what it names may be imported.
    """

    values: dict[str, Any] = field(default_factory=dict)
    prefix: str = "--"
    trusted: bool = True


class Given(dict[str, tuple[Any, Source]]):
    """What several sources set, later ones winning: values as they were given, and by which source.

    A source that sets another class than the ones before it ends the settings of their class.
    """

    def __init__(self, *sources: Source, defaults: Mapping[str, Any]) -> None:
        super().__init__()
        for source in sources:
            for name, value in source.values.items():
                if value != self.get(name, (defaults.get(name), source))[0]:
                    for old in [old for old in self if old.startswith(f"{name}.")]:
                        del self[old]
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
