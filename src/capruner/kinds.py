"""The kinds of values that knobs hold: how each is checked, and how it is read from YAML or from a command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from capruner.checks import check_count, check_flag, check_names, check_number, is_number, show
from capruner.convert import Convert, blocks, flag, names, none_or, number, whole
from capruner.core.blocks import check_block_size
from capruner.core.memory import parse_bytes
from capruner.core.patterns import parse_mask_type

Check = Callable[[str, Any], object]
"""Takes a knob's name and value; raises ``ValueError`` for an invalid value."""


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
