"""Sums of outer products, Cholesky factors and inverses of many small matrices on CPUs, compiled by numba.

Nearly all of the work is done in tiles whose sums stay in registers. Of a tile of 8 rows and 2 vectors of 64 bytes (AVX-512) each step adds 16 products of
vectors, of which it loads 2 and 8 single numbers, so that a core is busy multiplying; so with 4 rows and 3 vectors of 32 bytes, where there are 16
registers. What is loaded comes from the cache. Each number is a sum in one order, whatever the tile and the number of threads.

LAPACK is made for large matrices: of 64 to 512 rows it reaches a fraction of a core's rate.

Loops are written out: what numba makes of an assignment of slices takes seconds to compile. All that calls :func:`add_tile` stays in this file, because
numba compiles a cached function again only if its own file has changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from capruner.core.kernels.cpu import call_compiled, compiling

_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]
"""Of the processor that numba compiles for."""

ROWS, VECTORS, VECTOR_BYTES = (8, 2, 64) if "+avx512f" in _FEATURES.split(",") else (4, 3, 32)
"""Size of a tile."""

WIDTH = VECTORS * VECTOR_BYTES // 8
"""Columns of a tile in float64."""


def add_products(flat: Tensor, size: int, rows: int, scales: Tensor, fourth: Tensor) -> None:
    """Add ``rows`` gradients of each block to its triangle.

    Args:
        flat: ``(n, B²)``: the lower triangle of ``B`` rows, one after the other, then gradients.
        size: ``B``.
        scales: ``(n, B)``, what the gradients were divided by.
        fourth: ``(n,)`` float64, to which the sums of ``‖scales · gradient‖⁴`` are added.
    """
    width = VECTORS * VECTOR_BYTES // flat.itemsize
    pitch = -(-(size + ROWS) // width) * width
    arrays = (flat, scales.contiguous(), fourth, flat.new_zeros(rows * pitch), flat.new_zeros(ROWS * pitch))
    call_compiled(_add_products, (*(t.numpy() for t in arrays), rows, pitch, width), (_squared_norm,))


def unpack(flat: Tensor, out: Tensor) -> None:
    """Write the triangles that ``flat`` holds, see :func:`add_products`, into ``(n, B, B)`` symmetric matrices."""
    call_compiled(_unpack, (flat.numpy(), out.numpy()), (mirror,))


@compiling(set())
def _unpack(flat: NDArray, out: NDArray) -> None:
    size = out.shape[1]
    for block in range(len(out)):
        for i in range(size):
            row = flat[block, i * (i + 1) // 2 :]
            for j in range(i + 1):
                out[block, i, j] = row[j]
        mirror(out[block])


@compiling(set())
def mirror(matrix: NDArray) -> None:
    """Copy what is below the diagonal to above it, in squares of a cache line: of larger ones with 512 columns the lines displace each other."""
    size, side = len(matrix), 8
    for left in range(0, size, side):
        for top in range(left, size, side):
            for j in range(left, min(left + side, size)):
                for i in range(max(top, j + 1), min(top + side, size)):
                    matrix[j, i] = matrix[i, j]


@compiling({"contract", "reassoc"})
def _squared_norm(row: NDArray, scales: NDArray) -> float:
    total = np.float64(0.0)
    for j in range(len(scales)):
        value = np.float64(row[j]) * np.float64(scales[j])
        total += value * value
    return float(total)


@compiling({"contract"})
def _add_products(
    flat: NDArray,
    scales: NDArray,
    fourth: NDArray,
    gradients: NDArray,
    strip: NDArray,
    rows: int,
    pitch: int,
    width: int,
) -> None:
    size = scales.shape[1]
    for block in range(flat.shape[0]):
        triangle = flat[block]
        for k in range(rows):
            row, copy = triangle[size * (size + 1) // 2 + k * size :][:size], gradients[k * pitch :]
            for c in range(size):
                copy[c] = row[c]
            fourth[block] += _squared_norm(row, scales[block]) ** 2
        for i in range(0, size, ROWS):
            for r in range(min(ROWS, size - i)):
                row, copy = triangle[(i + r) * (i + r + 1) // 2 :], strip[r * pitch :]
                for c in range(i + r + 1):
                    copy[c] = row[c]
            for j in range(0, min(i + ROWS, size), width):
                add_tile(strip, j, pitch, gradients, i, j, pitch, rows)
            for r in range(min(ROWS, size - i)):
                row, copy = triangle[(i + r) * (i + r + 1) // 2 :], strip[r * pitch :]
                for c in range(i + r + 1):
                    row[c] = copy[c]


def factor(H: Tensor, order: Tensor, out: Tensor, info: Tensor) -> None:
    """Write the transposes of Cholesky factors into ``out``, with zeros below.

    Args:
        H: ``(n, B, B)`` symmetric matrices.
        order: ``(n, B)`` int64, in which rows and columns are taken.
        out: ``(n, B, B)`` float64.
        info: ``(n,)`` int32, set to 0, or to the row at which a matrix is not positive definite; that factor is of no use.
    """
    room, pitch = _room(H, 1)
    call_compiled(_factor, (*(t.numpy() for t in (H, order, out, info)), room, pitch), (_factor_one,))


def invert(A: Tensor, out: Tensor, info: Tensor) -> None:
    """Write the inverses of symmetric ``(n, B, B)`` float64 matrices into ``out``, in its dtype; ``info`` as in :func:`factor`."""
    room, pitch = _room(A, 2)
    call_compiled(_invert, (*(t.numpy() for t in (A, out, info)), room, pitch), (_factor_one, _invert_one, mirror))


def _room(like: Tensor, matrices: int) -> tuple[NDArray, int]:
    """Room for some matrices with space for tiles that reach over their edges, and the length of their rows."""
    size = like.shape[1]
    pitch = size + WIDTH + ROWS
    return np.empty(matrices * (size + ROWS) * pitch), pitch


@compiling({"contract"})
def _factor(H: NDArray, order: NDArray, out: NDArray, info: NDArray, U: NDArray, pitch: int) -> None:
    size = out.shape[1]
    for block in range(len(out)):
        matrix, old, upper = H[block], order[block], out[block]
        for k in range(len(U)):
            U[k] = 0
        for i in range(size):
            row = matrix[old[i]]
            for j in range(i, size):
                U[i * pitch + j] = -row[old[j]]
        info[block] = _factor_one(U, size, pitch)
        for i in range(size):
            for j in range(i):
                upper[i, j] = 0
            for j in range(i, size):
                upper[i, j] = U[i * pitch + j]


@compiling({"contract"})
def _factor_one(U: NDArray, size: int, pitch: int) -> int:
    """``U``, minus the upper triangle of a matrix, becomes its factor's transpose, a few columns of the factor at a time, each from all those before it.

    Returns the first row without a root, counted from 1, or 0.
    """
    for top in range(0, size, ROWS):
        for left in range(top, size, WIDTH):
            add_tile(U, top * pitch + left, pitch, U, top, left, pitch, top)
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
def _invert(A: NDArray, out: NDArray, info: NDArray, both: NDArray, pitch: int) -> None:
    size, half = A.shape[1], len(both) // 2
    for block in range(len(A)):
        matrix, inverse = A[block], out[block]
        for k in range(len(both)):
            both[k] = 0
        for i in range(size):
            for j in range(i, size):
                both[i * pitch + j] = -matrix[i, j]
        info[block] = _factor_one(both[:half], size, pitch)
        if info[block] == 0:
            _invert_one(both, size, pitch, half)
            for i in range(size):
                for j in range(i + 1):
                    inverse[i, j] = both[i * pitch + j]
            mirror(inverse)


@compiling({"contract"})
def _invert_one(both: NDArray, size: int, pitch: int, half: int) -> None:
    """Make ``X = L⁻¹`` a few rows at a time, then ``Xᵀ X``.

    The first half holds ``Lᵀ`` on and above the diagonal, the second one zeros; the inverse's lower triangle replaces the first.
    """
    for top in range(0, size, ROWS):
        for left in range(0, top, WIDTH):
            first = left * pitch  # the rows above have zeros in these columns
            target = half + top * pitch + left
            add_tile(both, target, pitch, both, first + top, half + first + left, pitch, top - left)
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
            add_tile(both, top * pitch + left, pitch, both, below + top, below + left, pitch, size - top)


@intrinsic
def add_tile(
    _: Any, target: Any, start: Any, stride: Any, gradients: Any, left: Any, right: Any, pitch: Any, rows: Any
) -> Any:
    """``target[start + r·stride + c] += Σ_k gradients[k·pitch + left + r] · gradients[k·pitch + right + c]``; ``r < ROWS``, ``c`` less than a tile's width."""
    signature = types.void(target, *[types.intp] * 2, gradients, *[types.intp] * 4)
    return signature, _tile_code


