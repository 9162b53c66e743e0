"""WoodFisher (arXiv 2004.14340): one scoring, one joint update. What CAP is compared with."""

from __future__ import annotations

from torch import Tensor

from capruner.methods.base import SecondOrderMethod, rank_once
from capruner.obs import Elimination


class OBS(SecondOrderMethod):
    """Every weight is scored as if it left alone, ``w² / (2 H_pp)``; the set that leaves gets its exact joint update."""

    name = "obs"

    def _order(self, weight: Tensor, fisher_inv: Tensor, dead: Tensor, padding: Tensor) -> Elimination:
        saliency = weight * weight / (2 * fisher_inv.diagonal(dim1=1, dim2=2))
        return rank_once(saliency, dead, padding)
