"""Cholesky factors and inverses of many small float64 matrices on CPUs, compiled by numba.

LAPACK is made for large matrices: of 64 to 512 rows it reaches a fraction of a core's rate. Here everything but a thin strip is done by the tiles of
:mod:`capruner.core.kernels.products`, whose sums stay in registers.

The factor ``L`` is made four columns at a time, each from all those before it; then ``X = L⁻¹``, four rows at a time; then ``H = Xᵀ X``.

Loops are written out: what numba makes of an assignment of slices takes seconds to compile.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from capruner.core.kernels.cpu import call_compiled, compiling
from capruner.core.kernels.products import ROWS, VECTOR_BYTES, VECTORS, add_tile, mirror

WIDTH = VECTORS * VECTOR_BYTES // 8
"""Columns of a tile."""


def factor(A: Tensor, info: Tensor) -> None:
    """Replace symmetric ``(n, B, B)`` float64 matrices by the transposes of their Cholesky factors, with zeros below.

    Args:
        info: ``(n,)`` int32, set to 0, or to the row at which a matrix is not positive definite; that factor is of no use.
    """
    room, pitch = _room(A)
    call_compiled(_factor, (A.numpy(), info.numpy(), room.numpy(), pitch), (_factor_one,))


def invert(factors: Tensor, out: Tensor) -> None:
    """Write the inverses of the matrices with these ``(n, B, B)`` transposed factors into ``out``, in its dtype; both triangles."""
    room, pitch = _room(factors)
    arguments = (factors.numpy(), out.numpy(), room.repeat(2).numpy(), pitch)
    call_compiled(_invert, arguments, (_invert_one, mirror))


def _room(like: Tensor) -> tuple[Tensor, int]:
    """Room for one matrix with space for tiles that reach over its edges, and the length of its rows."""
    size = like.shape[1]
    pitch = size + WIDTH + ROWS
    return like.new_zeros((size + ROWS) * pitch), pitch


@compiling({"contract"})
def _factor(A: NDArray, info: NDArray, U: NDArray, pitch: int) -> None:
    size = A.shape[1]
    for block in range(A.shape[0]):
        matrix = A[block]
        for k in range(len(U)):
            U[k] = 0
        for i in range(size):
            for j in range(i, size):
                U[i * pitch + j] = -matrix[i, j]
        info[block] = _factor_one(U, size, pitch)
        for i in range(size):
            for j in range(i):
                matrix[i, j] = 0
            for j in range(i, size):
                matrix[i, j] = U[i * pitch + j]


@compiling({"contract"})
def _factor_one(U: NDArray, size: int, pitch: int) -> int:
    """``U``, minus the upper triangle of a matrix, becomes its factor's transpose; the first row without a root, counted from 1, or 0."""
    for top in range(0, size, ROWS):
        for left in range(top, size, WIDTH):
            add_tile(U, top * pitch + left, pitch, 0, U, top, left, pitch, top)
        for i in range(top, min(top + ROWS, size)):
            row = U[i * pitch + i : i * pitch + size]
            for k in range(top, i):
                above = U[k * pitch + i : k * pitch + size]
                x = above[0]
                for c in range(len(row)):
                    row[c] += x * above[c]
            if not -row[0] > 0 or row[0] == -np.inf:
                return i + 1
            scale = -1 / np.sqrt(-row[0])
            for c in range(len(row)):
                row[c] *= scale
    return 0


@compiling({"contract"})
def _invert(factors: NDArray, out: NDArray, both: NDArray, pitch: int) -> None:
    size, half = factors.shape[1], len(both) // 2
    for block in range(factors.shape[0]):
        upper, inverse = factors[block], out[block]
        for k in range(len(both)):
            both[k] = 0
        for i in range(size):
            for j in range(i, size):
                both[i * pitch + j] = upper[i, j]
        _invert_one(both, size, pitch, half)
        for i in range(size):
            for j in range(i + 1):
                inverse[i, j] = both[i * pitch + j]
        mirror(inverse)


@compiling({"contract"})
def _invert_one(both: NDArray, size: int, pitch: int, half: int) -> None:
    """The first half holds a factor's transpose, the second one zeros; the inverse's lower triangle replaces the first."""
    for top in range(0, size, ROWS):
        for left in range(0, top, WIDTH):
            first = left * pitch  # the rows above have zeros in these columns
            add_tile(
                both, half + top * pitch + left, pitch, 0, both, first + top, half + first + left, pitch, top - left
            )
        for i in range(top, min(top + ROWS, size)):
            row = both[half + i * pitch : half + i * pitch + i + 1]
            for k in range(top, i):
                x, above = both[k * pitch + i], both[half + k * pitch : half + k * pitch + i + 1]
                for c in range(len(row)):
                    row[c] += x * above[c]
            row[i] = -1.0
            scale = -1 / both[i * pitch + i]
            for c in range(len(row)):
                row[c] *= scale
    for k in range(half):
        both[k] = 0
    for top in range(0, size, ROWS):
        below = half + top * pitch
        for left in range(0, min(top + ROWS, size), WIDTH):
            add_tile(both, top * pitch + left, pitch, 0, both, below + top, below + left, pitch, size - top)
