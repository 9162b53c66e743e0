"""Optimal Brain Surgeon on blocks: the order in which weights are pruned, and the re-fitted values of the others.

Both functions take the weights ``w`` of ``n`` independent blocks, ``(n, B)``, and the inverse Fisher blocks ``H``, ``(n, B, B)``, symmetric positive
definite. The inputs are never modified.

``eliminate`` is the greedy loop of CAP (arXiv 2210.09223, algorithm 1): until a block is exhausted,

    p = argmin_q w_q² / (2 H_qq);   w ← w − (w_p / H_pp) H[:, p];   H ← H − H[:, p] H[p, :] / H_pp.

This is a pivoted Cholesky factorisation of ``H`` whose pivot is the smallest saliency. It runs in panels. Inside a panel it is
left-looking: only the row of the pivot is updated. After a panel one matrix product updates what remains, which is then compacted.

``compensate`` computes the weights after any *set* ``S`` is pruned. The result does not depend on the order of elimination:

    w* = w − H[:, S] (H[S, S])⁻¹ w_S.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from capruner.core.factors import cholesky, permuted
from capruner.core.kernels import initial_bias, kernel_for
from capruner.core.numerics import NotPositiveDefiniteError, full_precision
from capruner.core.parallel import chunk_size, in_chunks

_LOGGER = logging.getLogger(__name__)

LIFTS = 3
"""How often the shift of an inverse block that does not factor may grow tenfold."""

PANEL = 32
"""Pivots per panel. 16 to 64 are equally fast on CPUs (``benchmarks/speed.py``)."""


@dataclass(frozen=True)
class Elimination:
    """The greedy elimination of ``n`` blocks.

    Attributes:
        order: ``(n, B)`` int64; position within the block of the weight pruned at each step. A permutation of ``0 … B−1``: weights that
            are never pruned (``frozen``, or beyond ``max_steps``) come last.
        losses: ``(n, B)`` in the dtype of the weights; increase of the loss at each step, ``w_p² / (2 H_pp)``; ``inf`` where no weight is pruned.
    """

    order: Tensor
    losses: Tensor

    def keep_mask(self, counts: Tensor) -> Tensor:
        """``(n, B)`` bool, True = keep, after the first ``counts`` (``(n,)`` integer) steps of each block."""
        steps = torch.arange(self.order.shape[1], device=self.order.device)
        stays = steps >= counts.to(self.order.device)[:, None]
        return torch.empty_like(stays).scatter_(1, self.order.long(), stays)


def check_blocks(weight: Tensor, fisher_inv: Tensor, **masks: Tensor | None) -> None:
    if weight.dim() != 2 or fisher_inv.shape != (*weight.shape, weight.shape[-1]):
        raise ValueError(
            f"expected weight (n, B) and fisher_inv (n, B, B), got {tuple(weight.shape)} and {tuple(fisher_inv.shape)}"
        )
    if not weight.is_floating_point() or weight.dtype != fisher_inv.dtype:
        raise ValueError(
            f"weight and fisher_inv must share a floating dtype, got {weight.dtype} and {fisher_inv.dtype}"
        )
    for name, mask in masks.items():
        if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise ValueError(
                f"{name} must be a bool tensor of shape {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or Inf")
    diagonal = fisher_inv.diagonal(dim1=1, dim2=2)
    bad = ~(torch.isfinite(diagonal) & (diagonal > 0)).all(dim=1)
    if bad.any():
        raise NotPositiveDefiniteError(
            f"fisher_inv has a diagonal entry that is not a positive number in {int(bad.sum())} of {len(bad)} blocks "
            f"(the first is block {int(bad.nonzero()[0])}); raise `damp`"
        )


@full_precision()
def eliminate(
    weight: Tensor,
    fisher_inv: Tensor,
    *,
    dead: Tensor | None = None,
    frozen: Tensor | None = None,
    n_m: tuple[int, int] | None = None,
    max_steps: int | None = None,
    blocks_in_parallel: int | None = None,
) -> Elimination:
    """Eliminate every weight of every block greedily, cheapest first.

    Args:
        weight: ``(n, B)`` float32 or float64.
        fisher_inv: ``(n, B, B)`` inverse Fisher blocks of the same dtype, symmetric positive definite.
        dead: ``(n, B)`` bool; weights pruned by an earlier mask. They come first, whatever their value, at loss ``-inf``, so that an allocation
            always takes them; their influence on the others is eliminated exactly.
        frozen: ``(n, B)`` bool; weights that are never pruned, such as padding.
        n_m: ``(N, M)``: of each ``M`` consecutive weights ``N`` remain; once a group has ``N`` left, its weights are no candidates.
        max_steps: stop after that many steps of each block.
        blocks_in_parallel: blocks processed at once; chosen from the block size if None. Does not change the result.

    Returns:
        The order and the loss of each step.

    Raises:
        ValueError: invalid shapes, dtypes or values; :class:`NotPositiveDefiniteError` if a diagonal entry is not positive.
    """
    check_blocks(weight, fisher_inv, dead=dead, frozen=frozen)
    n, B = weight.shape
    if n_m is not None and (B % n_m[1] or not 0 < n_m[0] < n_m[1]):
        raise ValueError(
            f"a block of {B} weights cannot hold {n_m[0]}:{n_m[1]} groups; M must divide fisher_block_size"
        )
    steps = B if max_steps is None else min(max(max_steps, 0), B)
    order = torch.empty(n, B, dtype=torch.int64, device=weight.device)
    losses = torch.full((n, B), torch.inf, dtype=weight.dtype, device=weight.device)
    chunk = chunk_size(blocks_in_parallel, B, weight.element_size(), weight.device)
    kernel = kernel_for(weight.device)
    eliminate_blocks = _eliminate_chunk if kernel is None else kernel.eliminate_blocks

    def work(part: slice) -> None:
        eliminate_blocks(
            weight[part],
            fisher_inv[part],
            None if dead is None else dead[part],
            None if frozen is None else frozen[part],
            n_m,
            steps,
            order[part],
            losses[part],
        )

    on_gpu = kernel is not None and weight.device.type != "cpu"  # that kernel takes all blocks and makes its own chunks
    in_chunks(n, n if on_gpu else chunk, work, "eliminating blocks", weight.device)
    return Elimination(order, losses)


def _eliminate_chunk(
    weight: Tensor,
    fisher_inv: Tensor,
    dead: Tensor | None,
    frozen: Tensor | None,
    n_m: tuple[int, int] | None,
    steps: int,
    order: Tensor,
    losses: Tensor,
) -> None:
    n, B = weight.shape
    blocks = torch.arange(n, device=weight.device)
    w, H = weight.clone(), fisher_inv
    diagonal = H.diagonal(dim1=1, dim2=2).clone()
    # Rounding error of a diagonal entry after many subtractions: below it the entry is noise and could be negative.
    floor = diagonal * torch.finfo(w.dtype).eps
    position = torch.arange(B, device=w.device).repeat(n, 1)  # of the remaining weights, within their block
    # `never` is recorded as a loss of inf; a bias of +inf means pruned already.
    never = torch.finfo(w.dtype).max
    bias = initial_bias(w, dead, frozen)
    room = None if n_m is None else torch.full((n, B // n_m[1]), n_m[1] - n_m[0], device=w.device)

    for start in range(0, steps, PANEL):
        width = min(PANEL, steps - start)
        left = w.shape[1]
        L = w.new_empty(n, width, left)
        pivots = position.new_empty(n, width)
        for k in range(width):
            saliency = (w * w).div_(diagonal).clamp_(max=never / 4).add_(bias)
            if n_m is not None:
                assert room is not None
                full = (room <= 0).gather(1, position // n_m[1]) & (bias == 0)
                saliency.masked_fill_(full, never)
            p = saliency.argmin(dim=1, keepdim=True)  # the first of equals: deterministic
            pivots[:, k : k + 1] = p
            losses[:, start + k] = saliency.gather(1, p)[:, 0] / 2
            row = H[blocks, p[:, 0]]
            if k:
                coefficients = L[blocks, :k, p[:, 0]]
                row = torch.baddbmm(row[:, None], coefficients[:, None], L[:, :k], alpha=-1)[:, 0]
            root = diagonal.gather(1, p).sqrt_()
            torch.div(row, root, out=L[:, k])
            row = L[:, k]
            w.addcmul_(row, w.gather(1, p).div_(root), value=-1)
            torch.maximum(diagonal.addcmul_(row, row, value=-1), floor, out=diagonal)
            bias.scatter_(1, p, torch.inf)
            w.scatter_(1, p, 0)
            if room is not None:
                assert n_m is not None
                group = position.gather(1, p) // n_m[1]
                room.scatter_add_(1, group, torch.full_like(group, -1))
        order[:, start : start + width] = position.gather(1, pivots)
        panel = losses[:, start : start + width]
        panel.masked_fill_(panel >= never / 2, torch.inf)

        stays = torch.ones_like(position, dtype=torch.bool).scatter_(1, pivots, False)
        if start + width == steps:
            order[:, steps:] = position[stays].view(n, left - width)
            return
        keep = stays.nonzero()[:, 1].view(n, left - width)
        position, w, bias = position.gather(1, keep), w.gather(1, keep), bias.gather(1, keep)
        diagonal, floor = diagonal.gather(1, keep), floor.gather(1, keep)
        L = L.gather(2, keep[:, None].expand(-1, width, -1))
        H = H[blocks[:, None, None], keep[:, :, None], keep[:, None]]
        H.baddbmm_(L.mT, L, alpha=-1)
    if not steps:
        order.copy_(position)


def compensate(weight: Tensor, fisher_inv: Tensor, keep: Tensor, *, blocks_in_parallel: int | None = None) -> Tensor:
    """Compute the weights after the set ``S = ~keep`` is pruned: ``w − H[:,S] (H[S,S])⁻¹ w_S``, exactly 0 on ``S``.

    Args:
        weight: ``(n, B)``.
        fisher_inv: ``(n, B, B)``, same dtype.
        keep: ``(n, B)`` bool, True = keep. Any mask, from any source.
        blocks_in_parallel: blocks solved at once; does not change the result.

    Returns:
        ``(n, B)``, a new tensor in the dtype of ``weight``. The solve itself runs in float64: it is a small share of the cost.

    Raises:
        ValueError: invalid shapes, dtypes or values.
        NotPositiveDefiniteError: a block of ``fisher_inv`` does not factor.
    """
    check_blocks(weight, fisher_inv, keep=keep)
    gone = ~keep
    order = gone.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    counts = gone.sum(dim=1)[None]
    return compensate_prefixes(weight, fisher_inv, order, counts, blocks_in_parallel=blocks_in_parallel)[0][0]


@full_precision()
def compensate_prefixes(
    weight: Tensor, fisher_inv: Tensor, order: Tensor, counts: Tensor, *, blocks_in_parallel: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the weights after the first ``k`` of an order are pruned, for several ``k`` from one factorisation.

    In the coordinates of the order let ``H = L Lᵀ`` and ``u = L⁻¹ w``. The leading part of ``L`` factors the leading part of ``H``, so

        w − H[:, :k] (H[:k, :k])⁻¹ w[:k] = w − L[:, :k] u[:k],   loss = ½ ‖u[:k]‖²:

    each further ``k`` costs one product with a vector.

    Args:
        weight: ``(n, B)``.
        fisher_inv: ``(n, B, B)``, same dtype.
        order: ``(n, B)`` integer, a permutation of each block.
        counts: ``(levels, n)`` integer, ``k`` of each level and block.
        blocks_in_parallel: blocks solved at once; does not change the result.

    Returns:
        Weights ``(levels, n, B)`` in the dtype of ``weight``, and the predicted increase of the loss ``(levels, n)`` in float64.

    Raises:
        NotPositiveDefiniteError: a block will not factor.
    """
    n, B = weight.shape
    result = weight.new_empty(len(counts), n, B)
    losses = torch.empty(len(counts), n, dtype=torch.float64, device=weight.device)
    steps = torch.arange(B, device=weight.device)
    chunk = chunk_size(blocks_in_parallel, B, 8, weight.device)

    def work(part: slice) -> None:
        p = order[part].long()
        w = weight[part].double().gather(1, p)
        L = _factor(fisher_inv[part], p, part.start)
        u = torch.linalg.solve_triangular(L, w[:, :, None], upper=False)[:, :, 0]
        gone = steps < counts[:, part, None].to(steps.device)  # (levels, blocks, B)
        losses[:, part] = 0.5 * (u * u * gone).sum(dim=2)
        moved = (u * gone).movedim(0, 1).contiguous() @ L.mT  # (blocks, levels, B)
        pruned = (w[None] - moved.movedim(1, 0)).masked_fill_(gone, 0).to(weight.dtype)
        result[:, part] = torch.empty_like(pruned).scatter_(2, p.expand_as(pruned), pruned)

    in_chunks(n, chunk, work, "solving blocks", weight.device)
    return result, losses


