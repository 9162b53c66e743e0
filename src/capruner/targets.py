"""What is asked of :func:`capruner.prune`: which parameters, how many of their weights at each sparsity, and what earlier pruning has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capruner.allocation import refuse_below
from capruner.methods import Target
from capruner.patterns import Pattern
from capruner.selection import Selection, select
from capruner.wrappers import by_first_name

Sparsity = float | Mapping[float, Sequence[str]]


def selected(
    model: nn.Module,
    params: str | Sequence[str],
    sparsity: Sparsity | Sequence[float],
    exclude: str | Sequence[str],
    trainable: bool,
) -> tuple[Selection, dict[str, float] | None]:
    """The parameters to prune; with a dict of sparsities the target of each."""
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


def rungs_of(
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, float] | None,
    sparsity: Sparsity | Sequence[float],
    global_sparsity: bool,
    pattern: Pattern,
) -> list[tuple[float, list[Target]]]:
    """Per sparsity, ascending, its targets."""
    if own is not None:
        total = sum(p.numel() for p in parameters.values())
        overall = sum(own[name] * p.numel() for name, p in parameters.items()) / total
        rungs = [(overall, [Target((name,), p.numel(), own[name]) for name, p in parameters.items()])]
    else:
        assert not isinstance(sparsity, Mapping)
        listed = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
        if not listed:
            raise ValueError("the list of sparsities is empty; give at least one, 0.5 say")
        groups = [tuple(parameters)] if global_sparsity else [(name,) for name in parameters]
        ascending = sorted({_checked_sparsity(s) for s in listed})
        numel = [sum(parameters[name].numel() for name in group) for group in groups]
        rungs = [(s, [Target(group, size, s) for group, size in zip(groups, numel)]) for s in ascending]
    if pattern.sparsity is not None:
        wrong = sorted(
            {t.sparsity for _, targets in rungs for t in targets if abs(t.sparsity - pattern.sparsity) > 1e-6}
        )
        if wrong:
            raise ValueError(
                f"mask_type {pattern} means that {pattern.stay} of {pattern.group} weights stay, a sparsity of {pattern.sparsity:g}; got {wrong}"
            )
    return rungs


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
    """The weights of each parameter that earlier pruning left, True = stays."""
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


def check_not_below(targets: Sequence[Target], kept: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Before any data is drawn: no target below what is pruned already."""
    if pattern.n_m is not None:
        return
    for target in targets:
        gone = sum(int((~kept[name]).sum()) for name in target.names)
        refuse_below(gone, target.steps(pattern.group) * pattern.group, target.names)


def pruned_share(names: Sequence[str], kept: Mapping[str, Tensor]) -> float:
    return sum(int((~kept[n]).sum()) for n in names) / sum(kept[n].numel() for n in names)
