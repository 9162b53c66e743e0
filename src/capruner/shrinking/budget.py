"""How many units of each group are removed: a global ranking by loss per multiply-add, down to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from capruner.shrinking.units import Group, channels


@dataclass(frozen=True)
class Costs:
    """What the layers of a dense model cost; any unit, such as multiply-adds or seconds.

    Attributes:
        total: of the whole model.
        layers: ``{layer: cost}``, proportional to its input and its output channels.
        heads: ``{attention: cost}`` of products of activations, proportional to its heads.
    """

    total: float
    layers: Mapping[str, float]
    heads: Mapping[str, float]


class Ledger:
    """The cost of a model while units are removed from it."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], costs: Costs) -> None:
        self.costs = costs
        self.groups = groups
        self.left = {group.name: group.units for group in groups}
        # The groups that a layer's outputs and inputs belong to, with the share of its channels that a unit is.
        self._sides: dict[str, list[list[tuple[str, float]]]] = {}
        for group in groups:
            for cut in group.cuts:
                sides = self._sides.setdefault(cut.layer, [[], []])
                share = cut.positions.shape[1] / channels(model.get_submodule(cut.layer), cut.side)
                sides[cut.side == "in"].append((group.name, share))
        self._units = {group.name: group.units for group in groups}
        self._attention = {group.attention: group.name for group in groups if group.attention}
        self._changed = {
            group.name: {name for cut in group.cuts for side in self._sides[cut.layer] for name, _ in side}
            for group in groups
        }

    def _layer(self, name: str) -> float:
        cost = self.costs.layers.get(name, 0.0)
        for side in self._sides[name]:
            cost *= 1 - sum(share * (self._units[group] - self.left[group]) for group, share in side)
        return cost

    def _own(self, group: Group) -> float:
        """The cost of the layers that the units of a group are in."""
        heads = self.costs.heads.get(group.attention, 0.0) * self.left[group.name] / group.units
        return sum(self._layer(name) for name in {cut.layer for cut in group.cuts}) + heads

    def saving(self, group: Group, count: int) -> float:
        """What the next ``count`` units of a group save."""
        before = self._own(group)
        self.left[group.name] -= count
        after = self._own(group)
        self.left[group.name] += count
        return before - after

    def neighbours(self, group: Group) -> set[str]:
        """The groups whose savings change with those of a group; itself among them."""
        return self._changed[group.name]

    def remove(self, group: Group, count: int) -> None:
        """Remove ``count`` units."""
        self.left[group.name] -= count

    @property
    def total(self) -> float:
        """The cost of the model as it is now."""
        dense = sum(self.costs.layers.get(name, 0.0) for name in self._sides)
        now = sum(self._layer(name) for name in self._sides)
        attention = sum(
            self.costs.heads.get(name, 0.0) * (1 - self.left[group] / self._units[group])
            for name, group in self._attention.items()
        )
        return self.costs.total - (dense - now) - attention


def allocate_units(
    model: nn.Module,
    groups: Sequence[Group],
    losses: Mapping[str, Tensor],
    costs: Costs,
    target: float,
    multiple_of: int = 1,
) -> dict[str, int]:
    """Units to remove from each group, so that at most ``target`` of the cost remains with the least predicted loss.

    Units compete by loss per cost saved at that point; along a group the score is made monotone by a running maximum, as in :mod:`capruner.core.allocation`.
    At least one unit of each group remains. Channels are removed ``multiple_of`` at a time where their number is a multiple of it, and larger.

    Raises:
        ValueError: the target is out of reach.
    """
    ledger = Ledger(model, groups, costs)
    by_name = {group.name: group for group in groups}
    running = {name: loss.cummax(0).values.tolist() for name, loss in losses.items()}
    scores: dict[str, float] = {}

    def at_a_time(group: Group) -> int:
        regular = group.kind == "channels" and group.units > multiple_of and group.units % multiple_of == 0
        return multiple_of if regular else 1

    def score(name: str) -> None:
        group = by_name[name]
        step, count = group.units - ledger.left[name], at_a_time(group)
        saving = ledger.saving(group, count) if ledger.left[name] > count else 0.0
        if saving > 0:
            scores[name] = sum(running[name][step : step + count]) / saving
        else:
            scores.pop(name, None)

    for name in by_name:
        score(name)
    while (total := ledger.total) > target * costs.total * (1 + 1e-12):
        if not scores:
            raise ValueError(
                f"{target:.1%} of the cost is out of reach: {total / costs.total:.1%} remains of the smallest network, "
                f"with {len(groups)} groups of units and channels in multiples of {multiple_of}"
            )
        best = by_name[min(scores, key=scores.__getitem__)]
        ledger.remove(best, at_a_time(best))
        for name in ledger.neighbours(best):
            score(name)
    assert math.isfinite(total)
    return {name: by_name[name].units - left for name, left in ledger.left.items()}
