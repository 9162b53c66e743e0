"""CAP, the Correlation-Aware Pruner (arXiv 2210.09223): greedy elimination per block, allocation over blocks, closed-form OBS weights."""

from __future__ import annotations

import torch
from torch import Tensor

from capruner.core.elimination import Elimination, eliminate
from capruner.core.patterns import eliminate_groups
from capruner.methods.base import SecondOrderMethod


class CAP(SecondOrderMethod):
    """Each weight is scored with all cheaper ones of its block already pruned, so correlated weights are not pruned together."""

    name = "cap"
    shrinks = True

    def compile(self, dtype: torch.dtype) -> None:
        super().compile(dtype)
        if self._unit == 1:
            eliminate(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype))

    def _order(self, weight: Tensor, fisher_inv: Tensor, pruned: Tensor, padding: Tensor) -> Elimination:
        pattern, parallel = self.settings.pattern, self.settings.blocks_in_parallel
        if self._unit > 1:
            return eliminate_groups(
                weight, fisher_inv, pattern.group, dead=pruned, frozen=padding, blocks_in_parallel=parallel
            )
        return eliminate(weight, fisher_inv, dead=pruned, frozen=padding, n_m=pattern.n_m, blocks_in_parallel=parallel)
