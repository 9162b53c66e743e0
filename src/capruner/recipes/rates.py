"""Learning rates as functions of the epoch: what ``LearningRateFunctionModifier`` sets.

The order of operations is SparseML's, so that a training has the same weights, bit for bit, whoever carries its recipe out.
"""

from __future__ import annotations

import math

from capruner.training.schedules import SAME_EPOCH


def linear(first: float, last: float, epoch: float, length: float) -> float:
    """A straight line from ``first`` to ``last``."""
    return first + (epoch / length) * (last - first)


def cosine(first: float, last: float, epoch: float, length: float) -> float:
    """Half a period of a cosine from ``first`` to ``last``."""
    low, high = sorted((first, last))
    phase = 0.0 if last < first else math.pi
    return math.cos(epoch / length * math.pi + phase) * (high - low) / 2 + (high - low) / 2 + low


FUNCTIONS = {"linear": linear, "cosine": cosine}
NAMES = (*FUNCTIONS, "cyclic_linear")


def cyclic_linear(
    first: float, last: float, epoch: float, length: float, cycle_epochs: float, steps_per_epoch: int
) -> float:
    """A straight line from ``first`` to ``last`` in each cycle; the last step of a cycle has ``last``. The rest after the last whole cycle is a shorter one."""
    steps, cycle, step = length * steps_per_epoch, cycle_epochs * steps_per_epoch, epoch * steps_per_epoch
    if step > int(steps / cycle) * cycle:
        cycle = steps % cycle
    within = step % cycle
    if cycle - within < SAME_EPOCH:  # rounding: this is the first step of the next cycle
        within = 0.0
    return first if cycle <= 1 else first - within / (cycle - 1) * (first - last)
