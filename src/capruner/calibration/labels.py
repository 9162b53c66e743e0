"""The Fisher matrix of the model's own output distribution, which needs no labels and is less noisy than with those of the data.

The Fisher matrix is the mean of ``g gᵀ`` over labels drawn from the model's distribution ``p(y | x)``; for the cross-entropy it equals the Gauss-Newton matrix.
The empirical Fisher matrix uses the labels of the data instead. The two differ where the model is confident, as it is after training: gradients for
the labels of the data then nearly vanish, except for the few misclassified samples, and say little about curvature.

A drawn label gives an unbiased but noisy estimate of that mean: a confident model nearly always draws the same class. For the cross-entropy
all classes ``c`` are weighted at once instead: the gradient of ``Σ_c ε_c √p_c ℓ(z, c)`` with ``E[ε εᵀ] = I`` has the outer product

    E[g gᵀ] = Σ_c p_c ∇ℓ(z, c) ∇ℓ(z, c)ᵀ,

the Fisher matrix again. ``ε_c = √2 cos(2π (c + 1) u)`` needs a single uniform random number ``u`` per sample: cosines of different
frequencies are orthonormal.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.batches import BatchError, batch_size, default_loss, describe, logits_of
from capruner.calibration.gradients import LossFunction
from capruner.distributed import processes

Labels = Literal["data", "model"]


def loss_of_model_labels(loss_fn: LossFunction) -> LossFunction:
    """A loss whose gradients estimate the Fisher matrix of ``loss_fn``; its targets are the uniform random numbers of :func:`draw_uniform`.

    For cross-entropy without weights or smoothing all classes are weighted at once, see the module's docstring. For any other loss each random number
    selects a class from the cumulative distribution of the model's outputs.

    Args:
        loss_fn: of logits ``(batch, classes)`` and int64 labels ``(batch,)``.
    """

    def loss(outputs: Any, chances: Tensor) -> Tensor:
        logits = logits_of(outputs)
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
            raise BatchError(
                f"labels='model' draws classes from logits (batch, classes), and the model gave {describe(outputs)}; use labels='data'"
            )
        if is_cross_entropy(loss_fn):
            return _of_all_classes(logits, chances)
        cumulative = logits.detach().double().softmax(dim=1).cumsum(dim=1)
        drawn = (cumulative < chances[:, None]).sum(dim=1).clamp(max=logits.shape[1] - 1)
        return loss_fn(logits, drawn)

    return loss


def is_cross_entropy(loss_fn: LossFunction) -> bool:
    """Whether a loss is the plain cross-entropy of logits and labels."""
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        return loss_fn.weight is None and loss_fn.label_smoothing == 0 and loss_fn.reduction == "mean"
    return loss_fn in (F.cross_entropy, default_loss)


def _of_all_classes(logits: Tensor, chances: Tensor) -> Tensor:
    """Mean over samples of ``Σ_c ε_c √p_c (−log p_c)``; the weights ``ε_c √p_c`` are constants."""
    log_p = logits.log_softmax(dim=1)
    frequencies = torch.arange(1, logits.shape[1] + 1, device=chances.device, dtype=chances.dtype)
    signs = 2**0.5 * torch.cos(2 * math.pi * chances[:, None] * frequencies)
    return -(signs.to(log_p) * (log_p.detach() / 2).exp() * log_p).sum(dim=1).mean()


def draw_uniform(index: int, inputs: Any, seed: int = 0) -> Tensor:
    """Uniform random numbers for the samples of batch number ``index``, in place of its targets."""
    everybody = processes()
    # The number of this batch in the stream that all processes share.
    number = index * everybody.world_size + everybody.rank
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return torch.rand(batch_size(inputs, index), generator=generator, dtype=torch.float64)
