"""What a saved run is recognised by, and how its outcomes become tensors of a file and back. The files are :mod:`capruner.state`'s."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from capruner.methods import Settings
from capruner.result import Level


def fingerprint(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], settings: Settings, kept: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What a saved state has to agree with, besides the arguments. Where the work is done makes no difference."""
    knobs = {
        k: v for k, v in asdict(settings).items() if k not in ("blocks_in_parallel", "fisher_inv_device", "pattern")
    }
    found = {"weights": hashlib.sha256(), "masks": hashlib.sha256()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found["weights"].update(name.encode())
        found["weights"].update(tensor_bytes(tensor))
    for mask in kept.values():
        found["masks"].update(tensor_bytes(mask))
    shapes = {name: [str(p.dtype), *p.shape] for name, p in parameters.items()}
    return knobs | {"parameters": shapes} | {key: value.hexdigest() for key, value in found.items()}


def packed(levels: Sequence[Level]) -> dict[str, Tensor]:
    """Levels as the tensors of one file."""
    found = {}
    for index, level in enumerate(levels):
        for name, weight in level.weights.items():
            found[f"{index}/weight/{name}"] = weight
            found[f"{index}/mask/{name}"] = level.masks[name]
            found[f"{index}/loss/{name}"] = torch.tensor(level.losses[name], dtype=torch.float64)
    return found


def unpacked(tensors: Mapping[str, Tensor], index: int, sparsity: float, parameters: Mapping[str, Tensor]) -> Level:
    """The inverse of :func:`packed`, for the layers of one calibration."""
    weights, masks, losses = {}, {}, {}
    for name, p in parameters.items():
        weights[name] = tensors[f"{index}/weight/{name}"].to(p).view(p.shape)
        masks[name] = tensors[f"{index}/mask/{name}"].to(p.device, torch.bool).view(p.shape)
        losses[name] = float(tensors[f"{index}/loss/{name}"])
    return Level(sparsity, weights, masks, losses)


def digest_of(batch: Any) -> str:
    """Of the values of a batch's tensors."""
    found = hashlib.sha256()
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            found.update(tensor_bytes(leaf))
    return found.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """A buffer of a tensor's values."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
