"""Time instead of multiply-adds: measured costs of layers, and a search for the model that is fast enough when it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import nn

from capruner.batches import call_model
from capruner.models.modes import eval_mode
from capruner.shrinking.budget import Costs
from capruner.shrinking.probing import hooked
from capruner.shrinking.units import Group

SECONDS = 1.0
"""How long models are timed, in turns."""
CALLS = 5
"""The least number of timed calls."""
TRIES = 8
"""Models that are cut and timed on the way to a target."""
CLOSE = 0.03
"""A model that is at most this much faster than asked for ends the search."""

Cut = TypeVar("Cut")


@torch.no_grad()
def fastest(models: Sequence[nn.Module], inputs: Any) -> list[float]:
    """Seconds of one call of each model in eval mode: the fastest of calls in turns, so that whatever else the machine does slows all of them alike."""
    best = [float("inf")] * len(models)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
            call_model(model, inputs)
        calls, end = 0, time.perf_counter() + SECONDS
        while calls < CALLS or time.perf_counter() < end:
            calls += 1
            for index, model in enumerate(models):
                start = _now()
                call_model(model, inputs)
                best[index] = min(best[index], _now() - start)
    return best


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of_layers(model: nn.Module, inputs: Any, groups: Iterable[Group]) -> Costs:
    """Seconds that the layers of units take, each the fastest of several calls; of an attention what its layers do not take."""
    groups = list(groups)
    layers = {cut.layer for group in groups for cut in group.cuts}
    attentions = {group.attention: group for group in groups if group.attention}
    modules = {model.get_submodule(name): name for name in {*layers, *attentions}}
    began: dict[str, float] = {}
    best: dict[str, float] = {}

    def before(module: nn.Module, args: Any) -> None:
        began[modules[module]] = _now()

    def after(module: nn.Module, args: Any, out: Any) -> None:
        name = modules[module]
        best[name] = min(best.get(name, float("inf")), _now() - began[name])

    with hooked(dict.fromkeys(modules, after), dict.fromkeys(modules, before)):
        total = fastest([model], inputs)[0]
    heads = {
        name: max(0.0, best[name] - sum(best[cut.layer] for cut in group.cuts)) for name, group in attentions.items()
    }
    return Costs(total, {name: best[name] for name in layers}, heads)


def fast_enough(
    cut: Callable[[float], tuple[nn.Module, Cut]], dense: nn.Module, inputs: Any, latency: float
) -> tuple[nn.Module, Cut, tuple[float, float]]:
    """The slowest model found whose measured time is at most ``latency`` of the dense one's.

    What is left of a layer takes longer than its share of the dense time, so the predicted time is lowered until the measured one is right.

    Args:
        cut: makes a model, and what belongs to it, of a predicted share of the dense time. Raises ``ValueError`` where that is out of reach.

    Returns:
        The model, what belongs to it, and the seconds of the dense model and of this one.

    Raises:
        ValueError: no such model was found.
    """
    best: tuple[nn.Module, Cut, tuple[float, float]] | None = None
    predicted, least = latency, 1.0
    for _ in range(TRIES):
        try:
            small, others = cut(predicted)
        except ValueError as error:
            if best is not None:
                break
            raise ValueError(
                f"latency={latency:g} is out of reach: {error}"
                + (f"; the fastest model takes {least:.0%}" if least < 1 else "")
            ) from error
        seconds = fastest([dense, small], inputs)
        share = seconds[1] / seconds[0]
        least = min(least, share)
        if share <= latency and (best is None or share > best[2][1] / best[2][0]):
            best = (small, others, (seconds[0], seconds[1]))
        if latency - CLOSE <= share <= latency:
            break
        predicted = min(predicted * (latency - CLOSE / 2) / share, 0.999)  # into the middle of what is close enough
    if best is None:
        raise ValueError(
            f"latency={latency:g} was not reached: the fastest model of {TRIES} takes {least:.0%} of the dense time"
        )
    return best
