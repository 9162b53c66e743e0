"""Labels drawn from the model itself: the Fisher matrix, not the empirical one, and no labelled data needed.

The Fisher matrix is the mean of ``g gᵀ`` over labels drawn from the model's own distribution ``p(y | x)``; it equals the Gauss-Newton matrix of the
cross-entropy. The empirical Fisher matrix takes the labels of the data instead. The two part where the model is sure of its labels, as it is after training:
gradients to the data's labels then nearly vanish, and what is left of them says little about curvature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capruner.batches import BatchError, batch_size, describe, logits_of
from capruner.distributed import world
from capruner.gradients import LossFunction


def loss_of_model_labels(loss_fn: LossFunction) -> LossFunction:
    """``loss_fn`` with labels drawn from the outputs, by the uniform random numbers of :class:`Chances` that come as targets.

    A label needs the model's outputs, which only the loss sees. It turns each random number into the class at that place of the cumulative distribution.

    Args:
        loss_fn: of logits ``(batch, classes)`` and int64 labels ``(batch,)``.
    """

    def loss(outputs: Any, chances: Tensor) -> Tensor:
        logits = logits_of(outputs)
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
            raise BatchError(
                f"labels='model' draws classes from logits (batch, classes), and the model gave {describe(outputs)}; use labels='data'"
            )
        cumulative = logits.detach().double().softmax(dim=1).cumsum(dim=1)
        drawn = (cumulative < chances[:, None]).sum(dim=1).clamp(max=logits.shape[1] - 1)
        return loss_fn(logits, drawn)

    return loss


@dataclass(frozen=True)
class Chances:
    """Uniform random numbers for the samples of a batch. They depend on the seed and on the batch's number alone."""

    seed: int = 0

    def __call__(self, index: int, inputs: Any) -> Tensor:
        rank, size = world()
        # The number that this batch has among those of all processes, which share out one stream.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index * size + rank)
        return torch.rand(batch_size(inputs, index), generator=generator, dtype=torch.float64)
