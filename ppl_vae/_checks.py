"""Argument checks: each names the argument, what came and what was expected."""

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real


def check_positive_int(name: str, value: object) -> int:
    """Return ``value`` as an ``int``, or raise if it is not a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected a whole number above 0, got {value!r}")
    if value <= 0:
        raise ValueError(f"{name}: expected a whole number above 0, got {value!r}")
    return int(value)


def check_positive(name: str, value: object) -> float:
    """Return ``value`` as a ``float``, or raise if it is not a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number above 0, got {value!r}")
    try:
        valid = math.isfinite(value) and float(value) > 0
    except OverflowError:
        valid = False
    if not valid:
        raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def check_seed(seed: object) -> int:
    """Return ``seed`` as an ``int``, or raise if it is not a whole number from 0."""
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed: expected a whole number from 0, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed: expected a whole number from 0, got {seed!r}")
    return int(seed)


def check_sizes(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    """Return ``value``, a size or a sequence of sizes, as a tuple of whole numbers above zero."""
    if isinstance(value, (int, Integral, str, bytes)):
        return (check_positive_int(name, value),)
    try:
        sizes = tuple(value)
    except TypeError:
        raise TypeError(f"{name}: expected a size or a sequence of sizes, got {value!r}") from None
    return tuple(check_positive_int(f"{name}[{i}]", size) for i, size in enumerate(sizes))


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise if ``value`` is not one of ``choices``; a near name is suggested."""
    known = list(choices)
    if any(value is choice or value == choice for choice in known):
        return
    expected = ", ".join(repr(choice) for choice in known)
    raise ValueError(f"{name}: unknown {value!r}{did_you_mean(value, known)}; expected one of {expected}")


def did_you_mean(value: object, choices: Iterable[object]) -> str:
    """Return `` (did you mean 'x'?)`` for the choice nearest to ``value``, or an empty string."""
    names = {str(choice).lower(): str(choice) for choice in choices if choice is not None}
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def check_at_least(name: str, value: object, least: float = 0.0) -> float:
    """Return ``value`` as a ``float``, or raise if it is not a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number from {least:g}, got {value!r}")
    if not (math.isfinite(value) and float(value) >= least):
        raise ValueError(f"{name}: expected a finite number from {least:g}, got {value!r}")
    return float(value)


def check_number(name: str, value: object) -> float:
    """Return ``value`` as a ``float``, infinite ones too, or raise if it is no number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if math.isnan(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


def check_features(network: object, features: object) -> int:
    """Return the number of features that a network gives: as the argument, or its ``out_features``, says.

    Raises:
        TypeError: if neither does.
        TypeError, ValueError: if it is not a whole number above 0.
    """
    width = getattr(network, "out_features", None) if features is None else features
    if width is None:
        raise TypeError(
            f"features: expected the number of features that {type(network).__name__} gives, "
            "since it has no `out_features`, got None"
        )
    return check_positive_int("features", width)
