"""WoodFisher (arXiv 2004.14340): one scoring, one joint update; a baseline for CAP."""

from __future__ import annotations

from torch import Tensor

from capruner.core.elimination import Elimination
from capruner.core.patterns import group_saliency, rank_once
from capruner.methods.base import SecondOrderMethod


class OBS(SecondOrderMethod):
    """Every weight (or group of weights) is scored as if it alone were pruned; the pruned set has its exact joint update."""

    name = "obs"

    def _order(self, weight: Tensor, fisher_inv: Tensor, pruned: Tensor, padding: Tensor) -> Elimination:
        if self._unit == 1:
            saliency = weight * weight / (2 * fisher_inv.diagonal(dim1=1, dim2=2))
        else:
            size = (-1, self._unit)
            systems = fisher_inv.unflatten(1, size).unflatten(3, size).diagonal(dim1=1, dim2=3).movedim(3, 1)
            saliency = group_saliency(weight.unflatten(1, size), systems).repeat_interleave(self._unit, dim=1)
        return rank_once(saliency, self.settings.pattern, pruned, padding)
