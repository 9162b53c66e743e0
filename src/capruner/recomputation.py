"""Recomputations: reach each sparsity in steps, each with a fresh calibration at the weights of the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from capruner.methods import SparsityLevel
from capruner.models.modes import weights_restored
from capruner.result import Level
from capruner.rows import zero_share

Interpolation = Literal["linear", "cubic", "inverse_cubic", "geometric"]

# The first three round as SparseML's own interpolation does, so that both prune the same number of weights.
INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, t: start + (end - start) * t,
    "cubic": lambda start, end, t: start + (end - start) * (1 - (1 - t) ** 3),
    "inverse_cubic": lambda start, end, t: start + (end - start) * (1 - (1 - t) ** (1 / 3)),
    # Each step prunes the same share of what remains.
    "geometric": lambda start, end, t: 1 - (1 - start) ** (1 - t) * (1 - end) ** t,
}


@torch.no_grad()
def recompute_levels(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
    levels: Sequence[SparsityLevel],
    steps: int,
    interpolation: Interpolation,
    calibrate: Callable[[Mapping[str, Tensor], Sequence[SparsityLevel]], list[Level]],
) -> list[Level]:
    """Reach each level from the one before in ``steps`` calibrations, whose predicted losses add up. The model's weights are restored.

    Args:
        masks: what is pruned already, True = keep.
        calibrate: solves for levels at the model's present weights, given the masks reached.
    """
    sparsity_at = INTERPOLATIONS[interpolation]
    reached = []
    with weights_restored(model):
        for level in levels:
            starts = [zero_share(masks[name] for name in target.names) for target in level.targets]
            losses = dict.fromkeys(parameters, 0.0)
            for step in range(1, steps + 1):
                now = tuple(
                    # The last step has the target itself: interpolation can miss it by a rounding error, and the count by one weight.
                    replace(t, sparsity=sparsity_at(start, t.sparsity, step / steps)) if step < steps else t
                    for t, start in zip(level.targets, starts)
                )
                (solved,) = calibrate(masks, [SparsityLevel(level.sparsity, now)])
                masks = solved.masks
                losses = {name: losses[name] + loss for name, loss in solved.losses.items()}
                for name, p in parameters.items():
                    p.copy_(solved.weights[name])
            reached.append(replace(solved, losses=losses))
    return reached
