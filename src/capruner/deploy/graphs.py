"""ONNX files: reading, sparsity, metadata, dense twins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def read(path: Path) -> Any:
    """A checked ``onnx.ModelProto``; raise ``ValueError`` if the file is not ONNX, or damaged."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is not an ONNX file, or is damaged: {' '.join(str(error).split())[:160]}") from error
    return graph


def weights(graph: Any) -> list[tuple[Any, np.ndarray]]:
    """Matrices and kernels that enter a product or a convolution, directly or as int8, as ``(initializer, where it is zero)``."""
    from onnx import numpy_helper

    used = {name for node in graph.graph.node if node.op_type in _PRODUCTS for name in node.input}
    used |= {
        node.input[0]
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear" and used.intersection(node.output)
    }
    items = [item for item in graph.graph.initializer if item.name in used and len(item.dims) > 1]
    return [(item, numpy_helper.to_array(item) == 0) for item in items]


def sparsity_of(path: Path) -> float:
    """Fraction of zeros in the matrices and kernels of an ONNX file."""
    zeros = [zero for _, zero in weights(read(path))]
    return sum(int(zero.sum()) for zero in zeros) / max(sum(zero.size for zero in zeros), 1)


def fill_zeros(source: Path, target: Path) -> None:
    """Write a dense twin of an ONNX file for benchmarks: random values in place of the zeros of matrices and kernels, as large as their other values."""
    import onnx
    from onnx import numpy_helper

    graph = read(source)
    generator = np.random.default_rng(0)
    for initializer, zero in weights(graph):
        value = numpy_helper.to_array(initializer).copy()
        spread = float(np.sqrt(np.square(value[~zero].astype(np.float32)).mean())) if (~zero).any() else 0.02
        filled = generator.normal(0, spread, int(zero.sum()))
        value[zero] = np.clip(np.ceil(np.abs(filled)), 1, 127) if value.dtype == np.int8 else filled
        initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    onnx.save(graph, target)


def image_shape(path: Path) -> tuple[int, ...]:
    """Shape of one input of an ONNX file, without the batch; raise ``ValueError`` for several inputs or open sizes."""
    inputs = read(path).graph.input
    sizes = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim][1:]
    if len(inputs) != 1 or not sizes or not all(sizes):
        raise ValueError(
            f"{path}: needs one input of fixed size (except for the batch), has {len(inputs)}, the first of size {sizes}"
        )
    return tuple(sizes)


def write_metadata(path: Path, properties: Mapping[str, str]) -> None:
    """Add metadata to an ONNX file, in place."""
    import onnx

    graph = onnx.load(str(path))
    known = {item.key: item.value for item in graph.metadata_props}
    onnx.helper.set_model_props(graph, known | dict(properties))
    onnx.save(graph, str(path))
