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


def fisher_blocks(gradients: Tensor, B: int, damp: float) -> list[Tensor]:
    """``(m, d)`` gradients of one weight tensor to the blocks ``(1/m) Σ g gᵀ + λ I`` of ``B`` consecutive weights; the last may be smaller."""
    G = gradients.double()
    return [g.mT @ g / len(G) + damp * torch.eye(g.shape[1], dtype=torch.float64) for g in G.split(B, dim=1)]


def quadratic_loss(before: Tensor, after: Tensor, blocks: list[Tensor]) -> float:
    """``½ (v − w)ᵀ F (v − w)`` summed over the blocks of one weight tensor."""
    B = len(blocks[0])
    deltas = (after.double() - before.double()).flatten().split(B)
    return sum(float(0.5 * delta @ F @ delta) for delta, F in zip(deltas, blocks, strict=True))


def cap_loop(
    weights: dict[str, Tensor], blocks: dict[str, list[Tensor]], num_pruned: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """CAP over several layers, end to end: masks (True = stays), weights and the predicted loss at ``num_pruned`` zeros in all.

    Each block is eliminated by itself; its losses are made monotone; the cheapest steps of all blocks are taken; what stays is re-fitted.
    """
    steps, orders, inverses = [], {}, {}
    for layer, (name, Fs) in enumerate(blocks.items()):
        for block, (w, F) in enumerate(zip(weights[name].flatten().split(len(Fs[0])), Fs, strict=True)):
            inverses[name, block] = torch.cholesky_inverse(torch.linalg.cholesky(F))
            orders[name, block], losses, _ = eliminate_loop(w, inverses[name, block])
            steps += [(max(losses[: k + 1]), layer, block, k, name) for k in range(len(losses))]
    taken = sorted(steps)[:num_pruned]
    masks, pruned, total = {}, {}, 0.0
    for name, Fs in blocks.items():
        keeps, values = [], []
        for block, w in enumerate(weights[name].flatten().split(len(Fs[0]))):
            gone = orders[name, block][: sum(s[4] == name and s[2] == block for s in taken)]
            keep = torch.ones(len(w), dtype=torch.bool)
            keep[gone] = False
            value, loss = obs_weights(w, inverses[name, block], keep)
            keeps, values, total = [*keeps, keep], [*values, value], total + loss
        masks[name] = torch.cat(keeps).view_as(weights[name])
        pruned[name] = torch.cat(values).view_as(weights[name])
    return masks, pruned, total
