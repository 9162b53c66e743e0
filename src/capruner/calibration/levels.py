"""Levels of one or several sparsities from one calibration, or from one per group of layers within a memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from capruner.calibration.driver import Calibration
from capruner.calibration.finite import NO_GRADIENT
from capruner.calibration.memory_plan import split_into_groups
from capruner.methods import SparsityLevel
from capruner.methods.base import RankedMethod
from capruner.result import Level, pack_levels, unpack_levels

Masks = Mapping[str, Tensor]
Counts = list[dict[str, Tensor]]


def calibrate_levels(
    calibration: Calibration, masks: Masks, levels: Sequence[SparsityLevel], budget: int | None
) -> list[Level]:
    """Calibrate at the model's present weights and solve for ``levels``; the same on every process.

    Args:
        masks: what is pruned already, True = keep.
        budget: see :func:`capruner.calibration.memory_plan.split_into_groups`.
    """
    groups = split_into_groups(calibration, budget)
    counts = None
    if any(not any(set(t.names) <= g.parameters.keys() for g in groups) for level in levels for t in level.targets):
        counts = _allocate(calibration, groups, masks, levels)
    solved = [_solve(group, masks, levels, counts) for group in groups]
    if set(calibration.notes.layers_without_gradient) >= calibration.parameters.keys():
        raise ValueError(NO_GRADIENT)
    return [Level.merge(parts) for parts in zip(*solved)]


def _solve(group: Calibration, masks: Masks, levels: Sequence[SparsityLevel], counts: Counts | None) -> list[Level]:
    stream = group.stream()
    return group.checkpoint.stage(
        lambda: group.run(masks, stream).solve(levels, counts),
        stream,
        pack_levels,
        lambda tensors, values: [x.to(group.parameters) for x in unpack_levels(tensors.__getitem__, values)],
    )


def _allocate(
    calibration: Calibration, groups: Sequence[Calibration], masks: Masks, levels: Sequence[SparsityLevel]
) -> Counts:
    """Steps of each block, by level, where a target covers layers of several groups: one more calibration of each group."""
    scores: dict[str, Tensor] = {}
    for group in groups:
        scores |= _scores(group, masks)
    allocator = calibration.new_method(masks)
    assert isinstance(allocator, RankedMethod)
    return [allocator.count(scores, level.targets) for level in levels]


def _scores(group: Calibration, masks: Masks) -> dict[str, Tensor]:
    """The scores that the steps of this group's blocks compete with. Its inverse Fisher blocks are freed before the next group needs the memory."""
    stream = group.stream()

    def compute() -> dict[str, Tensor]:
        pruner = group.run(masks, stream).pruner
        assert isinstance(pruner, RankedMethod)
        return pruner.scores()

    where = group.settings.fisher_inv_device or stream.device
    return group.checkpoint.stage(
        compute,
        stream,
        lambda scores: (scores, {}),
        lambda scores, _: {name: tensor.to(where) for name, tensor in scores.items()},
    )
