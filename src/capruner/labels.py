"""Labels drawn from the model itself: the Fisher matrix, not the empirical one, and no labelled data needed.

The Fisher matrix is the mean of ``g gᵀ`` over labels drawn from the model's own distribution ``p(y | x)``; it equals the Gauss-Newton matrix of the
cross-entropy. The empirical Fisher matrix takes the labels of the data instead. The two part where the model is sure of its labels, as it is after training:
gradients to the data's labels then nearly vanish, and what is left of them says little about curvature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from capruner.distributed import world
from capruner.gradients import LossFunction, ModelInputs


def drawn_labels(
    batches: Iterable[tuple[Any, Any]], loss_fn: LossFunction, seed: int = 0
) -> tuple[Iterable[tuple[Any, Any]], LossFunction]:
    """``batches`` and ``loss_fn`` with labels from the model in the place of the data's.

    A label needs the model's outputs, which the loss sees. So the batches carry uniform random numbers instead of labels, and the loss turns each
    into the class at that place of the cumulative distribution. Draws depend on the seed and on the batch's number alone.

    Args:
        batches: ``(inputs, targets)``; the targets are not looked at.
        loss_fn: of logits ``(batch, classes)`` and int64 labels ``(batch,)``.

    Raises:
        ValueError: on iteration, from the loss: outputs that are not logits.
    """

    def loss(outputs: Any, chances: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"labels='model' draws classes from logits (batch, classes), and the model gave {shape}; use labels='data'"
            )
        cumulative = outputs.detach().double().softmax(dim=1).cumsum(dim=1)
        drawn = (cumulative < chances[:, None]).sum(dim=1).clamp(max=outputs.shape[1] - 1)
        return loss_fn(outputs, drawn)

    numbered = _Chances(batches, seed)
    return (iter(numbered) if isinstance(batches, Iterator) else numbered), loss


class _Chances:
    def __init__(self, batches: Iterable[Any], seed: int) -> None:
        self.batches, self.seed = batches, seed

    def __iter__(self) -> Iterator[Any]:
        rank, size = world()
        for index, batch in enumerate(self.batches):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                yield batch  # for the caller to refuse
                continue
            inputs = batch[0].args if isinstance(batch[0], ModelInputs) else batch[0]
            count = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            # The number that this batch has among those of all processes, which share out one stream.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index * size + rank)
            yield batch[0], torch.rand(count, generator=generator, dtype=torch.float64)
