"""Sparsity schedules for gradual pruning: ``{epoch: sparsity}``.

>>> linear(0.5, 0.9, first_epoch=0, last_epoch=4, every=2)
{0: 0.5, 2: 0.7, 4: 0.9}

``linear`` prunes the same number of weights at each update. ``cubic`` prunes most of them early, while many are redundant and much training is left.
``geometric`` prunes the same share of the remaining weights at each update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from capruner.checks import check_number
from capruner.recomputation import INTERPOLATIONS, Interpolation

Schedule = dict[float, float]
MOST_UPDATES = 10_000
SAME_EPOCH = 1e-6
"""Epochs that are closer than this are the same: a loop may count 2.9999999."""


def linear(start: float, end: float, first_epoch: float, last_epoch: float, every: float = 1) -> Schedule:
    """Equal steps of sparsity from ``start`` to ``end``; see :func:`schedule`."""
    return schedule("linear", start, end, first_epoch, last_epoch, every)


def cubic(start: float, end: float, first_epoch: float, last_epoch: float, every: float = 1) -> Schedule:
    """Large steps first: the gap to ``end`` shrinks with the cube of the remaining time; see :func:`schedule`."""
    return schedule("cubic", start, end, first_epoch, last_epoch, every)


def geometric(start: float, end: float, first_epoch: float, last_epoch: float, every: float = 1) -> Schedule:
    """The same share of the remaining weights at each step; see :func:`schedule`."""
    return schedule("geometric", start, end, first_epoch, last_epoch, every)


def schedule(
    interpolation: Interpolation, start: float, end: float, first_epoch: float, last_epoch: float, every: float = 1
) -> Schedule:
    """Return ``{epoch: sparsity}``: ``start`` at ``first_epoch``, then an update every ``every`` epochs, and exactly ``end`` at ``last_epoch``.

    Raises:
        ValueError: an argument is invalid, ``end`` is not above ``start``, or ``last_epoch`` is not after ``first_epoch``.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {sorted(INTERPOLATIONS)}, got {interpolation!r}")
    for name, value in (("first_epoch", first_epoch), ("last_epoch", last_epoch)):
        check_number(name, value, least=0)
    check_number("every", every)
    if last_epoch <= first_epoch:
        raise ValueError(f"last_epoch must be after first_epoch, got {first_epoch:g} to {last_epoch:g}")
    length = last_epoch - first_epoch
    steps = math.ceil(length / every - SAME_EPOCH)  # the last of them may be a shorter one
    epochs = [first_epoch + step * every for step in range(1, steps)]
    climb = INTERPOLATIONS[interpolation]
    check_schedule({first_epoch: start, last_epoch: end})
    between = {epoch: climb(start, end, (epoch - first_epoch) / length) for epoch in epochs}
    return {first_epoch: start} | between | {last_epoch: end}


def sparsity_at(
    epoch: float, start: float, end: float, first_epoch: float, last_epoch: float, interpolation: Interpolation
) -> float:
    """Sparsity at ``epoch`` of a recipe's modifier: from ``start`` at ``first_epoch`` to ``end`` at ``last_epoch``, and exactly ``end`` from then on."""
    first_epoch = max(first_epoch, 0.0)  # -1: from the start of training
    if epoch + SAME_EPOCH >= last_epoch:
        return end
    return INTERPOLATIONS[interpolation](start, end, max(epoch - first_epoch, 0.0) / (last_epoch - first_epoch))


def update_epochs(first_epoch: float, last_epoch: float, every: float) -> list[float]:
    """Epochs of a recipe modifier's updates: ``first_epoch + k * every``, and ``last_epoch``; ``ValueError`` for more than :data:`MOST_UPDATES`."""
    first_epoch = max(first_epoch, 0.0)
    updates = (last_epoch - first_epoch) / every if every > 0 else 1
    if not updates <= MOST_UPDATES:
        raise ValueError(
            f"update_frequency: {every:g} from epoch {first_epoch:g} to {last_epoch:g} is more than {MOST_UPDATES:,} updates; raise it (an epoch is 1)"
        )
    between = [first_epoch + k * every for k in range(1, math.ceil(updates - SAME_EPOCH))]
    return [first_epoch, *between, last_epoch]


def check_schedule(sparsity: Any) -> Schedule:
    """Return the updates, ``{epoch: sparsity}`` in ascending order of epochs; an entry of 0 is not one.

    Raises:
        ValueError: not such a dict, or sparsity does not rise from epoch to epoch.
    """
    if not isinstance(sparsity, Mapping) or not sparsity:
        raise ValueError(f"sparsity must be a dict {{epoch: sparsity}}, such as {{0: 0.5, 2: 0.75}}, got {sparsity!r}")
    sparsity = {plain_number(epoch): plain_number(value) for epoch, value in sparsity.items()}
    for epoch, value in sparsity.items():
        check_number("an epoch of the sparsity schedule", epoch, least=0)
        check_number(f"the sparsity at epoch {epoch:g}", value, least=0)
        if value >= 1:
            hint = ": write 0.9 for 90 %" if 1 < value <= 100 else ""
            raise ValueError(f"the sparsity at epoch {epoch:g} must be below 1, got {value:g}{hint}")
    ordered = dict(sorted(sparsity.items()))
    for (before, low), (after, high) in pairwise(ordered.items()):
        if high <= low:
            raise ValueError(
                f"sparsity must rise from epoch to epoch, got {low:g} at epoch {before:g} and {high:g} at epoch {after:g}"
            )
    updates = {epoch: float(value) for epoch, value in ordered.items() if value > 0}
    if not updates:
        raise ValueError("sparsity is 0 in the whole schedule; give at least one epoch with more")
    return updates


def plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, which every checkpoint format can hold; anything else as it is."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value
