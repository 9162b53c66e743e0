"""Counts of zeros, and rows about layers: the same keys in results, reports, summaries and logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def zero_share(tensors: Iterable[Tensor]) -> float:
    """Share of the entries of weights that are exactly 0, or of masks that are False."""
    counts = [(int((tensor.detach() == 0).sum()), tensor.numel()) for tensor in tensors]
    return sum(zeros for zeros, _ in counts) / sum(numel for _, numel in counts)


def layer_row(name: str, keep: Tensor) -> dict[str, Any]:
    """``name, shape, numel, zeros, sparsity`` of a mask, True = keep."""
    zeros, numel = int((~keep).sum()), keep.numel()
    return {"name": name, "shape": tuple(keep.shape), "numel": numel, "zeros": zeros, "sparsity": zeros / numel}


def mask_rows(masks: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row per mask."""
    return [layer_row(name, mask) for name, mask in masks.items()]


def weight_rows(weights: Mapping[str, Tensor], names: Iterable[str]) -> list[dict[str, Any]]:
    """One row per parameter in ``names``; a weight that is exactly 0 counts as pruned."""
    return [layer_row(name, weights[name] != 0) for name in names]
