"""The kinds of values that knobs hold: how each is checked, and how it is read from YAML or from a command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from capruner.checks import check_count, check_flag, check_names, check_number, is_number, show
from capruner.core.blocks import check_block_size
from capruner.core.memory import parse_bytes
from capruner.core.patterns import parse_mask_type

Check = Callable[[str, Any], object]
"""Takes a knob's name and value; raises ``ValueError`` for an invalid value."""
Convert = Callable[[Any], Any]
"""Turns what YAML or a command line holds into the type of a knob; raises ``ValueError`` or ``TypeError`` for an invalid value."""


@dataclass(frozen=True)
class Kind:
    """One kind of value.

    Attributes:
        check: raises for an invalid value.
        convert: from a value of YAML, or a word of a command line, to the value of the knob.
        words: the only values, where there are few.
    """

    check: Check
    convert: Convert
    words: tuple[str, ...] = ()


def one_of(words: Iterable[str]) -> Kind:
    """One of a few words."""
    allowed = tuple(words)

    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{name} must be one of {sorted(allowed)}, got {show(value)}")

    return Kind(check, str, allowed)


def optional(kind: Kind) -> Kind:
    """``kind``, or None."""
    return Kind(lambda name, value: None if value is None else kind.check(name, value), none_or(kind.convert))


def or_auto(kind: Kind) -> Kind:
    """``kind``, or the word "auto"."""
    return Kind(
        lambda name, value: None if value == "auto" else kind.check(name, value),
        lambda value: value if value == "auto" else kind.convert(value),
    )


def at_least(least: float) -> Kind:
    """A finite number, at least ``least``."""
    return Kind(lambda name, value: check_number(name, value, least), number)


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


def _damp(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {show(value)}; 1e-8 to 1e-4 are usual")


def _share(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, or None to have it estimated, got {show(value)}")


def _device(name: str, value: Any) -> None:
    # Whether this machine has it is checked when it is used: a config may be written elsewhere.
    try:
        torch.device(value if isinstance(value, str) else "")
    except RuntimeError:
        raise ValueError(f"{name} must be a device of this machine, for example 'cpu', got {show(value)}") from None


def _costs(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be {{parameter name: cost of one of its weights}}, got {show(value)}")


COUNT = Kind(check_count, whole)
FLAG = Kind(check_flag, flag)
DAMP = Kind(_damp, number)
SHARE = Kind(_share, number)
NAMES = Kind(check_names, names)
DEVICE = Kind(_device, str)
COSTS = Kind(_costs, dict)
MASK_TYPE = Kind(lambda _, value: parse_mask_type(value), str)
BLOCK_SIZE = Kind(lambda _, value: check_block_size(value), whole)
PARALLEL_BLOCKS = Kind(check_count, blocks)
BYTES = Kind(lambda _, value: parse_bytes(value), str)