def _tile_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    target, start, stride, gradients, left, right, pitch, rows = arguments
    element = context.get_value_type(signature.args[0].dtype)
    lanes = 8 * VECTOR_BYTES // signature.args[0].dtype.bitwidth
    vector, number = ir.VectorType(element, lanes), start.type
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    fused = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}{element.intrinsic_name}"
    )
    target, gradients = (
        context.make_array(kind)(context, builder, array).data
        for kind, array in ((signature.args[0], target), (signature.args[3], gradients))
    )

    def vector_at(base: Any, offset: Any) -> Any:
        return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

    def plus(*terms: Any) -> Any:
        total = terms[0]
        for term in terms[1:]:
            total = builder.add(total, term)
        return total

    tiles = []
    for r in range(ROWS):
        offset = plus(start, builder.mul(stride, number(r)))
        for v in range(VECTORS):
            place, total = vector_at(target, plus(offset, number(v * lanes))), cgutils.alloca_once(builder, vector)
            builder.store(builder.load(place, align=VECTOR_BYTES // lanes), total)
            tiles.append((r, v, place, total))
    with cgutils.for_range(builder, rows, intp=number) as loop:
        here = builder.mul(loop.index, pitch)
        columns = [
            builder.load(vector_at(gradients, plus(here, right, number(v * lanes))), align=VECTOR_BYTES // lanes)
            for v in range(VECTORS)
        ]
        factors = []
        for r in range(ROWS):
            one = builder.load(builder.gep(gradients, [plus(here, left, number(r))]))
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), one, ir.IntType(32)(0))
            factors.append(builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros))
        for r, v, _, total in tiles:
            builder.store(builder.call(fused, [factors[r], columns[v], builder.load(total)]), total)
    for _, _, place, total in tiles:
        builder.store(builder.load(total), place, align=VECTOR_BYTES // lanes)
    return context.get_dummy_value()
