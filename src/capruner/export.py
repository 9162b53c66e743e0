"""Pruned models for runtimes: ONNX checked against torch, and 2:4 weights in the form of sparse tensor cores."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from capruner.cli.arguments import describe
from capruner.files import replacing
from capruner.weights import linear_weights
from capruner.wrappers import unwrap

OPSET = 16
"""The newest that DeepSparse runs well: from 17 on LayerNorm is one operator, and a ViT-Small at 90 % takes it half again as long, on a busy machine longer."""

TILE = (32, 64)
"""Multiples of outputs and inputs that torch's 2:4 kernels take in half precision (CUTLASS; cuSPARSELt takes them too)."""


def to_onnx(model: nn.Module, path: str | Path, input_size: Sequence[int], tolerance: float = 1e-3) -> dict[str, Any]:
    """Write ``model`` as ONNX with a dynamic batch, and hold its outputs against torch's at batches of 1 and 3.

    Args:
        model: one input ``(batch, *input_size)``, one output tensor.
        path: the file; it appears only when the checks have passed.
        input_size: ``(channels, height, width)``.
        tolerance: largest difference allowed, relative to the largest output.

    Returns:
        ``zeros`` (of matrices and kernels), ``difference`` (largest, relative), ``bytes``.

    Raises:
        RuntimeError: the outputs differ, zeros got lost, or the model cannot be traced.
        ValueError: the model does not take such an input.
        ModuleNotFoundError: onnx or onnxruntime is not installed (``pip install capruner[export]``).
    """
    import onnx
    import onnxruntime

    path = Path(path)
    model = copy.deepcopy(unwrap(model)).cpu().float().eval()
    _unfuse_attention(model)
    images = torch.randn(2, *input_size)
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # whatever the architecture trips over
        raise ValueError(
            f"the model does not take images of {tuple(input_size)}: {describe(error)}; "
            "transformers are built for one size, --model-kwargs img_size=N"
        ) from error
    with replacing(path) as partial:
        _trace(model, images, partial)
        lost = _lost_zeros(onnx.load(str(partial)), model)
        if lost:
            raise RuntimeError(f"{path}: zeros of {', '.join(lost[:3])} got lost in the export; please report this")
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        difference = max(_difference(session, model, batch, input_size) for batch in (1, 3))
        if not difference <= tolerance:
            raise RuntimeError(
                f"{path}: onnxruntime and torch differ by {difference:.2g} of the largest output, more than {tolerance:g}; the file was not written"
            )
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    return {"zeros": zeros, "difference": difference, "bytes": path.stat().st_size}


def _trace(model: nn.Module, images: Tensor, path: Path) -> None:
    """``torch.onnx.export`` by its tracer, whose graph is the one that sparse runtimes recognise."""
    try:
        with warnings.catch_warnings(), _PlainNorms():
            # The tracer warns of every shape that it turns into a constant; the checks of the file are what counts.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (images,),
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=["input"],
                output_names=["output"],
                dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
            )
    except Exception as error:  # of the tracer, or of the model while it is traced
        raise RuntimeError(f"the model cannot be written as ONNX (opset {OPSET}): {describe(error)}") from error


class _PlainNorms(TorchFunctionMode):
    """``rms_norm``, which the tracer does not know, as the products and the root that it is made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_rms_norm if func in (torch.rms_norm, F.rms_norm) else func)(*args, **(kwargs or {}))


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    small = torch.finfo(input.dtype).eps if eps is None else eps
    normed = input * torch.rsqrt(input.square().mean(dims, keepdim=True) + small)
    return normed if weight is None else normed * weight


def _unfuse_attention(model: nn.Module) -> None:
    """timm's attention in plain products: the fused operator has no form that every runtime knows."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def _lost_zeros(graph: Any, model: nn.Module) -> list[str]:
    """The prunable weights whose zeros no initializer has all. By place: matrices are transposed and renamed, equal ones stored once, BatchNorm is folded."""
    from onnx import numpy_helper

    by_shape: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for item in graph.graph.initializer:
        zero = numpy_helper.to_array(item) == 0
        by_shape[zero.shape].append(zero)
        if zero.ndim == 2:
            by_shape[zero.T.shape].append(zero.T)
    # ONNX orders the gates of recurrent layers in another way.
    weights = {f.name: f for f in linear_weights(model).values() if not isinstance(f.layer, nn.RNNBase)}
    masks = {name: (w.detach() == 0).numpy() for name, w in prunable_weights(model).items() if name in weights}
    return [name for name, m in masks.items() if not any(bool(zero[m].all()) for zero in by_shape[m.shape])]