def _factor(H: Tensor, order: Tensor, first_block: int) -> Tensor:
    """Cholesky factors ``(n, B, B)`` of ``H`` in an order, in float64; blocks that are not positive definite within their rounding error are shifted until
    they are.

    A float32 inverse is accurate to about ``eps · max(diag)``, so a first shift of that size is below its accuracy. If that is not enough, because rounding
    has accumulated over many updates, the shift grows tenfold, up to ``LIFTS`` times.
    """
    factor, info = cholesky(H, order)
    bad = info.nonzero()[:, 0]
    unit = 4 * torch.finfo(H.dtype).eps * H.diagonal(dim1=1, dim2=2).amax(dim=1).double()
    for lift in range(LIFTS + 1):
        if not len(bad):
            return factor
        lifted = permuted(H[bad], order[bad])
        lifted.diagonal(dim1=1, dim2=2).add_(unit[bad, None] * 10**lift)
        found, info = torch.linalg.cholesky_ex(lifted)
        good = info == 0
        factor[bad[good]] = found[good]
        if lift and good.any():
            _LOGGER.warning(
                "%d inverse Fisher blocks were not positive definite to working precision, and got %.0e of their largest diagonal entry added; raise damp",
                *(int(good.sum()), 4 * torch.finfo(H.dtype).eps * 10**lift),
            )
        bad = bad[~good]
    if len(bad):
        raise NotPositiveDefiniteError(
            f"inverse Fisher block {int(bad[0]) + first_block} will not factor ({len(bad)} blocks in all): it is not positive definite to working "
            "precision; raise `damp` tenfold, or take more gradients"
        )
    return factor
