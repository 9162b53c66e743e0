"""Check a recipe against an architecture: every pattern matches something, shapes can hold the mask type, values are valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.config import problems as invalid
from capruner.core.patterns import Pattern, parse_mask_type
from capruner.models.mask_types import unsupported
from capruner.models.selection import SelectionError, select_parameters
from capruner.models.weights import LinearWeight, linear_weights
from capruner.recipes.document import Modifier
from capruner.recipes.one_shot import KINDS, OURS, one_shot, read_modifiers, refuse_others
from capruner.recipes.text import checked_text, modifier_names
from capruner.recipes.training import ACTIONS, action
from capruner.recipes.values import FROM_WEIGHTS
from capruner.text import some

_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "update_frequency": (lambda v: 0 < v < math.inf or v == -1, "more than 0, or -1 for an update at every step"),
    "start_epoch": (math.isfinite, "a finite number"),
    "end_epoch": (math.isfinite, "a finite number"),
}
_MOST_UPDATES = 10_000
_SCHEDULED = ("init_sparsity", "start_epoch", "end_epoch", "update_frequency")


def lint(path: Path, model: nn.Module) -> tuple[dict[str, nn.Parameter], list[str]]:
    """What a recipe prunes in ``model``, and its problems. The engine that will carry it out reads it.

    Raises:
        UserError: the recipe cannot be read, or it prunes nothing.
    """
    others, modifiers = _read(path)
    if not modifiers:
        raise UserError(f"{path} has no pruning modifier, so nothing to check")
    found: dict[str, nn.Parameter] = {}
    problems = [text for m in others for text in _of_another(m)]
    for number, modifier in enumerate(modifiers, 1):
        where = _name(modifier) + (f" {number}" if len(modifiers) > 1 else "")
        chosen: dict[str, nn.Parameter] = {}
        for params in _selections(modifier):
            try:
                chosen |= select_parameters(model, params)
            except SelectionError as error:
                problems.append(f"{where}: {error}")
        problems += [f"{where}: {text}" for text in _values(modifier, chosen, linear_weights(model))]
        found |= chosen
    ordered = {name: p for name, p in model.named_parameters() if name in found}
    return ordered, list(dict.fromkeys(problems))


def _read(path: Path) -> tuple[list[Any], list[Any]]:
    """Modifiers of a recipe: those that do not prune, and those that do."""
    if all(name in KINDS or name in ACTIONS for name in modifier_names(checked_text(path))):
        return _read_here(path)
    try:
        # isort: split
        from sparseml.pytorch.sparsification.pruning import BasePruningModifier

        from capruner.sparseml.recipe import load_manager
    except ImportError:
        return _read_here(path)
    manager = load_manager(str(path))
    everything = list(manager.iter_modifiers())
    pruning = [m for m in everything if isinstance(m, BasePruningModifier)]
    return [m for m in everything if m not in pruning], pruning


def _read_here(path: Path) -> tuple[list[Any], list[Any]]:
    found = read_modifiers(path)
    others = [m for m in found if not m.name.endswith("PruningModifier")]
    pruning = [m for m in found if m.name.endswith("PruningModifier")]
    refuse_others(path, [m for m in pruning if m.name not in ACTIONS])
    try:
        return others, [_as_attributes(m) for m in pruning]
    except ValueError as error:
        raise UserError(f"{path} does not load: {error}") from error


def _as_attributes(modifier: Modifier) -> SimpleNamespace:
    """A pruning modifier as SparseML would make it."""
    if modifier.name in ACTIONS:
        return SimpleNamespace(name=modifier.name, **vars(action(modifier)))
    read = one_shot(modifier)
    schedule = {"init_sparsity": FROM_WEIGHTS} | {k: modifier.values[k] for k in _SCHEDULED if k in modifier.values}
    numbers = {k: v if v == FROM_WEIGHTS else float(v) for k, v in schedule.items()}
    given = {
        "params": read.params,
        "final_sparsity": read.final_sparsity,
        "grad_sampler_kwargs": read.grad_sampler_kwargs,
    }
    return SimpleNamespace(name=read.modifier, **given, **numbers, **read.knobs)


def _of_another(modifier: Any) -> list[str]:
    """Problems of a modifier that does not prune."""
    if not isinstance(modifier, Modifier):
        return [f"{_name(modifier)}: {text}" for text in _numbers(modifier)]
    try:
        action(modifier)
    except ValueError as error:
        return [str(error)]
    return []


def _name(modifier: Any) -> str:
    return str(modifier.name) if isinstance(modifier, SimpleNamespace) else type(modifier).__name__


def _selections(modifier: Any) -> list[Any]:
    final = getattr(modifier, "final_sparsity", None)  # a constant mask, ACDC and others have none
    return list(final.values()) if isinstance(final, Mapping) else [modifier.params]


def _numbers(modifier: Any) -> list[str]:
    """What any modifier may have: numbers that are out of range."""
    problems = []
    for name, (can_be, rule) in _VALUES.items():
        value = getattr(modifier, name, None)
        if isinstance(value, int | float) and not can_be(value):
            problems.append(f"{name} must be {rule}, got {value}")
    start, end, frequency = (getattr(modifier, key, -1) for key in ("start_epoch", "end_epoch", "update_frequency"))
    if 0 <= end < start:
        problems.append(f"end_epoch must not be before start_epoch, got {end:g} and {start:g}")
    if frequency > 0 and max(end, 0) - max(start, 0) > frequency * _MOST_UPDATES:
        problems.append(
            f"update_frequency {frequency:g} makes more than {_MOST_UPDATES:,} updates; raise it (an epoch is 1)"
        )
    return problems


def _knobs(modifier: Any) -> list[str]:
    """Problems of the knobs of a modifier that capruner carries out."""
    kind = KINDS[_name(modifier)]
    problems = invalid({"method": kind.method} | {name: getattr(modifier, name) for name in kind.knobs})
    size = getattr(modifier, "grad_sampler_kwargs", {}).get("batch_size", 1)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        problems.append(f"grad_sampler_kwargs: batch_size must be a whole number, at least 1, got {size!r}")
    return problems


def _values(modifier: Any, chosen: Mapping[str, Tensor], linear: Mapping[str, LinearWeight]) -> list[str]:
    problems = _numbers(modifier) + (_knobs(modifier) if _name(modifier) in OURS else [])
    final = getattr(modifier, "final_sparsity", None)
    sparsities = [getattr(modifier, "init_sparsity", None), *(final if isinstance(final, Mapping) else [final])]
    numbers = [float(s) for s in sparsities if s is not None and s != FROM_WEIGHTS]
    problems += [f"a sparsity must lie in [0, 1), got {s:g}" for s in numbers if not 0 <= s < 1]
    if _name(modifier) in OURS and getattr(modifier, "update_frequency", 1) == -1 and numbers[1:] != numbers[:-1]:
        problems.append(
            "update_frequency -1 makes an update, with a calibration, at every step; say after how many epochs"
        )
    try:
        pattern = parse_mask_type(getattr(modifier, "mask_type", "unstructured"))
    except ValueError as error:
        return [*problems, str(error)]
    return problems + _pattern(modifier, pattern, chosen, numbers, linear)


def _pattern(
    modifier: Any,
    pattern: Pattern,
    chosen: Mapping[str, Tensor],
    sparsities: list[float],
    linear: Mapping[str, LinearWeight],
) -> list[str]:
    problems = []
    if pattern.sparsity is not None:
        wrong = [s for s in sparsities if abs(s - pattern.sparsity) > 1e-6]
        problems += [f"mask_type {pattern} is a sparsity of {pattern.sparsity:g}, the recipe says {s:g}" for s in wrong]
    cannot = unsupported(pattern, chosen, linear)
    if cannot and not getattr(modifier, "skip_unsupported", False):
        layers = some([f"{name} {tuple(chosen[name].shape)}" for name in cannot], 4)
        problems.append(
            f"{len(cannot)} layers cannot hold mask_type {pattern}, their inputs are no multiple of {pattern.group}: {layers}; "
            "leave them out of params, or set skip_unsupported: True"
        )
    return problems