@torch.no_grad()
def _difference(session: Any, model: nn.Module, batch: int, input_size: Sequence[int]) -> float:
    x = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(batch))
    theirs, ours = torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), model(x)
    return float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12))


def two_of_four(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Names of the ``Linear`` layers that sparse tensor cores can run as 2:4, and of the other pruned layers why they cannot.

    Needed: at most two of each four consecutive inputs, and whole tiles (outputs a multiple of 32, inputs of 64).
    """
    fit: list[str] = []
    unfit: dict[str, str] = {}
    for found in linear_weights(model).values():
        name, _, attribute = found.name.rpartition(".")
        weight = found.layer.get_parameter(attribute).detach()
        if not bool((weight == 0).any()):
            continue
        if not isinstance(found.layer, nn.Linear):
            unfit[name] = f"of a {type(found.layer).__name__}, for which torch has no 2:4 kernel"
        elif weight.shape[0] % TILE[0] or weight.shape[1] % TILE[1]:
            unfit[name] = f"{weight.shape[0]}×{weight.shape[1]} is no multiple of {TILE[0]}×{TILE[1]}"
        else:
            kept = (weight != 0).unflatten(1, (-1, 4)).sum(dim=2)
            broken = int((kept > 2).sum())
            if broken:
                unfit[name] = f"{broken:,} of {kept.numel():,} groups of four keep more than two weights"
            else:
                fit.append(name)
    return fit, unfit


def to_semi_structured(model: nn.Module, tolerance: float = 1e-2) -> list[str]:
    """Replace, in place, the weights of every 2:4 ``Linear`` by ``torch.sparse.to_sparse_semi_structured``, each checked against its dense product.

    Args:
        model: float16 or bfloat16, on a GPU with sparse tensor cores (compute capability 8.0 or more).
        tolerance: largest difference of a product, relative to its largest value.

    Returns:
        The layers that were converted, those of :func:`two_of_four`; the others stay dense.

    Raises:
        RuntimeError: not on such a GPU, or a product differs.
        ValueError: no layer is 2:4, or the weights are of another type.
    """
    fit, unfit = two_of_four(model)
    if not fit:
        some = "; ".join(f"{name}: {why}" for name, why in list(unfit.items())[:3])
        raise ValueError(
            f"no Linear layer of this model has 2:4 weights ({some or 'there are no zeros'}): prune with mask_type='2:4' first"
        )
    for name in fit:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight").detach()
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise RuntimeError(
                f"2:4 weights need a GPU with sparse tensor cores (compute capability 8.0 or more); {name} is on {weight.device}"
            )
        if weight.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"2:4 weights are float16 or bfloat16, {name} is {weight.dtype}: model.half() first")
        x = torch.randn(64, weight.shape[1], device=weight.device, dtype=weight.dtype)
        dense = x @ weight.mT
        sparse = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
        difference = float((nn.functional.linear(x, sparse) - dense).abs().max() / dense.abs().max())
        if not difference <= tolerance:
            raise RuntimeError(
                f"{name}: the 2:4 product differs from the dense one by {difference:.2g} of its largest value"
            )
        layer.weight = sparse
    return fit


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all linear layers, by name."""
    return {
        found.name: found.layer.get_parameter(found.name.rpartition(".")[2]) for found in linear_weights(model).values()
    }


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Make a dense twin, in place: random values for the zeros of the weights of linear layers, as large as the others. For speed as good as any."""
    generator = torch.Generator().manual_seed(0)
    for weight in prunable_weights(model).values():
        zero = weight == 0
        spread = float(weight[~zero].square().mean().sqrt()) if not bool(zero.all()) else 0.02
        weight[zero] = spread * torch.randn(int(zero.sum()), generator=generator)


def load_pruned(model: str, kwargs: Mapping[str, Any], checkpoint: str | Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A timm model with the weights of ``checkpoint`` (smaller, if that was written by ``capruner shrink``), and its input size.

    Raises:
        ValueError: timm has no such model, or the weights do not fit it.
        FileNotFoundError: no such checkpoint.
    """
    from capruner.report.architecture import build, input_size
    from capruner.report.checkpoint import load_weights
    from capruner.shrinking.result import is_shrunk, load_shrunk

    network = build(model, kwargs)
    if is_shrunk(checkpoint):
        return load_shrunk(checkpoint, network), input_size(network)
    load_weights(network, checkpoint, model)
    return network, input_size(network)
