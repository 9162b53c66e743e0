"""The published formulation as a GPU programmer would write it first: batched over blocks, float32, right-looking, with weight traces."""

from __future__ import annotations

import torch
from torch import Tensor


def eliminate_with_traces(weight: Tensor, fisher_inv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy OBS that rewrites all of ``H`` at each step: order ``(n, B)``, losses ``(n, B)``, traces ``(B + 1, n, B)``."""
    w, H = weight.clone(), fisher_inv.clone()
    n, B = w.shape
    blocks = torch.arange(n, device=w.device)
    gone = torch.zeros(n, B, dtype=torch.bool, device=w.device)
    order = torch.empty(n, B, dtype=torch.int64, device=w.device)
    losses, traces = torch.empty_like(w), w.new_empty(B + 1, n, B)
    traces[0] = w
    for step in range(B):
        saliency = (w * w / (2 * H.diagonal(dim1=1, dim2=2))).masked_fill_(gone, torch.inf)
        p = saliency.argmin(dim=1)
        order[:, step], losses[:, step] = p, saliency[blocks, p]
        row = H[blocks, p]
        pivot = row[blocks, p][:, None]
        w -= row * (w[blocks, p][:, None] / pivot)
        H.addcmul_((row / pivot)[:, :, None], row[:, None], value=-1)
        gone[blocks, p] = True
        w[gone] = 0
        H.diagonal(dim1=1, dim2=2)[gone] = 1
        traces[step + 1] = w
    return order, losses, traces


def rank_one_update(H: Tensor, gradient: Tensor, num_grads: int) -> None:
    """One Sherman-Morrison update of ``(n, B, B)`` by ``(n, B)``, in place."""
    Hg = torch.bmm(H, gradient[:, :, None])
    half = Hg * (num_grads + gradient[:, None] @ Hg).rsqrt()
    H.addcmul_(
        half, half.mT, value=-1
    )  # in one pass over H: several times faster than a matrix product of inner dimension 1
