"""Recipes of the original CAP repository, and of other SparseML versions, rewritten as recipes that load here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from capruner.core.patterns import parse_mask_type
from capruner.recipes.document import Modifier
from capruner.recipes.one_shot import KINDS, SCHEDULE, one_shot, read_modifiers
from capruner.recipes.training import action
from capruner.recipes.values import CONVERT

Notes = Callable[[str], object]
_OTHER_SCOPE = {
    "GlobalMagnitudePruningModifier": "MagnitudePruningModifier",
    "MagnitudePruningModifier": "GlobalMagnitudePruningModifier",
}
_PLACES = ("fisher_inv_device", "blocks_in_parallel", "traces_backup_dir")
"""Parameters that say where or how work is done, without influence on the result."""
_IDLE = {"recomputation_inter_func": "linear"}
"""Values that are what a modifier without the parameter does."""


def convert(path: str | Path) -> tuple[str, list[str], list[str]]:
    """Convert a recipe: its new text, what was changed, and what is left to do by hand. Raise ``UserError`` for anything but a recipe."""
    changes: list[str] = []
    problems: list[str] = []
    converted = []
    for number, modifier in enumerate(read_modifiers(path), 1):

        def note(text: str, where: str = f"{number}. {modifier.name}") -> None:
            changes.append(f"{where}: {text}")

        converted.append(_converted(modifier, note))
    alone = len(converted) == 1
    for number, modifier in enumerate(converted, 1):
        try:
            one_shot(modifier) if alone and modifier.name in KINDS else action(modifier)
        except ValueError as error:
            problems.append(f"{number}. {str(error).removesuffix(CONVERT)}")
    return _text(path, converted), changes, problems


def _converted(modifier: Modifier, note: Notes) -> Modifier:
    name, values = modifier.name, dict(modifier.values)
    if "params" in values:
        values["params"] = _params(values["params"], note)
    if isinstance(values.get("final_sparsity"), Mapping):
        values["final_sparsity"] = {s: _params(entries, note) for s, entries in values["final_sparsity"].items()}
    if name == "LearningRateFunctionModifier":
        return Modifier(name, _rate(values, note))
    if name not in KINDS:
        if "block_implementation" in values:  # of MFACPruningModifier, which SparseML carries out
            note(f"block_implementation: {values.pop('block_implementation')} left out; it changes nothing")
        return Modifier(name, values)
    if name in _OTHER_SCOPE and "global_sparsity" in values and values["global_sparsity"] != KINDS[name].globally:
        name = _OTHER_SCOPE[name]
        note(f"global_sparsity: {values['global_sparsity']} is what {name} does")
    _mask_type(name, values, note)
    for key in list(values):
        if key in KINDS[name].parameters:
            continue
        if key in _PLACES or name in _OTHER_SCOPE or _IDLE.get(key, ...) == values[key]:
            note(f"{key}: {values.pop(key)} left out; it changes nothing")
    return Modifier(name, values)


def _params(entries: Any, note: Notes) -> Any:
    if isinstance(entries, str):
        return _entry(entries, note)
    return [_entry(entry, note) for entry in entries] if isinstance(entries, list) else entries


def _entry(entry: Any, note: Notes) -> Any:
    if not isinstance(entry, str):
        return entry
    if "cls_attn" in entry:  # whose q, k and v are layers of their own
        return entry
    found = re.sub(r"attn(\\?\.)\[qkv\](\\?\.)", r"attn\1qkv\2", entry)
    if found != entry:
        note(f"{entry} is {found}")
    return found


def _rate(values: dict[str, Any], note: Notes) -> dict[str, Any]:
    """The learning rate of the original repository: any function could have cycles."""
    cycle, function = values.get("cycle_epochs"), values.get("lr_func")
    length = float(values.get("end_epoch", 0)) - max(float(values.get("start_epoch", 0)), 0.0)
    for key, idle in (("cycle_mul", 1), ("warmup", 0), ("decay_rate", 1)):
        if key in values and values[key] in (None, idle):
            note(f"{key}: {values.pop(key)} left out; it changes nothing")
    if cycle is None or function == "cyclic_linear":
        return values
    if function == "linear" and float(cycle) < length:
        note("lr_func: linear with cycle_epochs is cyclic_linear")
        return values | {"lr_func": "cyclic_linear"}
    if function in ("linear", "cosine") and float(cycle) >= length:
        note(f"cycle_epochs: {values.pop('cycle_epochs')} left out: one cycle")
    return values


def _mask_type(name: str, values: dict[str, Any], note: Notes) -> None:
    """The original's N:M counts zeros; here N of M remain."""
    said, final = values.get("mask_type"), values.get("final_sparsity")
    try:
        pattern = parse_mask_type(said if said is not None else "unstructured", values.get("n"), values.get("m"))
    except ValueError:
        return
    if pattern.n_m is None:
        return
    if ("n" in values or "m" in values) and "n" not in KINDS[name].parameters:
        note(f"mask_type: {said} with n and m is mask_type: {pattern}")
        values["mask_type"] = str(pattern)
        values.pop("n", None)
        values.pop("m", None)
    if not isinstance(final, int | float) or pattern.sparsity == final:
        return
    other = f"{pattern.group - pattern.stay}:{pattern.group}"
    if abs(parse_mask_type(other).sparsity - final) < 1e-9:  # type: ignore[operator]
        note(f"mask_type {pattern} is {other}: here the first number counts the weights that remain")
        values["mask_type"] = other
        values.pop("n", None)
        values.pop("m", None)


def _text(path: str | Path, modifiers: list[Modifier]) -> str:
    lines = [f"# {Path(path).name}, converted by capruner recipes convert.", "modifiers:"]
    for modifier in modifiers:
        order = [key for key in ("params", *SCHEDULE) if key in modifier.values]
        values = {key: modifier.values[key] for key in dict.fromkeys([*order, *modifier.values])}
        lines.append(f"  - !{modifier.name}")
        dumped = yaml.safe_dump(values, sort_keys=False, width=10_000, default_flow_style=False) if values else ""
        lines += [f"      {line}" for line in dumped.splitlines()]
    return "\n".join([*lines, ""])
