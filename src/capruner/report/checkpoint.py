"""Weights in a file, read without running any code of the file: the one reader of checkpoints for all commands and scripts."""

from __future__ import annotations

import argparse
import codecs
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from capruner.deploy.sparse_file import is_sparse, load_sparse
from capruner.files import read_header
from capruner.result import FORMAT as RESULT_FORMAT

_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts put the weights; timm looks in this order too."""
_WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before names, in either order."""
_SCALAR: Any = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    codecs.encode,
    *{type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")},
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (PosixPath, "pathlib.PosixPath"),
    (PosixPath, "pathlib._local.PosixPath"),
]
"""What timm's and others' training checkpoints hold beside tensors: arguments and a metric. Building them runs nothing."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """``{name: tensor}`` of a checkpoint: safetensors, :func:`capruner.save_sparse`, or ``torch.save`` of a state dict or of a training checkpoint like timm's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither of these, damaged, without weights, or a pruning result.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one of the checkpoints in it, such as checkpoints/*.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if is_result(path):
        raise ValueError(
            f"{path} is a pruning result, not a checkpoint: it holds masks and weights of several sparsities. "
            "capruner.load_result(path).apply(model, sparsity) puts one into a model; --save-model writes checkpoints"
        )
    if is_sparse(path):
        return load_sparse(path)
    if path.suffix.lower() in (".npz", ".npy"):
        raise ValueError(f"{path}: numpy checkpoints are not read; load it with timm and save model.state_dict()")
    try:
        if path.suffix == ".safetensors":
            return _unwrap_names(load_file(path))
        with torch.serialization.safe_globals(_HARMLESS):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    except Exception as error:  # torch's reader trips over damaged files in a dozen ways
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, plain values and arguments; only safetensors, and what torch.load reads with "
            "weights_only=True, are opened here"
        ) from error
    if isinstance(content, Mapping):
        content = next((content[key] for key in _HOLDERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no weights under any name that timm looks for: {', '.join(_HOLDERS)}")
    return _unwrap_names({str(name): value for name, value in content.items() if isinstance(value, Tensor)})


def load_weights(model: nn.Module, path: str | Path, name: str = "the model") -> None:
    """Load all weights of :func:`read_weights`, and no others, into ``model``; raise ``ValueError`` if they do not fit."""
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{path} does not fit {name}: {problems[0][:300] if problems else error}{more}") from error


def is_result(path: Path) -> bool:
    """Whether a file was written by :meth:`capruner.PruningResult.save`."""
    return read_header(path).get("format") == RESULT_FORMAT


def _unwrap_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    unwrapped = {}
    for name, value in weights.items():
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        unwrapped[name] = value
    return unwrapped
