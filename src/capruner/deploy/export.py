"""Export to ONNX and MNN, checked against torch."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from capruner.cli.arguments import describe
from capruner.deploy import mnn
from capruner.deploy.engines import load_onnxruntime
from capruner.deploy.graphs import write_metadata
from capruner.files import replacing
from capruner.models.weights import linear_weights
from capruner.models.wrappers import unwrap

OPSET = 16
"""The newest that DeepSparse runs well: from 17 on LayerNorm is one operator, and a ViT-Small at 90 % takes 1.5 times as long."""

Outputs = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """What was checked.

    Attributes:
        zeros: of matrices and kernels.
        difference: largest difference from torch's outputs, relative to the largest output.
        bytes: size of the file.
    """

    zeros: int
    difference: float
    bytes: int


def to_onnx(
    model: nn.Module,
    path: str | Path,
    input_size: Sequence[int],
    metadata: Mapping[str, str] | None = None,
    tolerance: float = 1e-3,
) -> Exported:
    """Write ``model`` as ONNX with a dynamic batch, and compare onnxruntime's outputs with torch's at batches of 1 and 3.

    Args:
        model: one input ``(batch, *input_size)``, one output tensor.
        path: the file; it appears only when the checks have passed.
        input_size: ``(channels, height, width)``.
        metadata: properties of the file, for example the preprocessing.
        tolerance: largest relative difference allowed.

    Raises:
        RuntimeError: outputs differ, zeros got lost, or the model cannot be traced.
        ValueError: the model does not accept such an input.
        ModuleNotFoundError: onnx or onnxruntime is not installed (``pip install capruner[export]``).
    """
    import onnx

    path = Path(path)
    model = copy.deepcopy(unwrap(model)).cpu().float().eval()
    _unfuse_attention(model)
    images = torch.randn(2, *input_size)
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # architectures raise anything for inputs that they do not support
        raise ValueError(
            f"the model does not accept images of {tuple(input_size)}: {describe(error)}; "
            "transformers are built for one size, --model-kwargs img_size=N"
        ) from error
    with replacing(path) as partial:
        _trace(model, images, partial)
        lost = _lost_zeros(onnx.load(str(partial)), model)
        if lost:
            raise RuntimeError(f"{path}: the export lost zeros of {', '.join(lost[:3])}; please report this")
        write_metadata(partial, metadata or {})
        outputs = load_onnxruntime({"file": str(partial), "threads": torch.get_num_threads()})
        difference = _check("onnxruntime", outputs, model, input_size, path, tolerance)
    return Exported(_zeros(model), difference, path.stat().st_size)


def to_mnn(model: nn.Module, path: str | Path, input_size: Sequence[int], tolerance: float = 1e-3) -> Exported:
    """Write ``model`` for MNN, by way of ONNX; compare MNN's outputs with torch's at batches of 1 and 3. Arguments and errors as for :func:`to_onnx`.

    Raises:
        RuntimeError: MNN does not support the model, too.
        ModuleNotFoundError: MNN is not installed (``pip install capruner[mnn]``).
    """
    path = Path(path)
    model = copy.deepcopy(unwrap(model)).cpu().float().eval()
    with tempfile.TemporaryDirectory(prefix="capruner-mnn-") as folder, replacing(path) as partial:
        graph = Path(folder) / "model.onnx"
        to_onnx(model, graph, input_size, tolerance=tolerance)
        outputs = mnn.load(mnn.convert(graph, partial), torch.get_num_threads())
        difference = _check("MNN", outputs, model, input_size, path, tolerance)
    return Exported(_zeros(model), difference, path.stat().st_size)


def _trace(model: nn.Module, images: Tensor, path: Path) -> None:
    """``torch.onnx.export`` by its tracer, whose graph sparse runtimes recognise."""
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
    """Decompose ``rms_norm``, which the tracer does not support, into products and a root."""

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
    """Compute timm's attention by plain products: not every runtime supports the fused operator."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]


def _lost_zeros(graph: Any, model: nn.Module) -> list[str]:
    """Names of the prunable weights whose zeros are in no initializer.

    Compared by position: matrices are transposed and renamed, equal ones stored once, BatchNorm is folded.
    """
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


def _zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


@torch.no_grad()
def _check(
    engine: str, outputs: Outputs, model: nn.Module, input_size: Sequence[int], path: Path, tolerance: float
) -> float:
    """Largest relative difference between an engine's outputs and the model's; raise ``RuntimeError`` if it exceeds ``tolerance``."""
    differences = []
    for batch in (1, 3):
        x = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(batch))
        theirs, ours = torch.from_numpy(outputs(x.numpy())), model(x)
        differences.append(float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)))
    if not max(differences) <= tolerance:
        raise RuntimeError(
            f"{path}: {engine} and torch differ by {max(differences):.2g} of the largest output, more than {tolerance:g}; the file was not written"
        )
    return max(differences)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all linear layers, by name."""
    return {
        linear.name: linear.layer.get_parameter(linear.name.rpartition(".")[2])
        for linear in linear_weights(model).values()
    }


@torch.no_grad()
def fill_zeros(model: nn.Module) -> None:
    """Make a dense twin for benchmarks, in place: random values for the zeros of linear layers, as large as their other values."""
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
