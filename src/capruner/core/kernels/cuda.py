"""Greedy elimination on GPUs in Triton: one program per block, the vectors of its state in registers, its Cholesky rows in the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from capruner.core.kernels import initial_bias

SCRATCH_BYTES = 256 * 2**20
"""Cholesky rows of the blocks in flight: some thousand blocks, several for each multiprocessor."""

TILE_NUMBERS = 4096
"""Numbers of a tile of Cholesky rows that a program holds in registers."""


def eliminate_blocks(
    weight: Tensor,
    fisher_inv: Tensor,
    dead: Tensor | None,
    frozen: Tensor | None,
    n_m: tuple[int, int] | None,
    steps: int,
    order: Tensor,
    losses: Tensor,
) -> None:
    """See :func:`capruner.core.elimination.eliminate`; writes ``order`` and ``losses``."""
    n, B = weight.shape
    bias = initial_bias(weight, dead, frozen)
    stay, group = n_m or (0, B)
    weight, fisher_inv = weight.contiguous(), fisher_inv.contiguous()
    width = triton.next_power_of_2(B)
    chunk = max(1, SCRATCH_BYTES // (max(steps, 1) * B * weight.element_size()))
    rows = weight.new_empty(min(chunk, n), max(steps, 1), B)
    left = torch.ones(n, B, dtype=torch.bool, device=weight.device)
    for start in range(0, n if steps else 0, chunk):
        part = slice(start, start + chunk)
        _eliminate[(len(weight[part]),)](
            weight[part],
            fisher_inv[part],
            bias[part],
            rows,
            order[part],
            losses[part],
            B,
            steps,
            stay,
            group,
            torch.finfo(weight.dtype).eps,
            torch.finfo(weight.dtype).max,
            WIDTH=width,
            TILE=max(1, TILE_NUMBERS // width),
        )
    left.scatter_(1, order[:, :steps], False)
    order[:, steps:] = left.nonzero()[:, 1].view(n, B - steps)


@triton.jit
def _eliminate(  # type: ignore[no-untyped-def]  # Triton reads the signature
    weight,
    fisher_inv,
    bias_,
    rows,
    order,
    losses,
    B,
    steps,
    stay,
    group,
    eps,
    never,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    H = fisher_inv + block * B * B
    L = rows + block * steps * B
    c = tl.arange(0, WIDTH)
    inside = c < B
    w = tl.load(weight + block * B + c, mask=inside, other=0.0)
    diagonal = tl.load(H + c * (B + 1), mask=inside, other=1.0)
    floor = diagonal * eps
    bias = tl.load(bias_ + block * B + c, mask=inside, other=float("inf"))
    room = tl.full((WIDTH,), 1, tl.int32) * (group - stay)  # of each column's group
    for k in range(steps):
        saliency = tl.minimum(w * w / diagonal, never / 4) + bias
        saliency = tl.where((room <= 0) & (bias == 0), never, saliency)
        smallest, p = tl.min(saliency, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(order + block * B + k, p.to(tl.int64))
        tl.store(losses + block * B + k, tl.where(smallest >= never / 2, float("inf"), smallest / 2))

        row = tl.load(H + p * B + c, mask=inside, other=0.0)
        for start in range(0, k, TILE):
            j = start + tl.arange(0, TILE)
            tile = tl.load(L + j[:, None] * B + c[None, :], mask=(j < k)[:, None] & inside[None, :], other=0.0)
            coefficients = tl.load(L + j * B + p, mask=j < k, other=0.0)
            row -= tl.sum(coefficients[:, None] * tile, axis=0)
        here = c == p
        root = tl.sqrt(tl.sum(tl.where(here, diagonal, 0.0), axis=0))
        row = row / root
        tl.store(L + k * B + c, row, mask=inside)
        tl.debug_barrier()  # other threads of this program read the row in the next step
        w -= row * (tl.sum(tl.where(here, w, 0.0), axis=0) / root)
        diagonal = tl.maximum(diagonal - row * row, floor)
        w = tl.where(here, 0.0, w)
        bias = tl.where(here, float("inf"), bias)
        room -= (c // group == p // group).to(tl.int32)
