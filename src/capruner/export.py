"""Pruned models for runtimes: ONNX checked against torch, and 2:4 weights in the form of sparse tensor cores."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

OPSET = 16
"""The newest that DeepSparse runs well: from 17 on LayerNorm is one operator, and a ViT-Small at 90 % took it four times as long."""


def to_onnx(model: nn.Module, path: str | Path, input_size: Sequence[int], tolerance: float = 1e-3) -> dict[str, Any]:
    """Write ``model`` as ONNX with a dynamic batch, and hold its outputs against torch's at batches of 1 and 3.

    Args:
        model: one input ``(batch, *input_size)``, one output tensor.
        path: the file; it appears only when the checks have passed.
        input_size: ``(channels, height, width)``.
        tolerance: largest difference allowed, relative to the largest output.

    Returns:
        ``zeros`` (of weights, in the file), ``difference`` (largest, relative), ``bytes``.

    Raises:
        RuntimeError: the outputs differ, zeros got lost, or the model cannot be traced.
        ModuleNotFoundError: onnx or onnxruntime is not installed (``pip install capruner[export]``).
    """
    import onnx
    import onnxruntime

    path = Path(path)
    model = copy.deepcopy(model).cpu().float().eval()
    _unfuse_attention(model)
    handle, partial = tempfile.mkstemp(suffix=".onnx", dir=path.parent)
    os.close(handle)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # the tracer warns of every shape that it turns into a constant; the check below is what counts
            torch.onnx.export(
                model,
                (torch.randn(2, *input_size),),
                partial,
                dynamo=False,  # the graph of the tracer is the one that sparse runtimes recognise
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
        zeros = _zeros(onnx.load(partial))
        expected = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
        if zeros < expected:
            raise RuntimeError(
                f"{path}: {expected - zeros:,} of {expected:,} zeros got lost in the export; please report this"
            )
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        difference = max(_difference(session, model, batch, input_size) for batch in (1, 3))
        if not difference <= tolerance:
            raise RuntimeError(
                f"{path}: onnxruntime and torch differ by {difference:.2g} of the largest output, more than {tolerance:g}; the file was not written"
            )
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return {"zeros": zeros, "difference": difference, "bytes": path.stat().st_size}


def _unfuse_attention(model: nn.Module) -> None:
    """timm's attention in plain products: the fused operator has no form that every runtime knows."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def _zeros(graph: Any) -> int:
    from onnx import numpy_helper

    weights = (numpy_helper.to_array(item) for item in graph.graph.initializer if len(item.dims) > 1)
    return sum(int((w == 0).sum()) for w in weights if w.dtype.kind == "f")


@torch.no_grad()
def _difference(session: Any, model: nn.Module, batch: int, input_size: Sequence[int]) -> float:
    x = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(batch))
    theirs, ours = torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x)
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12))


def to_semi_structured(model: nn.Module, tolerance: float = 1e-2) -> list[str]:
    """Replace, in place, the weights of every 2:4 ``Linear`` by ``torch.sparse.to_sparse_semi_structured``, each checked against its dense product.

    Args:
        model: float16 or bfloat16, on a GPU with sparse tensor cores (compute capability 8.0 or more).
        tolerance: largest difference of a product, relative to its largest value.

    Returns:
        The layers that were converted.

    Raises:
        RuntimeError: not on such a GPU, or a product differs.
        ValueError: no layer is 2:4.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and is_two_of_four(layer.weight)
    }
    if not layers:
        raise ValueError("no Linear layer of this model has 2:4 weights: prune with mask_type='2:4' first")
    device = next(iter(layers.values())).weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError(
            f"2:4 weights need a GPU with sparse tensor cores (compute capability 8.0 or more); the model is on {device}"
        )
    for name, layer in layers.items():
        x = torch.randn(64, layer.in_features, device=device, dtype=layer.weight.dtype)
        dense = x @ layer.weight.mT
        sparse = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
        difference = float((nn.functional.linear(x, sparse) - dense).abs().max() / dense.abs().max())
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name}: the 2:4 product differs from the dense one by {difference:.2g} of its largest value"
            )
        layer.weight = sparse
    return list(layers)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of each four consecutive inputs of a matrix are not zero, and some are."""
    if weight.dim() != 2 or weight.shape[1] % 4 or not bool((weight == 0).any()):
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(dim=2) <= 2).all())


def load_pruned(model: str, kwargs: Mapping[str, Any], checkpoint: str | Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A timm model with the weights of ``checkpoint``, and its input size.

    Raises:
        ValueError: timm has no such model, or the weights do not fit it.
        FileNotFoundError: no such checkpoint.
    """
    import timm
    from timm.data import resolve_data_config

    from capruner.report.architecture import architecture
    from capruner.report.checkpoint import read_weights

    weights = read_weights(checkpoint)
    architecture(model, kwargs)  # the errors of a wrong name or argument
    network = timm.create_model(model, **kwargs).eval()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} does not fit {model} with --model-kwargs {dict(kwargs)}: {str(error).splitlines()[1].strip()}"
        ) from error
    given = {key: kwargs[key] for key in ("img_size", "in_chans") if key in kwargs}
    return network, resolve_data_config(given, model=network)["input_size"]
