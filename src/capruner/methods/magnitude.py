"""Magnitude pruning: prune the smallest weights, keep the values of the others; a baseline for CAP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capruner.core.elimination import Elimination
from capruner.core.patterns import rank_once
from capruner.methods.base import RankedMethod


class Magnitude(RankedMethod):
    """Needs no data."""

    name = "magnitude"
    uses_gradients = False
    _weights: Mapping[str, Tensor]

    def add(self, slab: Mapping[str, Tensor]) -> None:
        raise TypeError("magnitude pruning takes no gradients")

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        for name in self.layouts:
            saliency = weights[name].abs()
            if self._unit > 1:
                groups = saliency.unflatten(1, (-1, self._unit)).square().sum(dim=2)
                saliency = groups.repeat_interleave(self._unit, dim=1)
            pruned, padding = (of(name, saliency.device) for of in (self._pruned, self._padding))
            self._rank(name, rank_once(saliency, self.settings.pattern, pruned, padding))

    def _compensate(self, name: str, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        gone = torch.stack([~Elimination(order, order).keep_mask(k) for k in counts])
        weights = self._weights[name].expand(len(counts), -1, -1).masked_fill(gone, 0)
        return weights, torch.zeros(counts.shape, device=order.device)
