"""Allocation: from losses to the number of weights that each block loses.

The weights of a block are pruned in the order of its elimination, so an allocation is one number per block. Steps compete by their score:

``marginal``
    the loss ``δ`` of the step, made monotone along the block by a running maximum (a later, cheaper step cannot come before an earlier one). Where the
    losses of each block rise by themselves, a threshold on it minimises the predicted total loss; where they do not, the running maximum holds back
    the cheap steps behind a dear one, and the total is up to some percent above the smallest one.
``cumulative``
    the sum of the losses so far in the block, as in the published code.

Either can be divided by what a weight of the layer costs (``costs``): then a target is met with the least loss per
multiply-add saved, for example, instead of per weight.

Ties are broken by layer, block, step: deterministic. Counts are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Score = Literal["marginal", "cumulative"]


def step_scores(losses: Tensor, score: Score = "marginal") -> Tensor:
    """Turn ``(n, B)`` losses in order of elimination into non-decreasing scores; ``-inf`` (pruned) and ``inf`` (never) are unchanged."""
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {get_args(Score)}, got {score!r}")
    if score == "marginal":
        return losses.cummax(dim=1).values
    total = losses.clamp(min=0).double().cumsum(dim=1).to(losses.dtype)
    return torch.where(losses == -torch.inf, losses, total)


def checked_costs(costs: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Validate ``costs`` and divide them by their mean: only ratios matter.

    Raises:
        ValueError: not a mapping, a layer without a cost, or a cost that is not positive.
    """
    if not isinstance(costs, Mapping):
        raise ValueError(f"costs must be {{parameter name: cost of one of its weights}}, got {costs!r}")
    found = {}
    for name in names:
        cost = costs.get(name)
        if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < float("inf"):
            raise ValueError(
                f"costs[{name!r}] must be a positive number, got {cost!r}: give each layer that is pruned one, or do not select it"
            )
        found[name] = float(cost)
    mean = sum(found.values()) / max(1, len(found))
    return {name: cost / mean for name, cost in found.items()}


def allocate(scores: Sequence[Tensor], num_pruned: int, names: Sequence[str] | None = None) -> list[Tensor]:
    """Choose the ``num_pruned`` cheapest steps over all blocks of all layers.

    Args:
        scores: per layer ``(n, B)`` non-decreasing along dim 1 (see :func:`step_scores`); ``-inf`` must be taken, ``inf`` cannot.
        num_pruned: exact number of steps.

    Returns:
        Per layer ``(n,)`` int64: steps of each block.

    Raises:
        ValueError: fewer steps than must be taken, or more than can be.
    """
    refuse_below(sum(int((s == -torch.inf).sum()) for s in scores), num_pruned, names)
    can = sum(int((s < torch.inf).sum()) for s in scores)
    if num_pruned > can:
        raise ValueError(
            f"{num_pruned} weights were asked to be zero{_where(names)}, but only {can} can be with this mask type"
        )
    if num_pruned == 0:
        return [torch.zeros(len(s), dtype=torch.int64, device=s.device) for s in scores]
    threshold = torch.cat([s.reshape(-1).cpu() for s in scores]).kthvalue(num_pruned).values
    below = [s < threshold.to(s.device) for s in scores]
    counts = [b.sum(dim=1) for b in below]
    rest = num_pruned - sum(int(c.sum()) for c in counts)
    for layer, (s, count) in enumerate(zip(scores, counts)):
        if rest == 0:
            break
        ties = (s == threshold.to(s.device)).sum(dim=1)
        # Ties go to blocks in order until the rest is used up.
        taken = (rest - (ties.cumsum(0) - ties)).clamp_(min=0).minimum(ties)
        counts[layer] = count + taken
        rest -= int(taken.sum())
    return counts


def refuse_below(must: int, num_pruned: int, names: Sequence[str] | None = None) -> None:
    """Raise ``ValueError`` if the target is below what an earlier mask has pruned: pruned weights do not come back."""
    if num_pruned < must:
        raise ValueError(
            f"{num_pruned} weights were asked to be zero{_where(names)}, but {must} already are by an earlier mask: ask for a higher sparsity, "
            "or drop the earlier mask"
        )


def _where(names: Sequence[str] | None) -> str:
    return f" in {', '.join(names)}" if names is not None and len(names) < 4 else ""
