"""Mask types: which weights may be pruned next.

``unstructured``
    Any weight.
``N:M``, for example ``2:4``
    Of each ``M`` consecutive weights along the reduction dimension exactly ``N`` remain (SparseML's and NVIDIA's meaning).
``block4``
    Groups of four consecutive weights along the reduction dimension are pruned together.

The reduction dimension of a Linear weight ``(out, in)`` is ``in``; that of a convolution kernel is taken to be its input channels, because sparse tensor
cores and sparse engines read ``(out, kh, kw, in)``. Transposed convolutions and the ``Conv1D`` of transformers store the inputs first. Both patterns need as
many inputs (per group of a convolution) as a multiple of the group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capruner.core.elimination import Elimination, check_blocks
from capruner.core.numerics import NotPositiveDefiniteError, full_precision
from capruner.core.parallel import chunk_size, in_chunks


@dataclass(frozen=True)
class Pattern:
    """A mask type.

    Attributes:
        stay: weights of a group that remain; 0 for patterns whose groups are pruned as a whole.
        group: consecutive weights per group, 1 for unstructured.
    """

    stay: int = 0
    group: int = 1

    @property
    def n_m(self) -> tuple[int, int] | None:
        """``(N, M)`` of an N:M pattern."""
        return (self.stay, self.group) if self.stay else None

    @property
    def sparsity(self) -> float | None:
        """The only sparsity of the pattern, or None."""
        return 1 - self.stay / self.group if self.stay else None

    def __str__(self) -> str:
        if self.stay:
            return f"{self.stay}:{self.group}"
        return "unstructured" if self.group == 1 else f"block{self.group}"


def parse_mask_type(mask_type: Any, n: int | None = None, m: int | None = None) -> Pattern:
    """Parse the mask type of a recipe or a call.

    Args:
        mask_type: ``"unstructured"``, ``"block4"``, ``"2:4"``; an integer is what YAML 1.1 makes of an unquoted ``2:4`` (sexagesimal: 124);
            ``"N:M"`` takes its numbers from ``n`` and ``m``.

    Raises:
        ValueError: anything else.
    """
    if isinstance(mask_type, Pattern):
        return mask_type
    text = mask_type
    if isinstance(mask_type, int) and not isinstance(mask_type, bool):
        text = "{}:{}".format(*divmod(mask_type, 60))
    elif isinstance(mask_type, str) and mask_type.strip().upper() == "N:M":
        text = f"{n}:{m}"
    if text == "unstructured":
        return Pattern()
    if text == "block4":
        return Pattern(group=4)
    match = re.fullmatch(r"(\d+):(\d+)", str(text).strip())
    if match and 0 < int(match[1]) < int(match[2]):
        return Pattern(int(match[1]), int(match[2]))
    raise ValueError(
        f"mask_type must be 'unstructured', 'block4' or 'N:M' with 0 < N < M (for example '2:4': 2 of 4 remain), got {mask_type!r}"
        + (f" with n={n}, m={m}" if n is not None or m is not None else "")
    )


def rank_once(saliency: Tensor, pattern: Pattern, dead: Tensor, padding: Tensor) -> Elimination:
    """Sort ``(n, B)`` saliencies in each block: pruned weights first, padding never, respecting the pattern.

    Groups that are pruned together have one saliency for all their weights.
    """
    saliency = saliency.masked_fill(dead, -torch.inf).masked_fill_(padding, torch.inf)
    if pattern.n_m is not None:
        grouped = saliency.unflatten(1, (-1, pattern.group))
        rank = grouped.argsort(dim=2, stable=True).argsort(dim=2)
        full = (rank >= pattern.group - pattern.stay) & (grouped != -torch.inf)
        saliency = grouped.masked_fill(full, torch.inf).flatten(1)
    losses, order = saliency.sort(dim=1, stable=True)
    return Elimination(order, losses)


def group_saliency(weight: Tensor, systems: Tensor) -> Tensor:
    """``½ w_Qᵀ (H[Q,Q])⁻¹ w_Q`` of groups: ``(…, g)`` weights and ``(…, g, g)`` diagonal blocks of the inverse Fisher matrix, to ``(…,)``."""
    A, w = systems.clone(), weight.clone()
    total = torch.zeros_like(w[..., 0])
    for j in range(w.shape[-1]):  # g is 4: a loop over pivots, vectorised over all groups
        pivot = A[..., j, j].clamp_min(torch.finfo(w.dtype).tiny)
        total += w[..., j] ** 2 / pivot
        column = A[..., j + 1 :, j] / pivot[..., None]
        w[..., j + 1 :] -= column * w[..., j : j + 1]
        A[..., j + 1 :, j + 1 :] -= column[..., None] * A[..., j, None, j + 1 :]
    return total / 2


@full_precision()
def eliminate_groups(
    weight: Tensor,
    fisher_inv: Tensor,
    group: int,
    *,
    dead: Tensor | None = None,
    frozen: Tensor | None = None,
    blocks_in_parallel: int | None = None,
) -> Elimination:
    """Eliminate whole groups of consecutive weights greedily, cheapest first, scored by :func:`group_saliency`.

    Args:
        weight: ``(n, B)``, ``B`` a multiple of ``group``.
        fisher_inv: ``(n, B, B)``, same dtype.
        dead: ``(n, B)`` bool, whole groups pruned earlier; they come first at loss ``-inf``.
        frozen: ``(n, B)`` bool; a group with such a weight is never pruned.

    Returns:
        The order, group after group; the loss of a group stands at each of its steps.

    Raises:
        ValueError: invalid shapes, or ``dead`` with parts of groups.
        NotPositiveDefiniteError: the system of a group does not factor.
    """
    check_blocks(weight, fisher_inv, dead=dead, frozen=frozen)
    n, B = weight.shape
    if B % group:
        raise ValueError(
            f"a block of {B} weights does not hold whole groups of {group}; {group} must divide fisher_block_size"
        )
    bias = torch.zeros_like(weight).unflatten(1, (-1, group))[..., 0]
    if dead is not None:
        per_group = dead.unflatten(1, (-1, group))
        if (per_group.any(dim=2) & ~per_group.all(dim=2)).any():
            raise ValueError(f"an earlier mask has removed parts of groups of {group}; it does not fit this mask type")
        bias = bias.masked_fill(per_group.all(dim=2), -torch.inf)
    if frozen is not None:
        bias = bias.masked_fill(frozen.unflatten(1, (-1, group)).any(dim=2), torch.finfo(weight.dtype).max)
    order = torch.empty(n, B, dtype=torch.int64, device=weight.device)
    losses = torch.empty_like(weight)
    chunk = chunk_size(blocks_in_parallel, B, weight.element_size(), weight.device)

    def work(part: slice) -> None:
        groups, costs = _eliminate_groups_chunk(weight[part], fisher_inv[part], bias[part].clone(), group)
        order[part] = (groups[:, :, None] * group + torch.arange(group, device=weight.device)).flatten(1)
        losses[part] = costs.repeat_interleave(group, dim=1)

    in_chunks(n, chunk, work, "eliminating groups", weight.device)
    return Elimination(order, losses)


def _eliminate_groups_chunk(weight: Tensor, H: Tensor, bias: Tensor, g: int) -> tuple[Tensor, Tensor]:
    n, B = weight.shape
    G = B // g
    never = torch.finfo(weight.dtype).max
    blocks = torch.arange(n, device=weight.device)
    within = torch.arange(g, device=weight.device)
    w = weight.clone()
    # Diagonal g x g blocks of H, updated at each step; of the rest of H only the rows of the pivot are updated.
    systems = H.unflatten(1, (G, g)).unflatten(3, (G, g)).diagonal(dim1=1, dim2=3).movedim(3, 1).clone()
    L = w.new_empty(n, B, B)
    order, losses = torch.empty(n, G, dtype=torch.int64, device=w.device), w.new_empty(n, G)
    for step in range(G):
        saliency = group_saliency(w.unflatten(1, (G, g)), systems).clamp_(max=never / 4) + bias
        q = saliency.argmin(dim=1)
        order[:, step], losses[:, step] = q, saliency[blocks, q]
        columns = q[:, None] * g + within  # (n, g)
        done = step * g
        rows = H[blocks[:, None], columns]
        if done:
            before = L[:, :done].gather(2, columns[:, None].expand(-1, done, -1))  # (n, done, g)
            rows = torch.baddbmm(rows, before.mT, L[:, :done], alpha=-1)
        factor, info = torch.linalg.cholesky_ex(systems[blocks, q])
        if info.any():
            raise NotPositiveDefiniteError(
                "the system of a group will not factor; raise `damp` tenfold, or take more gradients"
            )
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        L[:, done : done + g] = rows
        u = torch.linalg.solve_triangular(factor, w.gather(1, columns)[:, :, None], upper=False)
        w -= (rows.mT @ u)[:, :, 0]
        w.scatter_(1, columns, 0)
        by_group = rows.unflatten(2, (G, g)).movedim(1, 3)  # (n, G, g, pivot rows)
        systems -= by_group @ by_group.mT
        systems[blocks, q] = torch.eye(g, dtype=w.dtype, device=w.device)
        bias[blocks, q] = torch.inf
    return order, losses.masked_fill_(losses >= never / 2, torch.inf)
