"""The best weights for a given mask, for many blocks of weights that share one Fisher matrix.

Each block has a mask of its own, so each would need a factor of its own, ``O(B³)``. Conjugate gradients need products with the shared matrix only, and take
the blocks together: ``O(n B²)`` for an iteration of ``n`` blocks, in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ITERATIONS = 12
"""A fixed number, so that rounding does not decide when to stop."""


def refit(
    dense: Tensor,
    start: Tensor,
    gone: Tensor,
    times_fisher: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    scales: Tensor,
) -> tuple[Tensor, float]:
    """Minimise ``½ Σ_b s_b d_bᵀ F d_b`` over the changes ``d = w − dense`` with ``w = 0`` where a weight is gone.

    Args:
        dense: ``(B, n)``, a column for each block; padding is 0.
        start: ``(B, n)``, where the search begins.
        gone: ``(B, n)`` bool; padding, too.
        times_fisher: ``F X`` of ``X (B, n)``.
        diagonal: of ``F``, ``(B, n)`` or ``(B, 1)``: the preconditioner.
        scales: ``(n,)``, the positive ``s_b``.

    Returns:
        Weights ``(B, n)`` and the loss.
    """
    change = start.masked_fill(gone, 0) - dense
    residual = -times_fisher(change).masked_fill_(gone, 0)
    direction = residual / diagonal
    slope = (residual * direction).sum(dim=0)
    for _ in range(ITERATIONS):
        pushed = times_fisher(direction)
        curvature = (direction * pushed).sum(dim=0)
        step = torch.where(curvature > 0, slope / curvature, 0)
        change.addcmul_(direction, step)
        residual.addcmul_(pushed.masked_fill_(gone, 0), step, value=-1)
        conditioned = residual / diagonal
        steeper = (residual * conditioned).sum(dim=0)
        direction.mul_(torch.where(slope > 0, steeper / slope, 0)).add_(conditioned)
        slope = steeper
    loss = float(scales.double() @ (change * times_fisher(change)).sum(dim=0, dtype=torch.float64)) / 2
    return (dense + change).masked_fill_(gone, 0), loss
