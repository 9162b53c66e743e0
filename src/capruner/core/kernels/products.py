"""Sums of outer products on CPUs, compiled by numba: the lower triangle alone, in tiles whose sums stay in registers.

Of a tile of 4 rows and 3 vectors, each gradient adds 12 products of vectors, of which it loads 3 and 4 single numbers: with these sizes a core of any x86-64
processor with AVX2 is busy multiplying. What is loaded comes from the cache, where the gradients of one block lie side by side.

Each number is a sum in the order of the gradients, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from capruner.core.kernels.cpu import call_compiled, compiling

ROWS, VECTORS, VECTOR_BYTES = 4, 3, 32


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
    arrays = (flat, scales.contiguous(), fourth, flat.new_zeros(rows * pitch), flat.new_zeros(ROWS * width))
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
    """Copy what is below the diagonal to above it, in squares that stay in the nearest cache."""
    size, side = len(matrix), 32
    for top in range(0, size, side):
        for left in range(0, top + side, side):
            for i in range(top, min(top + side, size)):
                for j in range(left, min(left + side, i)):
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
    tile: NDArray,
    rows: int,
    pitch: int,
    width: int,
) -> None:
    size = scales.shape[1]
    for block in range(flat.shape[0]):
        triangle = flat[block]
        for k in range(rows):
            row, copy = triangle[size * (size + 1) // 2 + k * size :][:size], gradients[k * pitch :]
            for c in range(size):  # not one assignment: numba compiles its error message about shapes for seven seconds
                copy[c] = row[c]
            fourth[block] += _squared_norm(row, scales[block]) ** 2
        for i in range(0, size, ROWS):
            for j in range(0, min(i + ROWS, size), width):
                if j + width <= i + 1 and i + ROWS <= size:
                    add_tile(triangle, i * (i + 1) // 2 + j, i, 1, gradients, i, j, pitch, rows)
                    continue
                # Across the diagonal, or below the last row: by way of a tile that is filled up with what nobody reads.
                for r in range(min(ROWS, size - i)):
                    start, count = (i + r) * (i + r + 1) // 2 + j, min(width, i + r + 1 - j)
                    for c in range(count):
                        tile[r * width + c] = triangle[start + c]
                add_tile(tile, 0, width, 0, gradients, i, j, pitch, rows)
                for r in range(min(ROWS, size - i)):
                    start, count = (i + r) * (i + r + 1) // 2 + j, min(width, i + r + 1 - j)
                    for c in range(count):
                        triangle[start + c] = tile[r * width + c]


@intrinsic
def add_tile(
    _: Any,
    target: Any,
    start: Any,
    stride: Any,
    growth: Any,
    gradients: Any,
    left: Any,
    right: Any,
    pitch: Any,
    rows: Any,
) -> Any:
    """``target[start + r·stride + r(r+1)/2·growth + c] += Σ_k gradients[k·pitch + left + r] · gradients[k·pitch + right + c]`` for ``r < 4``, ``c < width``."""
    signature = types.void(target, *[types.intp] * 3, gradients, *[types.intp] * 4)
    return signature, _tile_code


def _tile_code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    target, start, stride, growth, gradients, left, right, pitch, rows = arguments
    element = context.get_value_type(signature.args[0].dtype)
    lanes = 8 * VECTOR_BYTES // signature.args[0].dtype.bitwidth
    vector, number = ir.VectorType(element, lanes), start.type
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    fused = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}{element.intrinsic_name}"
    )
    target, gradients = (
        context.make_array(kind)(context, builder, array).data
        for kind, array in ((signature.args[0], target), (signature.args[4], gradients))
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
        offset = plus(start, builder.mul(stride, number(r)), builder.mul(growth, number(r * (r + 1) // 2)))
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
