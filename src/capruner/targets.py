"""Parameters, sparsities and masks of a call of :func:`capruner.prune`: what to prune, and how far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capruner.core.allocation import refuse_below
from capruner.core.patterns import Pattern
from capruner.methods import SparsityLevel, Target
from capruner.models.selection import Selection, select
from capruner.models.wrappers import by_first_name

Sparsity = float | Mapping[float, Sequence[str]]


def selected(
    model: nn.Module,
    params: str | Sequence[str],
    sparsity: Sparsity | Sequence[float],
    exclude: str | Sequence[str],
    trainable: bool,
) -> tuple[Selection, dict[str, float] | None]:
    """The parameters to prune; with a dict of sparsities also the target of each."""
    if not isinstance(sparsity, Mapping):
        return select(model, params, exclude, trainable=trainable), None
    if not sparsity:
        raise ValueError("the dict of sparsities is empty; give {sparsity: [params]}")
    parameters: dict[str, nn.Parameter] = {}
    own: dict[str, float] = {}
    passed: dict[str, str] = {}
    for value, names in sparsity.items():
        value = _checked_sparsity(value)
        group = select(model, names, exclude, trainable=trainable)
        passed |= group.passed
        for name, parameter in group.parameters.items():
            parameters[name] = parameter
            own.setdefault(name, value)
    return Selection(parameters, passed), own


def sparsity_levels(
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, float] | None,
    sparsity: Sparsity | Sequence[float],
    global_sparsity: bool,
    pattern: Pattern,
) -> list[SparsityLevel]:
    """The levels of a call, ascending in sparsity."""
    if own is not None:
        total = sum(p.numel() for p in parameters.values())
        overall = sum(own[name] * p.numel() for name, p in parameters.items()) / total
        each = tuple(Target((name,), p.numel(), own[name]) for name, p in parameters.items())
        levels = [SparsityLevel(overall, each)]
    else:
        assert not isinstance(sparsity, Mapping)
        listed = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
        if not listed:
            raise ValueError("the list of sparsities is empty; pass at least one, for example 0.5")
        groups = [tuple(parameters)] if global_sparsity else [(name,) for name in parameters]
        ascending = sorted({_checked_sparsity(s) for s in listed})
        numel = [sum(parameters[name].numel() for name in group) for group in groups]
        levels = [
            SparsityLevel(s, tuple(Target(group, size, s) for group, size in zip(groups, numel))) for s in ascending
        ]
    if pattern.sparsity is not None:
        wrong = sorted({t.sparsity for x in levels for t in x.targets if abs(t.sparsity - pattern.sparsity) > 1e-6})
        if wrong:
            raise ValueError(
                f"mask_type {pattern} keeps {pattern.stay} of {pattern.group} weights, a sparsity of {pattern.sparsity:g}; got {wrong}"
            )
    return levels


def _checked_sparsity(value: Any) -> float:
    value = float(value)
    if not 0 <= value < 1:
        raise ValueError(
            f"sparsity must lie in [0, 1), got {value:g}{': write 0.9 for 90 %' if 1 < value <= 100 else ''}"
        )
    return value


def initial_masks(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | Literal["zeros"] | None
) -> dict[str, Tensor]:
    """Masks of earlier pruning for each parameter, True = keep."""
    if masks == "zeros":
        return {name: p.detach() != 0 for name, p in parameters.items()}
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    if masks is None:
        return kept
    if isinstance(masks, str):
        raise ValueError(f"masks must be a dict of bool tensors, 'zeros' or None, got {masks!r}")
    for name, mask in by_first_name(model, masks, "masks").items():
        if name not in kept:
            raise ValueError(
                f"masks holds {name}, which is not among the selected parameters; select it too, or drop its mask"
            )
        if mask.shape != kept[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(kept[name].shape)}"
            )
        kept[name] = mask.to(kept[name].device) != 0
    return kept


def check_not_below(targets: Sequence[Target], masks: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Raise ``ValueError`` for a target below what is pruned already."""
    if pattern.n_m is not None:
        return
    for target in targets:
        pruned = sum(int((~masks[name]).sum()) for name in target.names)
        refuse_below(pruned, target.steps(pattern.group) * pattern.group, target.names)
