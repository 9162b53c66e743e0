"""A recipe against an architecture: does every pattern match something, do the shapes hold the mask type, can the values be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from capruner.patterns import Pattern, parse_mask_type, unsupported
from capruner.selection import SelectionError, select_parameters

_FROM_WEIGHTS = "__FROM_PARAM__"  # SparseML's word for the sparsity that a model has already
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_grads": (lambda v: v >= 1, "at least 1"),
    "damp": (lambda v: v >= 0, "at least 0"),
    "fisher_block_size": (lambda v: v >= 1, "at least 1"),
    "num_recomputations": (lambda v: v >= 1, "at least 1"),
    "update_frequency": (lambda v: v > 0 or v == -1, "more than 0, or -1 for one update"),
}


def lint(path: Path, model: nn.Module) -> tuple[dict[str, nn.Parameter], list[str]]:
    """What a recipe prunes in ``model``, and what is wrong with it. SparseML itself reads the recipe, as it will when pruning.

    Raises:
        UserError: SparseML cannot read it at all, or it prunes nothing.
    """
    from research.utils.cli import UserError  # first: it sets what SparseML reads when it is imported
    from research.utils.recipe import load_manager

    # isort: split
    from sparseml.pytorch.sparsification.pruning import BasePruningModifier

    manager = load_manager(str(path))
    modifiers = [m for m in manager.iter_modifiers() if isinstance(m, BasePruningModifier)]
    if not modifiers:
        raise UserError(f"{path} has no pruning modifier, so nothing to check")
    found: dict[str, nn.Parameter] = {}
    problems: list[str] = []
    for number, modifier in enumerate(modifiers, 1):
        where = type(modifier).__name__ + (f" {number}" if len(modifiers) > 1 else "")
        chosen: dict[str, nn.Parameter] = {}
        for params in _selections(modifier):
            try:
                chosen |= select_parameters(model, params)
            except SelectionError as error:
                problems.append(f"{where}: {error}")
        problems += [f"{where}: {text}" for text in _values(modifier, chosen)]
        found |= chosen
    ordered = {name: p for name, p in model.named_parameters() if name in found}
    return ordered, list(dict.fromkeys(problems))


def _selections(modifier: Any) -> list[Any]:
    final = modifier.final_sparsity
    return list(final.values()) if isinstance(final, Mapping) else [modifier.params]


def _values(modifier: Any, chosen: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, (can_be, rule) in _VALUES.items():
        value = getattr(modifier, name, None)
        if isinstance(value, int | float) and not can_be(value):
            problems.append(f"{name} must be {rule}, got {value}")
    final = modifier.final_sparsity
    sparsities = [modifier.init_sparsity, *(final if isinstance(final, Mapping) else [final])]
    numbers = [float(s) for s in sparsities if s != _FROM_WEIGHTS]
    problems += [f"a sparsity must lie in [0, 1), got {s:g}" for s in numbers if not 0 <= s < 1]
    problems += [
        f"backslashes in {entry!r} are doubled when SparseML saves the recipe; write [0-9] for \\d and leave \\. a plain dot"
        for params in _selections(modifier)
        for entry in ([params] if isinstance(params, str) else params)
        if "\\" in entry
    ]
    try:
        pattern = parse_mask_type(getattr(modifier, "mask_type", "unstructured"))
    except ValueError as error:
        return [*problems, str(error)]
    return problems + _pattern(modifier, pattern, chosen, numbers)


def _pattern(modifier: Any, pattern: Pattern, chosen: Mapping[str, Tensor], sparsities: list[float]) -> list[str]:
    problems = []
    if pattern.sparsity is not None:
        wrong = [s for s in sparsities if abs(s - pattern.sparsity) > 1e-6]
        problems += [f"mask_type {pattern} is a sparsity of {pattern.sparsity:g}, the recipe says {s:g}" for s in wrong]
    size = getattr(modifier, "fisher_block_size", None)
    if isinstance(size, int) and size > 0 and size % pattern.group:
        problems.append(f"fisher_block_size must be a multiple of {pattern.group} for mask_type {pattern}, got {size}")
    cannot = unsupported(pattern, chosen)
    if cannot and not getattr(modifier, "skip_unsupported", False):
        some = ", ".join(f"{name} {tuple(chosen[name].shape)}" for name in cannot[:4]) + (
            ", ..." if len(cannot) > 4 else ""
        )
        problems.append(
            f"{len(cannot)} layers cannot hold mask_type {pattern}, their inputs are no multiple of {pattern.group}: {some}; "
            "leave them out of params, or set skip_unsupported: True"
        )
    return problems
