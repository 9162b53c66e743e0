"""FastCAP: one Fisher matrix per layer, shared by its blocks; masks column-block by column-block, errors pushed to the right.

For layers whose ``d · B`` inverse Fisher blocks do not fit, or when minutes matter: ``O(B³)`` for the factor and ``O(d · B)`` for the sweep, and nothing
larger than ``B × B`` and the weights themselves is held.

With ``H = F⁻¹`` of the average Fisher block and ``U`` its upper Cholesky factor (``H = Uᵀ U``), column ``i`` of the ``(n, B)`` weights has, with all
columns to its left decided, the conditional variance ``U_ii²``. In each column-block the cheapest ``w² / U_ii²`` leave; then from left to right
``e = (w_i − q_i) / U_ii`` is spread over the columns to the right, ``W ← W − e U[i, :]``.

Beyond the published method each block keeps one number of its own, its mean squared gradient relative to the layer's, ``s_b``: the Fisher matrix of block ``b`` is
taken to be ``s_b F``. Updates do not depend on it, but scores do: ``s_b w² / U_ii²``. Without it all neurons of a layer would count as equally sensitive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from capruner.allocation import allocate
from capruner.fisher import BlockFisher
from capruner.layout import BlockLayout
from capruner.methods.base import LayerSolution, Method, Settings, Stopwatch, Target
from capruner.numerics import NotPositiveDefiniteError, full_precision
from capruner.patterns import rank_once


class FastCAP(Method):
    """``damp`` is relative to the mean diagonal of the shared Fisher matrix.

    The sparsity of each layer has to be known before its sweep. A target over several layers is first shared out among them by one threshold on
    ``w² / (2 H_ii)``; a target per layer is the published method.
    """

    name = "fast_cap"
    default_damp = 0.1

    def __init__(self, layouts: Mapping[str, BlockLayout], settings: Settings, clock: Stopwatch) -> None:
        super().__init__(layouts, settings, clock)
        self._fishers: dict[str, BlockFisher] = {}
        self._factors: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}  # (n, 1) per layer
        self._weights: Mapping[str, Tensor] = {}
        self._dead: Mapping[str, Tensor] = {}

    def add(self, slab: Mapping[str, Tensor]) -> None:
        with self.clock("fisher"):
            for name, layout in self.layouts.items():
                rows = layout.to_blocks(slab[name], slab[name].dtype)  # (k, n, B)
                if name not in self._fishers:
                    self._fishers[name] = BlockFisher(
                        1,
                        layout.block_size,
                        self.settings.num_grads * layout.num_blocks,
                        self.settings.damp,
                        relative_damp=True,
                        device=self.settings.fisher_inv_device or rows.device,
                        dtype=rows.dtype,
                    )
                    self._scales[name] = torch.zeros(layout.num_blocks, 1, dtype=rows.dtype, device=rows.device)
                self._fishers[name].add(rows.flatten(0, 1)[:, None])
                self._scales[name] += rows.square().sum(dim=(0, 2))[:, None]

    def prepare(self, weights: Mapping[str, Tensor], dead: Mapping[str, Tensor]) -> None:
        self._weights, self._dead = weights, dead
        with self.clock("fisher"), full_precision():
            for name, fisher in self._fishers.items():
                try:
                    H = fisher.inverse()[0].double()
                except NotPositiveDefiniteError as error:
                    raise NotPositiveDefiniteError(f"{name}: {error}") from None
                self._factors[name] = torch.linalg.cholesky(H, upper=True).to(weights[name])
                mean = self._scales[name].mean()
                # A layer without any gradient has no scale; a block without one is damped like the others, so that it still costs something.
                self._scales[name] = (
                    self._scales[name] / mean + self.settings.damp if mean > 0 else torch.ones_like(self._scales[name])
                )
            self._fishers.clear()

    def solve(self, rungs: Sequence[Sequence[Target]]) -> list[dict[str, LayerSolution]]:
        solutions = []
        for targets in rungs:
            with self.clock("allocate"):
                counts = self._counts(targets)
            with self.clock("compensate"):
                solutions.append({name: self._sweep(name, counts[name]) for name in self.layouts})
        return solutions

    def _counts(self, targets: Sequence[Target]) -> dict[str, int]:
        """Weights to remove from each layer."""
        counts: dict[str, int] = {}
        for target in targets:
            scores = []
            for name in target.names:
                variance = self._factors[name].square().sum(dim=0)  # diagonal of H = UᵀU
                saliency = self._scales[name] * self._weights[name].square() / (2 * variance)
                padding = self.layouts[name].is_padding(saliency.device)
                ranked = rank_once(saliency, self.settings.pattern, self._dead[name], padding).losses
                scores.append(ranked.flatten().sort().values[None])
            if self.settings.pattern.n_m is not None:
                taken = [(s < torch.inf).sum(dim=1) for s in scores]
            else:
                numel = sum(self.layouts[name].numel for name in target.names)
                taken = allocate(scores, round(target.sparsity * numel), target.names)
            counts |= {name: int(k) for name, k in zip(target.names, taken)}
        return counts

    @full_precision()
    def _sweep(self, name: str, count: int) -> LayerSolution:
        U, dead = self._factors[name], self._dead[name]
        W = self._weights[name].clone()
        padding = self.layouts[name].is_padding(W.device)
        gone = dead.clone()
        B = W.shape[1]
        width = min(self.settings.block_size or B, B)
        n_m = self.settings.pattern.n_m
        loss = 0.0
        taken = seen = 0
        candidates = ~(dead | padding)
        for start in range(0, B, width):
            stop = min(start + width, B)
            columns = slice(start, stop)
            if n_m is None:
                seen += int((~padding[:, columns]).sum())
                later_dead, later = int(dead[:, stop:].sum()), int(candidates[:, stop:].sum())
                here_dead, here = int(dead[:, columns].sum()), int(candidates[:, columns].sum())
                # The layer's share so far, within what the columns to the right have to give and can give.
                want = round(count * seen / self.layouts[name].numel) - taken
                want = min(
                    max(want, count - taken - later_dead - later, here_dead),
                    count - taken - later_dead,
                    here_dead + here,
                )
                saliency = self._scales[name] * W[:, columns].square() / U.diagonal()[columns].square()
                saliency = saliency.masked_fill(dead[:, columns], -torch.inf).masked_fill(
                    padding[:, columns], torch.inf
                )
                chosen = saliency.flatten().argsort(stable=True)[:want]
                block = torch.zeros(saliency.numel(), dtype=torch.bool, device=W.device).index_fill_(0, chosen, True)
                gone[:, columns] = block.view_as(saliency)
                taken += want
            errors = torch.zeros_like(W[:, columns])
            for i in range(start, stop):
                if n_m is not None and i % n_m[1] == 0:
                    group = slice(i, i + n_m[1])
                    saliency = W[:, group].square() / U.diagonal()[group].square()
                    order = rank_once(saliency, self.settings.pattern, dead[:, group], padding[:, group])
                    gone[:, group] = ~order.keep_mask((order.losses < torch.inf).sum(dim=1))
                error = W[:, i] * gone[:, i] / U[i, i]
                W[:, i:stop] -= torch.outer(error, U[i, i:stop])
                errors[:, i - start] = error
            W[:, stop:] -= errors @ U[columns, stop:]
            loss += float((self._scales[name] * errors.double().square()).sum()) / 2
        return LayerSolution(W.masked_fill(gone, 0), ~gone, loss)
