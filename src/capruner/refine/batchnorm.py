"""Re-estimate BatchNorm statistics after pruning, which has changed the activations they describe."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from capruner.batches import BatchFunction, as_batch, call_model, failing, own_copy
from capruner.models.modes import eval_mode
from capruner.models.wrappers import unwrap


@torch.no_grad()
def recalibrate_bn(
    model: nn.Module, batches: Iterable[Any], num_batches: int = 64, *, batch_fn: BatchFunction | None = None
) -> int:
    """Re-estimate the running mean and variance of every BatchNorm layer, as the plain average over ``num_batches`` forward passes.

    Only BatchNorm layers are in training mode meanwhile; dropout and stochastic depth are off. Weights do not change, modes and momenta are restored.
    Report the accuracy after it beside the accuracy before: it is a second, cheap repair, and not part of pruning.

    Args:
        batches: as for :func:`capruner.prune`; targets are not used.
        num_batches: the largest number of batches to draw.
        batch_fn: as for :func:`capruner.prune`.

    Returns:
        Number of BatchNorm layers; if 0, nothing was done.

    Raises:
        ValueError: ``num_batches`` is not positive, ``batches`` is empty, or the model fails on a batch. The statistics are then unchanged.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    model = unwrap(model)
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    device = next(model.parameters()).device
    momenta = [layer.momentum for layer in layers]
    drawn = 0
    with eval_mode(model):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # in torch this means a cumulative average
                layer.train()
            for batch in itertools.islice(batches, num_batches):
                inputs = as_batch(batch, drawn, batch_fn)[0]
                with failing("the model", drawn, inputs=inputs):
                    call_model(model, own_copy(inputs, device))
                drawn += 1
        finally:
            for layer, momentum in zip(layers, momenta):
                layer.momentum = momentum
        if not drawn:
            raise ValueError("no batch came out of the data for BatchNorm recalibration")
        estimates = [{n: buffer.clone() for n, buffer in layer.named_buffers(recurse=False)} for layer in layers]
    for layer, estimate in zip(layers, estimates):
        for name, buffer in layer.named_buffers(recurse=False):
            buffer.copy_(estimate[name])
    return len(layers)
