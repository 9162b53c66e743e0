"""What pruning does to a network's outputs, measured: the quantity that predicted losses approximate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from capruner.batches import BatchFunction
from capruner.checks import check_count, check_model
from capruner.distributed import processes
from capruner.models.modes import eval_mode, random_state_kept, weights_restored
from capruner.models.wrappers import unwrap
from capruner.refine.distill import inputs_of
from capruner.refine.training import log_probabilities
from capruner.result import PruningResult

SAMPLES = 512
"""Samples, of all processes together, that the divergence is measured on."""


@torch.no_grad()
def measure_divergence(
    result: PruningResult,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = SAMPLES,
    batch_fn: BatchFunction | None = None,
) -> dict[float, float]:
    """Measure the Kullback-Leibler divergence of each level's class probabilities from those of the dense network, in nats per sample.

    Stored as ``divergence`` of the levels, beside the predicted losses, which approximate it where labels follow the model's own probabilities. Costs a
    forward pass of the samples for each level. The model is restored.

    Args:
        result: of :func:`capruner.prune` or :meth:`CalibratedModel.solve`.
        model: dense; its outputs are logits ``(batch, classes)``, or have them as ``.logits``.
        batches, batch_fn: as for :func:`capruner.prune`; targets are not used.
        samples: stop after the batch with which there are that many, of all processes together.

    Returns:
        The divergence by sparsity.

    Raises:
        ValueError: no batches, outputs that are not logits, or a model that does not fit the result.
    """
    check_model(model)
    check_count("samples", samples)
    model, everybody = unwrap(model), processes()
    device = next(model.parameters()).device
    dense = [p.detach().clone() for p in model.parameters()]
    sums, count = [0.0] * len(result.levels), 0
    with everybody.together("measuring the divergence"), random_state_kept(), weights_restored(model), eval_mode(model):
        for inputs in inputs_of(batches, batch_fn):
            for p, value in zip(model.parameters(), dense, strict=True):
                p.copy_(value)
            target = log_probabilities(model, inputs, device)
            for index, level in enumerate(result.levels):
                result.apply(model, level.sparsity)
                found = log_probabilities(model, inputs, device)
                sums[index] += float(F.kl_div(found, target, log_target=True, reduction="sum"))
            count += len(target)
            if count * everybody.world_size >= samples:
                break
        if not count:
            raise ValueError("batches is empty: there is nothing to measure the divergence on")
    total = everybody.sum(count)
    result.levels = [level.measured(everybody.sum(value) / total) for level, value in zip(result.levels, sums)]
    return {level.sparsity: level.divergence or 0.0 for level in result.levels}
