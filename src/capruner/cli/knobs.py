"""Flags for the knobs of :class:`capruner.PruneConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from capruner.cli.arguments import flag
from capruner.config import Knob, knobs


def add_knobs(parser: argparse._ActionsContainer, chosen: Iterable[Knob], defaults: bool = False) -> None:
    """One flag for each knob.

    Args:
        defaults: the knob's default is the flag's; else a flag that is not given is None, so that a recipe or the knob's default decides.
    """
    for knob in chosen:
        how: dict[str, Any] = {"type": _reader(knob)}
        if isinstance(knob.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif knob.kind.words:
            how = {"choices": knob.kind.words}
        elif isinstance(knob.default, tuple):
            how |= {"nargs": "+", "metavar": "NAME"}
        else:
            how |= {"metavar": "N" if knob.type.startswith(("int", "float")) else "VALUE"}
        parser.add_argument(flag(knob.name), default=knob.default if defaults else None, help=_help(knob), **how)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The knobs that a command line sets."""
    return {name: value for name in knobs() if (value := getattr(args, name, None)) is not None}


def _reader(knob: Knob) -> Callable[[str], Any]:
    """Convert and check one word."""

    def read(word: str) -> Any:
        try:
            value = word if isinstance(knob.default, tuple) else knob.kind.convert(word)
        except (ValueError, OverflowError) as error:
            raise argparse.ArgumentTypeError(f"{word!r} is invalid: {error}") from error
        try:
            knob.kind.check(knob.name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return read


def _help(knob: Knob) -> str:
    text = knob.help.replace("%", "%%").replace(" None: ", " Default: ")
    return text if knob.default in (None, ()) else f"{text} (default {knob.default})"
