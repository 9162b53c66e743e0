"""Small checkpoints: sparse tensors as a bit mask and their non-zero values, in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from capruner.bits import pack, unpack
from capruner.files import read_header, save_tensors
from capruner.models.wrappers import unwrap

FORMAT = "capruner-sparse"
_MASK, _VALUES = ".mask", ".values"


def save_sparse(
    weights: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    half: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Write a checkpoint in which zeros take one bit each; :func:`load_sparse` reads it back.

    Tensors that would not become smaller are stored as they are. Without ``half`` the values are exact.

    Args:
        weights: a model, or its state dict.
        path: the file, ``*.safetensors``.
        half: store the values of float32 and float64 tensors with two or more dimensions in float16.
        facts: JSON values about the checkpoint for the reports, for example ``top1``.

    Returns:
        Size of the file in bytes.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: with ``half``, a value exceeds float16's range.
    """
    state = unwrap(weights).state_dict() if isinstance(weights, nn.Module) else weights
    stored: dict[str, Tensor] = {}
    index = {}
    for name, tensor in state.items():
        if half and _halves(tensor) and not torch.equal(tensor.half().isinf(), tensor.isinf()):
            largest = float(tensor.abs().max())
            raise ValueError(f"{name} holds values up to {largest:g}, more than float16 can represent; leave half out")
        stored |= _pack(name, tensor.detach().cpu(), half)
        index[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    header = {"format": FORMAT, "version": 1, "tensors": index, "facts": dict(facts or {})}
    save_tensors(path, stored, header)
    return Path(path).stat().st_size


def load_sparse(path: str | Path) -> dict[str, Tensor]:
    """Expand a file of :func:`save_sparse` to the state dict that it was made from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a sparse checkpoint of capruner.save_sparse")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            stored = {name: file.get_tensor(name) for name in names}
        return {name: _expand(name, entry, stored) for name, entry in header["tensors"].items()}
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def is_sparse(path: str | Path) -> bool:
    """Whether a file was written by :func:`save_sparse`."""
    return read_header(path).get("format") == FORMAT


def sparse_bytes(weights: Mapping[str, Tensor], half: bool = False) -> int:
    """Bytes of the tensors that :func:`save_sparse` would write; the header comes on top."""
    stored = [t for name, tensor in weights.items() for t in _pack(name, tensor.detach().cpu(), half).values()]
    return sum(t.numel() * t.element_size() for t in stored)


def _halves(tensor: Tensor) -> bool:
    return tensor.dim() > 1 and tensor.dtype in (torch.float32, torch.float64)


def _pack(name: str, tensor: Tensor, half: bool) -> dict[str, Tensor]:
    values = tensor.half() if half and _halves(tensor) else tensor
    mask = values != 0
    kept = values[mask]
    if tensor.numel() / 8 + kept.numel() * kept.element_size() < tensor.numel() * values.element_size():
        return {name + _MASK: pack(mask), name + _VALUES: kept}
    return {name: values.clone(memory_format=torch.contiguous_format)}


def _expand(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
    if name in stored:
        return stored[name].to(dtype).reshape(shape)
    mask, values = unpack(stored[name + _MASK], shape, name), stored[name + _VALUES]
    if values.shape != (int(mask.sum()),):
        raise ValueError(f"{name} has {values.numel()} values for {int(mask.sum())} bits")
    tensor = torch.zeros(shape, dtype=dtype)
    tensor[mask] = values.to(dtype)
    return tensor
