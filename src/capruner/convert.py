"""Converters from what YAML or a command line holds to the type of a knob. Each raises ``ValueError`` or ``TypeError`` for an invalid value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Convert = Callable[[Any], Any]


def none_or(convert: Convert) -> Convert:
    """A converter that also accepts None, and the words ``None`` and ``null`` that public recipes write for it."""
    return lambda value: None if value is None or value in ("None", "null") else convert(value)


def flag(value: Any) -> bool:
    """A boolean; the truth of a non-empty string does not count."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def number(value: Any) -> float:
    """A number; true and false are invalid."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number: 4096.0 is valid, 0.5 is not."""
    if isinstance(value, bool) or not float(value).is_integer():
        raise ValueError("expected a whole number")
    return int(float(value))


def blocks(value: Any) -> int | None:
    """A number of blocks; public recipes write -1 for "all at once", where None lets the method choose."""
    return None if value is None or whole(value) == -1 else whole(value)


def names(value: Any) -> list[str]:
    """One name or pattern, or a list of them."""
    entries = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError("expected names or patterns")
    return entries
