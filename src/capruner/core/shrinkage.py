"""Shrinkage of the Fisher blocks of a layer towards the matrix that they have in common.

A block of ``B`` weights has ``B (B + 1) / 2`` second moments, and few gradients estimate them badly: directions that no gradient has seen look free, and
a greedy elimination goes just there. But the neurons of a layer all see the same inputs, so that their blocks are alike up to a scale (the assumption of
K-FAC, Martens and Grosse 2015). The average ``C`` over the blocks of a layer is known from all gradients of all neurons, and each block becomes

    F ← (1 − α) F + α t C / tr C,        t = tr F.

The share ``α`` is the one of Ledoit and Wolf (2004), which minimises the expected squared error: the variance of ``F`` over its squared distance from the
target. For ``m`` gradients ``g``

    α = min(1, (mean ‖g‖⁴ − ‖F‖²) / (m − 1) / ‖F − t C / tr C‖²),

which needs no second matrix and no held-out data, nears 1 for few gradients and falls as ``1/m`` for many. Norms are Frobenius norms. Half of it is taken
(``TRUST``): the squared error of ``F`` is dominated by its large eigenvalues, and elimination by the small ones, which a small share already mends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capruner.core.blocks import BlockLayout

TRUST = 0.5
"""Part of Ledoit and Wolf's share that is taken; see above."""


def phases(layout: BlockLayout) -> int:
    """Number of blocks after which the inputs of a layer repeat: blocks that hold the same part of each row are averaged with each other."""
    row = layout.numel // layout.shape[0]
    return row // layout.block_size if row > layout.block_size and row % layout.block_size == 0 else 1


def shrink(
    F: Tensor,
    common: Tensor,
    phase_of: Tensor,
    gone: Tensor | None,
    share: float | None,
    fourth: Tensor,
    trace: Tensor,
    num_grads: int,
) -> Tensor:
    """Shrink some blocks in place.

    Args:
        F: ``(n, B, B)`` float64, 0 in rows and columns of ``gone`` weights.
        common: ``(phases, B, B)`` float64, ``C`` up to a scale.
        phase_of: ``(n,)`` int64.
        gone: ``(n, B)`` bool, padding and weights pruned earlier.
        share: ``α`` of all blocks; None: estimated for each.
        fourth: ``(n,)`` mean of ``‖g‖⁴``, the gradients of ``gone`` weights included.
        trace: ``(n,)`` trace of the blocks with ``gone`` weights.
        num_grads: ``m``.

    Returns:
        ``(n,)`` the share ``α`` of each block.
    """
    target = common[phase_of]
    if gone is not None:
        target.masked_fill_(gone[:, :, None] | gone[:, None, :], 0)
    remaining = F.diagonal(dim1=1, dim2=2).sum(dim=1)
    scale = target.diagonal(dim1=1, dim2=2).sum(dim=1)
    known = (scale > 0) & (remaining > 0)
    target *= torch.where(known, remaining / scale.where(known, 1), 0)[:, None, None]
    if share is None:
        # Of the gradients of the weights that remain, whose part of the squared norm is theirs of the trace.
        fourth = fourth * (remaining / trace.where(known, 1)) ** 2
        shares = estimated_share(F, target, fourth, num_grads)
    else:
        shares = torch.full_like(remaining, share)
    shares.masked_fill_(~known, 0)
    F.lerp_(target, shares[:, None, None])
    return shares


def estimated_share(F: Tensor, target: Tensor, fourth: Tensor, num_grads: int) -> Tensor:
    """``TRUST · α``, with ``α`` of Ledoit and Wolf, for ``(n, B, B)`` blocks of ``num_grads`` gradients, whose mean ``‖g‖⁴`` is ``fourth``; ``(n,)``."""
    if num_grads == 1:
        return torch.full_like(fourth, TRUST)
    # In units of each block's own size: the squares of tiny gradients' squares have no float64.
    size = torch.linalg.matrix_norm(F)
    unit = size.where(size > 0, 1)
    variance = (fourth / unit**2 - 1).clamp(min=0) / (num_grads - 1)
    distance = (torch.linalg.matrix_norm(F - target) / unit) ** 2
    return TRUST * torch.where(distance > 0, variance / distance.where(distance > 0, 1), 0).clamp(max=1)
