"""Weights in a file, read without running any code of the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_HOLDERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
)  # where training scripts put them; timm looks in this order too


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """``{name: tensor}`` of a safetensors file, or of a ``torch.save`` file that holds nothing but tensors and plain values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither of these, damaged, or without weights.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give one of the checkpoints in it, checkpoints/*.safetensors say")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    except Exception as error:  # torch's reader trips over damaged files in a dozen ways
        raise ValueError(
            f"{path} is damaged, or holds more than tensors; only safetensors, and what torch.load reads with weights_only=True, are opened here"
        ) from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in _HOLDERS if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no weights under any name that timm looks for: {', '.join(_HOLDERS)}")
    return {str(name).removeprefix("module."): value for name, value in found.items() if isinstance(value, Tensor)}


def layer_rows(weights: Mapping[str, Tensor], names: Iterable[str]) -> list[dict[str, Any]]:
    """One row per parameter in ``names``: name, shape, numel, zeros, sparsity."""
    rows = []
    for name in names:
        weight = weights[name]
        zeros = int((weight == 0).sum())
        row = {"name": name, "shape": tuple(weight.shape), "numel": weight.numel(), "zeros": zeros}
        rows.append(row | {"sparsity": zeros / weight.numel()})
    return rows
