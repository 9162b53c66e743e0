"""Greedy elimination on CPUs, compiled by numba: one block after the other, its state in the core's own cache.

The compiled loop releases the interpreter lock, so that :func:`capruner.core.parallel.in_chunks` runs it on every core.

Left-looking, on columns that shrink: a weight that has left changes places with the last one that has not, so step ``k`` touches ``k (B − k)`` numbers
and the whole block ``B³/6``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba.core.caching import NullCache
from numpy.typing import NDArray
from torch import Tensor

DEAD, FROZEN = 1, 2
"""Kinds of weights; 0 is a candidate."""


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
    kind = torch.zeros(weight.shape, dtype=torch.uint8)
    for mask, value in ((dead, DEAD), (frozen, FROZEN)):
        if mask is not None:
            kind.masked_fill_(mask, value)
    stay, group = n_m or (1, 1)
    arrays = [t.detach().contiguous().numpy() for t in (weight, fisher_inv, kind)]
    arguments = (*arrays, stay, group, steps, order.numpy(), losses.numpy())
    call_compiled(_eliminate, arguments, (_eliminate_one, _minimum))


def call_compiled(function: Any, arguments: tuple[Any, ...], inner: tuple[Any, ...]) -> None:
    """Call a compiled function that calls ``inner``; without the on-disk cache where that cannot be written."""
    try:
        function(*arguments)
    except OSError:  # the place for the cache is full or gone; nothing else in it touches a file
        for compiled in (function, *inner):
            compiled._cache = NullCache()
        function(*arguments)


def compiling(fastmath: set[str]) -> Callable[[Callable[..., Any]], Any]:
    """numba's decorator, with compiled code cached on disk where there is a place for it: beside this file, or in ``NUMBA_CACHE_DIR`` or ``HOME``."""
    options = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except (RuntimeError, OSError):  # "no locator available", as in a read-only container
            return numba.njit(**options)(function)

    return compile_function


# The sum of a row's update may be reordered; a saliency is never NaN (see `diagonal`), so its minimum may be looked for in any order too.
_compiled = compiling({"contract"})
_compiled_minimum = compiling({"nnan", "nsz"})


@_compiled
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


@_compiled_minimum
def _minimum(values: NDArray, count: int) -> float:
    best = values[0]
    for c in range(1, count):
        if values[c] < best:
            best = values[c]
    return best


@_compiled
def _eliminate_one(
    weight: NDArray, H: NDArray, kind: NDArray, stay: int, group: int, steps: int, order: NDArray, losses: NDArray
) -> None:
    B = weight.shape[0]
    info = np.finfo(weight.dtype)
    w, row, saliency = weight.copy(), np.empty_like(weight), np.empty_like(weight)
    diagonal, floor = np.empty_like(weight), np.empty_like(weight)
    # Between which a saliency counts: the dead are below every candidate, the frozen (and members of a full group) above.
    low, high = np.empty_like(weight), np.empty_like(weight)
    position = np.empty(B, np.uint32)  # unsigned: a signed index would be looked at for its sign each time
    L = np.empty((steps, B), weight.dtype)
    room = np.empty(B // group, np.int64)
    for g in range(B // group):
        room[g] = group - stay if group > 1 else B
    for c in range(B):
        position[c] = c
        diagonal[c] = H[c, c]
        floor[c] = H[c, c] * info.eps  # what rounding leaves after many subtractions: below this it is noise
        stays = kind[c] == FROZEN or (kind[c] != DEAD and room[c // group] <= 0)
        low[c] = np.inf if stays else -np.inf
        high[c] = -np.inf if kind[c] == DEAD else info.max / 4
    for k in range(steps):
        left = B - k
        for c in range(left):
            saliency[c] = max(min(w[c] * w[c] / diagonal[c], high[c]), low[c])
        best = _minimum(saliency, left)
        if best == np.inf:
            steps = k
            break
        # Of equals the first in the block, so that ties do not depend on what has left.
        p = -1
        for c in range(left):
            if saliency[c] == best and (p < 0 or position[c] < position[p]):
                p = c
        at, last = position[p], left - 1
        order[k], losses[k] = at, best / 2

        Hat = H[at]
        for c in range(left):
            row[c] = Hat[position[c]]
        # The one that leaves changes places with the last: in a row of L while that is in the core's nearest cache.
        j = 0
        while j + 8 <= k:  # eight at once: fewer loads and stores of `row`
            La, Lb, Lc, Ld, Le, Lf, Lg, Lh = L[j], L[j + 1], L[j + 2], L[j + 3], L[j + 4], L[j + 5], L[j + 6], L[j + 7]
            xa, xb, xc, xd, xe, xf, xg, xh = La[p], Lb[p], Lc[p], Ld[p], Le[p], Lf[p], Lg[p], Lh[p]
            for c in range(left):
                row[c] -= (xa * La[c] + xb * Lb[c] + xc * Lc[c] + xd * Ld[c]) + (
                    xe * Le[c] + xf * Lf[c] + xg * Lg[c] + xh * Lh[c]
                )
            La[p], Lb[p], Lc[p], Ld[p] = La[last], Lb[last], Lc[last], Ld[last]
            Le[p], Lf[p], Lg[p], Lh[p] = Le[last], Lf[last], Lg[last], Lh[last]
            j += 8
        while j < k:
            La = L[j]
            xa = La[p]
            for c in range(left):
                row[c] -= xa * La[c]
            La[p] = La[last]
            j += 1
        root = np.sqrt(diagonal[p])
        step = w[p] / root
        Lk = L[k]
        for c in range(left):
            x = row[c] / root
            Lk[c] = x
            w[c] -= x * step
        for c in range(left):  # a loop of its own: with more arrays in one the compiler gives up on vectors
            diagonal[c] = max(diagonal[c] - Lk[c] * Lk[c], floor[c])
        Lk[p] = Lk[last]
        for values in (w, diagonal, floor, low, high):
            values[p] = values[last]
        position[p] = position[last]
        room[at // group] -= 1
        if room[at // group] == 0:
            for c in range(last):
                if position[c] // group == at // group and high[c] > 0:
                    low[c] = np.inf
    # What never leaves comes last, in the order of the block. Marked, not sorted: to compile a sort takes seconds.
    for c in range(B):
        row[c] = 0
    for c in range(B - steps):
        row[position[c]] = 1
    k = steps
    for at in range(B):
        if row[at] == 1:
            order[k], losses[k] = at, np.inf
            k += 1
