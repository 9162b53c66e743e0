"""What gradients cannot be used for: NaN and Inf in data, losses and gradients, and gradients that are all zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from capruner.batches import BatchError
from capruner.distributed import Partition

_LOGGER = logging.getLogger(__name__)

NO_GRADIENT = (
    "every gradient of the calibration is exactly 0, so that it says nothing about any weight. Is the loss constant? cross_entropy of a model with one "
    "output is always 0 (use mse_loss or binary_cross_entropy_with_logits), a contrastive loss of single samples too (use gradients='batch'), and a "
    "rounded, clamped or half-precision loss can be"
)


class BadBatchError(BatchError):
    """Data, loss or gradient of a batch hold NaN or Inf; the message says which, and names the batch."""


def check_loss(loss: Tensor, index: int, inputs: Any, targets: Any) -> None:
    """The loss, and the data that it came from: an infinite input can hide behind a finite loss."""
    value = float(loss.detach().sum())
    if math.isfinite(value) and all(_finite(t) for t in floats((inputs, targets))):
        return
    found = [w for w, v in (("inputs", inputs), ("targets", targets)) if not all(_all_finite(t) for t in floats(v))]
    data = f"its {' and '.join(found)} hold NaN or Inf"
    if not math.isfinite(value):
        cause = data if found else "look at that batch's data, or at the model's weights"
        raise BadBatchError(f"the loss of batch {index} is {value}: {cause}")
    if found:
        raise BadBatchError(f"batch {index} is bad: {data}, although its loss is finite")


def floats(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _finite(tensor: Tensor) -> bool:
    # One pass: a sum of finite numbers is finite unless it overflows.
    return math.isfinite(float(tensor.detach().sum()))


def checked(slab: dict[str, Tensor], batches: Sequence[int]) -> dict[str, Tensor]:
    """``slab``, if its gradients are finite; ``batches`` says from which batch each of them is."""
    for name, rows in slab.items():
        if _finite(rows):
            continue
        bad = (~torch.isfinite(rows)).reshape(len(rows), -1).any(dim=1).nonzero()
        if len(bad):
            raise BadBatchError(
                f"the gradient of {name} holds NaN or Inf in batch {batches[int(bad[0])]}: look at the data, or at the model's weights"
            )
    return slab


def check_heard(silent: Sequence[str], partition: Partition, noted: list[str], whole: bool) -> None:
    """Warn about layers whose gradients are all zero, and note them.

    Args:
        silent: layers of which this process owns blocks, all of whose gradients were zero.
        noted: names are appended to it.
        whole: the layers of ``partition`` are all there are.

    Raises:
        ValueError: every gradient of all layers is zero.
    """
    processes = partition.processes
    if not processes.any(bool(silent)):
        return
    heard = {name for name in partition.layouts if partition.count(name) and name not in silent}
    names = [name for name in partition.layouts if not processes.any(name in heard)]
    noted += [name for name in names if name not in noted]
    if whole and len(names) == len(partition.layouts):
        raise ValueError(NO_GRADIENT)
    if names:
        _LOGGER.warning(
            "every gradient of %s is exactly 0, so that these weights are pruned by magnitude alone: they do not influence the loss on the "
            "calibration data. Look at the loss and the data, or leave them out of `params`",
            ", ".join(names),
        )
