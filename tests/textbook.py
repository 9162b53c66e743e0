"""The formulas as the papers print them, in float64 and as loops: slow, obvious, and what the library is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_inverse_rank_one(gradients: Tensor, damp: float) -> Tensor:
    """``(m, B)`` to ``(B, B)``: one Sherman-Morrison update per gradient (CAP, equation 5)."""
    m, B = gradients.shape
    H = torch.eye(B, dtype=torch.float64) / damp
    for g in gradients.double():
        Hg = H @ g
        H -= torch.outer(Hg, Hg) / (m + g @ Hg)
    return H


def eliminate_loop(w: Tensor, H: Tensor) -> tuple[list[int], list[float], list[Tensor]]:
    """Right-looking greedy OBS on one block: the order, the loss of each step, and the trace of weights."""
    w, H = w.double().clone(), H.double().clone()
    left = list(range(len(w)))
    order, losses, trace = [], [], [w.clone()]
    while left:
        saliency = [float(w[q] ** 2 / (2 * H[q, q])) for q in left]
        p = left.pop(min(range(len(left)), key=saliency.__getitem__))
        order.append(p)
        losses.append(min(saliency))
        w -= H[:, p] * (w[p] / H[p, p])
        H -= torch.outer(H[:, p], H[p]) / H[p, p]
        w[order] = 0
        trace.append(w.clone())
    return order, losses, trace


def obs_weights(w: Tensor, H: Tensor, keep: Tensor) -> tuple[Tensor, float]:
    """Minimiser of ``½ (v − w)ᵀ H⁻¹ (v − w)`` subject to ``v = 0`` on the removed set, and its value, through ``F = H⁻¹``."""
    F = torch.linalg.inv(H.double())
    w = w.double()
    v = torch.zeros_like(w)
    gone = ~keep
    if keep.any():
        v[keep] = w[keep] + torch.linalg.solve(F[keep][:, keep], F[keep][:, gone] @ w[gone])
    delta = v - w
    return v, float(0.5 * delta @ F @ delta)


def random_fisher_inverse(
    n: int, B: int, seed: int = 0, condition: float = 1e3, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(n, B, B)`` symmetric positive definite with eigenvalues between 1 and ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, B, B, generator=generator, dtype=torch.float64)).Q
    eigenvalues = condition ** torch.rand(n, B, generator=generator, dtype=torch.float64)
    H = Q * eigenvalues[:, None] @ Q.mT
    return ((H + H.mT) / 2).to(dtype)
