"""Check, before any work, that all processes were called with the same arguments for the same model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import nn

from capruner.distributed.collectives import processes
from capruner.distributed.failures import PeerError
from capruner.files import digest
from capruner.text import some

_P = ParamSpec("_P")
_R = TypeVar("_R")
_REACHED: ContextVar[list[bool]] = ContextVar("_REACHED")
"""Whether the call in progress has reached :func:`agree`; a list, so that callees can change it."""


def agreeing(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that all processes call together and that calls :func:`agree` once its arguments are checked.

    When the arguments of one process are invalid the others raise too, instead of waiting for it.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        reached = [False]
        token = _REACHED.set(reached)
        try:
            return function(*args, **kwargs)
        except PeerError:
            raise
        except Exception as error:
            if not reached[0]:
                processes().all_gather_objects({"error": " ".join(str(error).split())})
            raise
        finally:
            _REACHED.reset(token)

    return call


def agree(arguments: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ``ValueError`` on every process unless all have the same arguments (JSON values) and parameters; says what differs where."""
    _REACHED.get()[0] = True
    if processes().world_size == 1:
        return  # without the digests of all parameters
    parameters = {name: [str(p.dtype), list(p.shape), digest([p])] for name, p in model.named_parameters()}
    everybody = processes().all_gather_objects({"digest": digest([dict(arguments), parameters])})
    if failed := [(rank, peer["error"]) for rank, peer in enumerate(everybody) if "error" in peer]:
        rank, error = failed[0]
        raise ValueError(f"rank {rank} cannot start, so no process does: {error}")
    if len({peer["digest"] for peer in everybody}) == 1:
        return
    details = processes().all_gather_objects({"arguments": dict(arguments), "parameters": parameters})
    raise ValueError(
        f"the processes disagree: {'; '.join(_differences(details))}. Call it with the same arguments and the same weights on every process"
    )


def _differences(everybody: list[dict[str, Any]]) -> list[str]:
    """What differs: every argument, and the first parameter."""
    found = []
    for name in dict.fromkeys(key for peer in everybody for key in peer["arguments"]):
        values = [peer["arguments"].get(name) for peer in everybody]
        if any(value != values[0] for value in values):
            found.append(f"{name} is {_by_rank(values)}")
    names = dict.fromkeys(key for peer in everybody for key in peer["parameters"])
    others = [n for n in names if any(p["parameters"].get(n) != everybody[0]["parameters"].get(n) for p in everybody)]
    if others:
        first = [peer["parameters"].get(others[0]) for peer in everybody]
        forms = [
            "missing" if value is None else f"{value[0].removeprefix('torch.')} {tuple(value[1])}" for value in first
        ]
        same = len(set(forms)) == 1
        what = f"has other values on {_odd_ranks(first)} than on rank 0" if same else f"is {_by_rank(forms)}"
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        found.append(f"parameter {others[0]}{more} {what}")
    return found


def _by_rank(values: list[Any]) -> str:
    """Values with the ranks that have them, or the ranks alone where values are long."""
    if any(len(str(value)) > 60 for value in values):
        return f"different on {_odd_ranks(values)} from rank 0"
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in groups.items())


def _odd_ranks(values: list[Any]) -> str:
    return _ranks([rank for rank, value in enumerate(values) if value != values[0]])


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {some(ranks, 8)}"
