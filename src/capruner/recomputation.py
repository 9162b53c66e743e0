"""Recomputations: each sparsity is reached in steps, with a fresh calibration at the weights of the step before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from capruner.methods import Method, Target
from capruner.modes import weights_restored
from capruner.result import Level
from capruner.targets import pruned_share

if TYPE_CHECKING:
    from capruner.calibration import Calibration

Interpolation = Literal["linear", "cubic", "geometric"]

INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, t: start + (end - start) * t,
    "cubic": lambda start, end, t: end + (start - end) * (1 - t) ** 3,
    # Each step prunes the same share of what remains.
    "geometric": lambda start, end, t: 1 - (1 - start) ** (1 - t) * (1 - end) ** t,
}


@torch.no_grad()
def recomputed_levels(
    calibration: Calibration,
    method: type[Method],
    kept: Mapping[str, Tensor],
    rungs: Sequence[tuple[float, Sequence[Target]]],
    steps: int,
    interpolation: Interpolation,
) -> list[Level]:
    """The levels of ``rungs``, each reached from the one before in ``steps`` calibrations, whose predicted losses add up. The model's weights are restored."""
    climb = INTERPOLATIONS[interpolation]
    levels = []
    with weights_restored(calibration.model):
        for s, targets in rungs:
            starts = [pruned_share(target.names, kept) for target in targets]
            losses = dict.fromkeys(calibration.parameters, 0.0)
            for step in range(1, steps + 1):
                now = [
                    # The last step takes the target itself: interpolation can miss it by a rounding error, and the count by one weight.
                    replace(g, sparsity=climb(start, g.sparsity, step / steps)) if step < steps else g
                    for g, start in zip(targets, starts)
                ]
                level = calibration.levels(method, kept, [(s, now)])[0]
                kept = dict(level.masks)
                losses = {name: losses[name] + loss for name, loss in level.losses.items()}
                for name, p in calibration.parameters.items():
                    p.copy_(level.weights[name])
            levels.append(replace(level, losses=losses))
    return levels
