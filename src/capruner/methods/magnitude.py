"""Magnitude pruning: the smallest weights leave, the others stay what they are. What CAP is compared with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from capruner.methods.base import LayerSolution, RankedMethod, rank_once


class Magnitude(RankedMethod):
    """Needs no data."""

    name = "magnitude"
    uses_gradients = False
    _weights: Mapping[str, Tensor]

    def add(self, slab: Mapping[str, Tensor]) -> None:
        raise TypeError("magnitude pruning takes no gradients")

    def prepare(self, weights: Mapping[str, Tensor], dead: Mapping[str, Tensor]) -> None:
        self._weights = weights
        for name, layout in self.layouts.items():
            self._rank(name, rank_once(weights[name].abs(), dead[name], layout.is_padding(weights[name].device)))

    def _compensate(self, name: str, keep: Tensor) -> LayerSolution:
        return LayerSolution(self._weights[name].masked_fill(~keep, 0), keep, 0.0)
