"""int8 after pruning: static quantisation by onnxruntime that keeps pruned weights exactly zero."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from capruner.deploy.graphs import read, weights
from capruner.files import replacing

PRODUCTS = ("Conv", "MatMul", "Gemm")
"""Operators that are quantised in transformers: int8 sums, norms and softmax cost accuracy there and save little time."""


def to_int8(source: str | Path, path: str | Path, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Quantise an ONNX file: int8 weights with a scale per output channel, uint8 activations with ranges measured on ``batches``.

    Args:
        source: float32 ONNX of :func:`capruner.deploy.export.to_onnx`.
        path: the file to write, with QuantizeLinear and DequantizeLinear operators.
        batches: calibration images, ``(images, labels)``.

    Returns:
        The number of pruned weights, each of them zero in the new file.

    Raises:
        RuntimeError: onnxruntime's quantisation does not run here, or a pruned weight is not zero in the new file.
    """
    quantization = _quantization()
    graph = read(Path(source))
    attention = any(node.op_type == "Softmax" for node in graph.graph.node)
    options: dict[str, Any] = {"WeightSymmetric": True}
    if attention:
        # Products of two activations stay float32, and outputs of products: onnxruntime 1.26 computes some fused ones wrong.
        options |= {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": list(PRODUCTS)}
    with replacing(path) as partial:
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it recommends a preprocessing that torch.onnx has done
        try:
            quantization.quantize_static(
                str(source),
                str(partial),
                _reader(quantization, batches, graph.graph.input[0].name),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(PRODUCTS) if attention else None,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options=options,
            )
        finally:
            logging.disable(level)
        return _kept_zeros(graph, read(partial), Path(path))


def _quantization() -> Any:
    try:
        import onnxruntime.quantization
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"onnxruntime's quantisation does not run here ({error}); it needs onnx 1.16 or later and ml_dtypes: "
            "pip install 'capruner[int8]' in an environment without SparseML, which pins an older onnx"
        ) from error
    return onnxruntime.quantization


def _reader(quantization: Any, batches: Iterable[tuple[Tensor, Tensor]], name: str) -> Any:
    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = ({name: images.numpy()} for images, _ in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    return Reader()


def _kept_zeros(dense: Any, quantised: Any, path: Path) -> int:
    """Number of zeros in the weights of ``dense``; each must be zero in ``quantised``."""
    from onnx import numpy_helper

    values = {item.name: numpy_helper.to_array(item) for item in quantised.graph.initializer}
    count = 0
    for item, zero in weights(dense):
        name = item.name if item.name in values else f"{item.name}_quantized"
        if name not in values or values[name].shape != zero.shape or values[name][zero].any():
            raise RuntimeError(f"{path}: quantisation changed pruned weights of {item.name}; the file was not written")
        count += int(zero.sum())
    return count
