"""Greedy elimination on CPUs, compiled by numba: one block per task, its state in the core's own cache.

Threads are Python's own: the compiled loop releases the interpreter lock, and no pool of threads is left behind to spin beside the training.

Left-looking, on columns that shrink: a weight that has left changes places with the last one that has not, so step ``k`` touches ``k (B − k)`` numbers
and the whole block ``B³/6``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CANDIDATE, DEAD, FROZEN = 0, 1, 2


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
    """See :func:`capruner.obs.eliminate`; writes ``order`` and ``losses``."""
    kind = torch.zeros(weight.shape, dtype=torch.uint8)
    for mask, value in ((dead, DEAD), (frozen, FROZEN)):
        if mask is not None:
            kind.masked_fill_(mask, value)
    stay, group = n_m or (1, 1)
    arrays = [t.detach().contiguous().numpy() for t in (weight, fisher_inv, kind)]
    outputs = [order.numpy(), losses.numpy()]
    threads = torch.get_num_threads()
    size = max(
        1, -(-len(weight) // (4 * threads))
    )  # several shares for each thread: one that is held up leaves the rest to others

    def share(start: int) -> None:
        part = slice(start, start + size)
        _eliminate(*(a[part] for a in arrays), stay, group, steps, *(a[part] for a in outputs))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(0, len(weight), size)))


@numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _eliminate(
    weight: NDArray,
    fisher_inv: NDArray,
    kind: NDArray,
    stay: int,
    group: int,
    steps: int,
    order: NDArray,
    losses: NDArray,
) -> None:
    for block in range(weight.shape[0]):
        _eliminate_one(weight[block], fisher_inv[block], kind[block], stay, group, steps, order[block], losses[block])


@numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def _eliminate_one(
    weight: NDArray,
    H: NDArray,
    kind: NDArray,
    stay: int,
    group: int,
    steps: int,
    order: NDArray,
    losses: NDArray,
) -> None:
    B = weight.shape[0]
    info = np.finfo(weight.dtype)
    w, row = weight.copy(), np.empty_like(weight)
    diagonal, floor = np.empty_like(weight), np.empty_like(weight)
    position = np.arange(B)
    rank = kind.copy()
    L = np.empty((steps, B), weight.dtype)
    room = np.full(B // group, group - stay if group > 1 else B)
    for c in range(B):
        diagonal[c] = H[c, c]
        floor[c] = H[c, c] * info.eps  # what rounding leaves after many subtractions: below this it is noise
    for k in range(steps):
        left = B - k
        # The cheapest candidate; of equals the first in the block, so that ties do not depend on what has left.
        p, best = -1, info.max
        for c in range(left):
            saliency = min(w[c] * w[c] / diagonal[c], info.max / 4)
            if rank[c] == DEAD:
                saliency = -np.inf
            elif rank[c] == FROZEN or room[position[c] // group] <= 0:
                continue
            if saliency < best or (saliency == best and position[c] < position[p]):
                p, best = c, saliency
        if p < 0:
            steps = k
            break
        at = position[p]
        order[k], losses[k] = at, best / 2
        room[at // group] -= 1

        for c in range(left):
            row[c] = H[at, position[c]]
        j = 0
        while j + 4 <= k:  # four at once: a quarter of the loads and stores of `row`
            a, b, d, e = L[j, p], L[j + 1, p], L[j + 2, p], L[j + 3, p]
            La, Lb, Ld, Le = L[j], L[j + 1], L[j + 2], L[j + 3]
            for c in range(left):
                row[c] -= a * La[c] + b * Lb[c] + d * Ld[c] + e * Le[c]
            j += 4
        while j < k:
            a, La = L[j, p], L[j]
            for c in range(left):
                row[c] -= a * La[c]
            j += 1
        root = np.sqrt(diagonal[p])
        step = w[p] / root
        Lk = L[k]
        for c in range(left):
            x = row[c] / root
            Lk[c] = x
            w[c] -= x * step
            diagonal[c] = max(diagonal[c] - x * x, floor[c])

        last = left - 1
        w[p], diagonal[p], floor[p], rank[p], position[p] = (
            w[last],
            diagonal[last],
            floor[last],
            rank[last],
            position[last],
        )
        for j in range(k + 1):
            L[j, p] = L[j, last]
    # What never leaves comes last, in the order of the block.
    order[steps:] = np.sort(position[: B - steps])
    losses[steps:] = np.inf
