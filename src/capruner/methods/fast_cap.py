"""FastCAP: one Fisher matrix per layer, shared by its blocks.

For layers whose ``d · B`` inverse Fisher blocks do not fit, or when minutes matter: ``O(B³)`` for the factor, ``O(d · B)`` for each pass over a layer's ``d``
weights, and nothing larger than ``B × B`` and the weights themselves is held.

A layer is pruned in steps to each of ``SHARES``. A step removes the cheapest ``s_b w² / v``, and re-fits the weights that remain (:mod:`capruner.core.refit`);
the next one chooses by those. So many steps come close to the greedy order of CAP. ``v`` is the variance of a weight given those that remain. It differs
from block to block, which have masks of their own; the shared stand-in lies between ``H_ii``, where all others remain, and ``1 / F_ii``, where none does.

Each block keeps one number of its own, ``s_b = (q_b / mean(q) + λ) / (1 + λ)`` with its mean squared gradient ``q_b`` and the relative damping ``λ``: the
Fisher matrix of block ``b`` is taken to be ``s_b F``. Updates do not depend on it, but scores do. Without it all neurons of a layer would count as equally
sensitive.

``block_size`` gives the published method instead, and N:M patterns choose by it: with ``H = F⁻¹`` and its upper Cholesky factor ``U`` (``H = Uᵀ U``), column
``i`` of the ``(n, B)`` weights has, with all columns to its left decided, the variance ``U_ii²``. In each column-block the cheapest ``s_b w² / U_ii²`` leave;
then from left to right ``e = (w_i − q_i) / U_ii`` is spread over the columns to the right, ``W ← W − e U[i, :]``.

The last block of a layer may be shorter than ``B``: it has the factor of its own columns.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capruner.core.allocation import allocate
from capruner.core.fisher import BlockFisher
from capruner.core.numerics import full_precision
from capruner.core.patterns import rank_once
from capruner.core.refit import refit
from capruner.core.scaling import scale_of
from capruner.distributed import Partition
from capruner.methods.base import LayerSolution, Method, Settings, Stopwatch, Target, naming

PANEL = 32
"""Columns whose errors reach the columns to the right of them together, as one matrix product."""

SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
"""Sparsities of the steps in which a layer is pruned."""


class FastCAP(Method):
    """``damp`` is relative to the mean diagonal of the shared Fisher matrix.

    The sparsity of each layer has to be known before its last step. A target over several layers is first shared out among them by one threshold on the
    loss of each further weight, which the steps measure. A target per layer and a ``block_size`` are the published method.
    """

    name = "fast_cap"
    whole_layers = True

    def __init__(
        self, partition: Partition, settings: Settings, clock: Stopwatch, pruned: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(partition, settings, clock, pruned)
        self._factors: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}
        """Factor of a layer's last block, where that is padded: of the inverse for its real columns alone, 1 on the diagonal elsewhere."""
        self._units: dict[str, float] = {}
        self._scales: dict[str, Tensor] = {}  # (n, 1) per layer
        self._paths: dict[str, _Path] = {}
        self._in_hand: tuple[str, Tensor, Tensor | None] | None = None
        self._weights: Mapping[str, Tensor] = {}

    def add(self, slab: Mapping[str, Tensor]) -> None:
        with self.clock("fisher"):
            for name, rows in slab.items():  # (k, n, B)
                if not rows.shape[1]:
                    continue  # another process's layer
                self._fisher(name, rows).add(rows.flatten(0, 1)[:, None])
                unit = scale_of(self._fishers[name].largest)
                squares = (rows if unit == 1 else rows / unit).square().sum(dim=(0, 2))
                self._scales[name] += squares[:, None].double() * unit**2

    def _fisher(self, name: str, like: Tensor) -> BlockFisher:
        if name not in self._fishers:
            blocks, size = self._own_shape(name)
            self._fishers[name] = BlockFisher(
                1,
                size,
                None if self.settings.num_grads == "auto" else self.settings.num_grads * blocks,
                self.settings.damp,
                relative_damp=True,
                triangular=True,
                device=self.settings.fisher_inv_device or like.device,
                dtype=like.dtype,
            )
            self._scales[name] = torch.zeros(blocks, 1, dtype=torch.float64, device=like.device)
        return self._fishers[name]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: tensors | {"scales": self._scales[name]} for name, tensors in super().state_dict().items()}

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._fisher(name, tensors["peak"]).load(tensors)
        if tensors["scales"].shape != self._scales[name].shape:
            raise ValueError(f"scales of shape {tuple(tensors['scales'].shape)} are not of {name}")
        self._scales[name].copy_(tensors["scales"])

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        with self.clock("fisher"), full_precision():
            for name in self._bar(self._fishers, "inverting"):
                fisher = self._fishers[name]
                with naming(name):
                    H = fisher.inverse()[0].double()
                self._factors[name] = torch.linalg.cholesky(H, upper=True).to(weights[name])
                if self.layouts[name].padding:
                    self._last[name] = _factor_of_first(H, H.shape[0] - self.layouts[name].padding).to(weights[name])
                self._units[name] = float(fisher.units)
                squares = self._scales[name] / (~self._padding(name, self._scales[name].device)).sum(
                    dim=1, keepdim=True
                )
                mean, damp = squares.mean(), self.settings.damp
                # A layer without any gradient has no scale; a block without one is damped like the others, so that it still costs something.
                scales = (squares / mean + damp) / (1 + damp) if mean > 0 else torch.ones_like(squares)
                self._scales[name] = scales.to(weights[name].dtype)
            self._fishers.clear()

    def solve(self, levels: Sequence[Sequence[Target]]) -> list[dict[str, LayerSolution]]:
        solutions = []
        for targets in levels:
            with self.clock("allocate"):
                counts = self._counts(targets)
            with self.clock("compensate"):
                layers = self._bar(self.layouts, "re-fitting weights")
                solutions.append({name: self._sweep(name, counts[name]) for name in layers})
        return solutions

    def _counts(self, targets: Sequence[Target]) -> dict[str, int]:
        """Weights to remove from each layer; of no use to an N:M pattern, which says so itself."""
        if self.settings.pattern.n_m is not None:
            return dict.fromkeys(self.layouts, 0)
        counts: dict[str, int] = {}
        for target in targets:
            if len(target.names) == 1:
                counts[target.names[0]] = target.steps()
                continue
            names = self._bar(target.names, "choosing weights")
            scores = [self.partition.gather(n, self._marginal_losses(n)).flatten()[None] for n in names]
            taken = allocate(scores, target.steps(), target.names)
            counts |= {name: int(k) for name, k in zip(target.names, taken)}
        return counts

    def _marginal_losses(self, name: str) -> Tensor:
        """``(n, B)`` float64, rising from row to row: the loss of each further weight of a layer, ``-inf`` for the dead and ``inf`` for padding.

        ``s_b w² / (2 H_ii)`` is the loss of the first weight to leave, with all others there to make up for it. When most are gone the next one costs
        many times that, the more the more correlated the columns are, so that layers cannot be compared by it. Instead, the rise of the loss between
        the steps of the layer's path, per weight, is interpolated.
        """
        W = self._weights[name]
        losses = torch.full((W.numel(),), torch.inf, dtype=torch.float64)
        if name in self._factors:  # else another process's layer
            path = self._path(name)
            first, last = path.counts[0], path.counts[-1]
            losses[:first] = -torch.inf
            if first < last:
                rises = np.diff(path.losses) / np.diff(path.counts)
                rises = np.maximum.accumulate(rises.clip(np.finfo(float).tiny))
                middles = (np.array(path.counts[1:]) + path.counts[:-1]) / 2
                rising = np.exp(np.interp(np.arange(first, last), middles, np.log(rises)))
                losses[first:last] = torch.from_numpy(rising * self._units[name])
        return losses.view(W.shape).to(W.device)

    @full_precision()
    def _path(self, name: str) -> _Path:
        """The layer pruned step by step to each of ``SHARES``, choosing by the weights that the last step has re-fitted."""
        if name not in self._paths:
            dead, padding = self._unused(name)
            alive = int((~(dead | padding)).sum())
            counts = sorted({int(dead.sum()) + round(share * alive) for share in (0, *SHARES)})
            W, gone, losses = self._weights[name].T, dead.T, [0.0]
            left = torch.where(gone, 0, len(counts)).to(torch.uint8)
            for step, count in enumerate(counts[1:], 1):
                gone = self._cheapest(name, W, gone, count, self._variances(name, gone))
                W, loss = self._refit(name, W, gone)
                left[gone & (left > step)] = step
                losses.append(loss)
            self._paths[name] = _Path(counts, losses, left)
        return self._paths[name]

    @full_precision()
    def _refit(self, name: str, W: Tensor, gone: Tensor) -> tuple[Tensor, float]:
        """The layer ``(B, n)`` without the weights that are ``gone``, the others at their best, and its loss in its own units; the search begins at ``W``."""
        F, last = self._fisher_matrices(name)

        def times(x: Tensor) -> Tensor:
            product = F @ x
            if last is not None:
                product[:, -1] = last @ x[:, -1]
            return product

        gone = gone | self._padding(name, W.device).T
        return refit(self._weights[name].T, W, gone, times, F.diagonal()[:, None], self._scales[name][:, 0])

    def _fisher_matrices(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Of a layer, and of its last block where that is padded; those of the layer in hand are kept."""
        if self._in_hand is None or self._in_hand[0] != name:
            last = _inverse(self._last[name]) if name in self._last else None
            self._in_hand = name, _inverse(self._factors[name]), last
        return self._in_hand[1:]

    def _loss(self, name: str, errors: Tensor) -> float:
        norms = torch.linalg.vector_norm(errors, dim=0, dtype=torch.float64)
        return float((self._scales[name][:, 0] * norms.square()).sum()) / 2

    def _by_block(self, name: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        """``(n, B)`` values of a layer's factor, those of the last block from a factor of its own if it is padded."""
        values = of(self._factors[name]).repeat(len(self._weights[name]), 1)
        if name in self._last:
            values[-1] = of(self._last[name])
        return values

    def _unused(self, name: str) -> tuple[Tensor, Tensor]:
        """``(n, B)`` bool each: the weights that were pruned before, and the padding."""
        device = self._weights[name].device
        return self._pruned(name, device), self._padding(name, device)

    @full_precision()
    def _sweep(self, name: str, count: int) -> LayerSolution:
        """Remove exactly ``count`` weights of a layer (or what an N:M pattern says)."""
        dead, _ = self._unused(name)
        if name not in self._factors:  # another process's layer: no blocks of it here
            return LayerSolution(self._weights[name].clone(), ~dead, 0.0)
        if self.settings.pattern.n_m is None and self.settings.block_size is None:
            gone = self._path(name).before(count)
            W, _ = self._refit(name, self._weights[name].T, gone)
            gone = self._cheapest(name, W, gone, count, self._variances(name, gone))
            W, loss = self._refit(name, W, gone)
        else:
            W, gone, loss = self._by_column_blocks(name, count)
            if self.settings.block_size is None:
                W, loss = self._refit(name, W, gone)
        return LayerSolution(W.T.contiguous(), ~gone.T.contiguous(), loss * self._units[name])

    def _by_column_blocks(self, name: str, count: int) -> tuple[Tensor, Tensor, float]:
        """As published: the mask of a column-block is chosen when the sweep gets there. Weights and mask ``(B, n)``, and the loss."""
        dead, padding = self._unused(name)
        W, gone = self._weights[name].T.clone(memory_format=torch.contiguous_format), dead.T.contiguous()
        B = len(W)
        width = min(self.settings.block_size or B, B)
        loss, taken = 0.0, 0
        for start in range(0, B, width):
            columns = slice(start, min(start + width, B))
            if self.settings.pattern.n_m is None:
                share = _share(count, taken, columns.stop, start, dead, padding)
                variances = self._by_block(name, Tensor.diagonal)[:, columns].square()
                gone[columns] = self._cheapest(name, W[columns], gone[columns], share, variances, columns)
                taken += share
            loss += self._loss(name, self._push(name, W, gone, columns))
        return W.masked_fill_(gone, 0), gone, loss

    def _push(self, name: str, W: Tensor, gone: Tensor, columns: slice) -> Tensor:
        """Remove what is ``gone`` of some columns, and spread the errors over the columns to their right.

        Args:
            W: ``(B, n)``, changed in place: a step works on one column of all blocks, which should lie together in memory.
            gone: ``(B, n)`` bool. An N:M pattern is decided here, column by column.

        Returns:
            Errors ``e`` of the columns.
        """
        U, n_m = self._factors[name], self.settings.pattern.n_m
        diagonal = self._by_block(name, Tensor.diagonal).T.contiguous()
        # What the last block has to get back of the updates that suit the others.
        excess = U - self._last[name] if name in self._last else None
        dead, padding = self._unused(name)
        group_size = n_m[1] if n_m else 1
        panel = max(PANEL // group_size, 1) * group_size
        errors = torch.empty_like(W[columns])
        for first in range(columns.start, columns.stop, panel):
            last = min(first + panel, columns.stop)
            for i in range(first, last):
                if n_m is not None and i % n_m[1] == 0:
                    group = slice(i, i + n_m[1])
                    saliency = W[group].T.square() / diagonal[group].T.square()
                    order = rank_once(saliency, self.settings.pattern, dead[:, group], padding[:, group])
                    gone[group] = ~order.keep_mask((order.losses < torch.inf).sum(dim=1)).T
                e = errors[i - columns.start]
                torch.mul(W[i], gone[i], out=e).div_(diagonal[i])
                W[i:last].addr_(U[i, i:last], e, alpha=-1)
                if excess is not None:
                    W[i:last, -1] += excess[i, i:last] * e[-1]
            panel_errors = errors[first - columns.start : last - columns.start]
            W[last:].addmm_(U[first:last, last:].mT, panel_errors, alpha=-1)
            if excess is not None:
                W[last:, -1] += panel_errors[:, -1] @ excess[first:last, last:]
        return errors

    def _variances(self, name: str, gone: Tensor) -> Tensor:
        """``(n, B)``: of each weight given those that remain. ``H_ii`` where all others do, ``1 / F_ii`` where none does, between them by the share gone."""
        padding = self._padding(name, gone.device)
        share = float((gone.T & ~padding).sum() / (~padding).sum())

        F, last = self._fisher_matrices(name)

        def variances(factor: Tensor) -> Tensor:
            alone = 1 / (F if last is None or factor is self._factors[name] else last).diagonal()
            return factor.square().sum(dim=0).log().lerp(alone.log(), share).exp()

        return self._by_block(name, variances)

    def _cheapest(
        self, name: str, W: Tensor, gone: Tensor, count: int, variances: Tensor, columns: slice = slice(None)
    ) -> Tensor:
        """``(width, n)`` bool: the ``count`` cheapest weights of a column-block, those that are gone first, padding never.

        Args:
            W, gone: of these columns, ``(width, n)``.
            variances: of these columns, ``(n, width)``.
        """
        saliency = self._scales[name] * W.T.square() / variances
        saliency = saliency.masked_fill(gone.T, -torch.inf)
        saliency = saliency.masked_fill(self._padding(name, W.device)[:, columns], torch.inf)
        chosen = saliency.flatten().argsort(stable=True)[:count]
        flat = torch.zeros(saliency.numel(), dtype=torch.bool, device=W.device)
        return flat.index_fill_(0, chosen, True).view(saliency.shape).T.contiguous()


@dataclass(frozen=True)
class _Path:
    """How a layer empties.

    Attributes:
        counts: weights gone after each step, rising; the first is of those that were dead.
        losses: of the layer after each step, in its own units.
        left: ``(B, n)`` uint8, the step at which each weight has left.
    """

    counts: list[int]
    losses: list[float]
    left: Tensor

    def before(self, count: int) -> Tensor:
        """``(B, n)`` bool: what is gone after the last step with fewer than ``count``."""
        return self.left < max(1, bisect.bisect_left(self.counts, count))


def _inverse(factor: Tensor) -> Tensor:
    """The Fisher matrix, of the upper Cholesky factor of its inverse."""
    return torch.cholesky_inverse(factor.double(), upper=True).to(factor)


def _factor_of_first(H: Tensor, real: int) -> Tensor:
    """Upper Cholesky factor of the inverse Fisher matrix of the first ``real`` columns alone, from ``H`` of all of them; ``(B, B)`` float64."""
    rest = H[real:, real:]
    first = H[:real, :real] - H[:real, real:] @ torch.cholesky_solve(H[real:, :real], torch.linalg.cholesky(rest))
    U = torch.eye(len(H), dtype=H.dtype, device=H.device)
    U[:real, :real] = torch.linalg.cholesky((first + first.T) / 2, upper=True)
    return U


def _share(count: int, taken: int, stop: int, start: int, dead: Tensor, padding: Tensor) -> int:
    """How many of a layer's ``count`` weights leave from the columns ``start`` to ``stop``, ``taken`` having left further to the left.

    The target's share of the columns so far, within what these columns and those to the right must give (the dead) and can give.
    """
    alive = ~(dead | padding)
    dead_here, dead_later = int(dead[:, start:stop].sum()), int(dead[:, stop:].sum())
    alive_here, alive_later = int(alive[:, start:stop].sum()), int(alive[:, stop:].sum())
    want = round(count * int((~padding[:, :stop]).sum()) / int((~padding).sum())) - taken
    at_least = max(dead_here, count - taken - dead_later - alive_later)
    at_most = min(dead_here + alive_here, count - taken - dead_later)
    return min(max(want, at_least), at_most)
