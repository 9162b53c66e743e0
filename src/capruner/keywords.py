"""Functions that take knobs of :class:`capruner.PruneConfig` as keywords."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from capruner.checks import refuse_unknown
from capruner.config import knobs

_P = ParamSpec("_P")
_R = TypeVar("_R")


def takes_knobs(*names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function with ``**knobs: Unpack[Knobs]``: its signature and its help list the knobs ``names``, all if there are none, and other
    keywords are refused by name."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        chosen = [knobs()[name] for name in names or knobs()]
        own = inspect.signature(function)
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        more = [
            inspect.Parameter(k.name, inspect.Parameter.KEYWORD_ONLY, default=k.default, annotation=k.type)
            for k in chosen
        ]
        known = [p.name for p in (*named, *more)]

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            refuse_unknown(kwargs, known, function.__name__)
            return function(*args, **kwargs)

        call.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
        text = "\n".join(
            textwrap.fill(f"{k.name}: {k.help}", 150, initial_indent="    ", subsequent_indent="        ")
            for k in chosen
        )
        call.__doc__ = (
            f"{inspect.cleandoc(function.__doc__ or '')}\n\nKnobs (see :class:`capruner.PruneConfig`):\n{text}\n"
        )
        return call

    return decorate
