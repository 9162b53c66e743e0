"""FastCAP: one Fisher matrix per layer, shared by its blocks; masks column-block by column-block, errors pushed to the right.

For layers whose ``d · B`` inverse Fisher blocks do not fit, or when minutes matter: ``O(B³)`` for the factor and ``O(d · B)`` for the sweep, and nothing
larger than ``B × B`` and the weights themselves is held.

With ``H = F⁻¹`` of the average Fisher block and ``U`` its upper Cholesky factor (``H = Uᵀ U``), column ``i`` of the ``(n, B)`` weights has, with all
columns to its left decided, the conditional variance ``U_ii²``. In each column-block the cheapest ``w² / U_ii²`` leave; then from left to right
``e = (w_i − q_i) / U_ii`` is spread over the columns to the right, ``W ← W − e U[i, :]``.

Beyond the published method each block keeps one number of its own, ``s_b = (q_b / mean(q) + λ) / (1 + λ)`` with its mean squared gradient ``q_b`` and the
relative damping ``λ``: the Fisher matrix of block ``b`` is taken to be ``s_b F``. Updates do not depend on it, but scores do: ``s_b w² / U_ii²``. Without
it all neurons of a layer would count as equally sensitive. The last block of a layer may be shorter than ``B``: it has the factor of its own columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from capruner.core.allocation import allocate
from capruner.core.fisher import BlockFisher
from capruner.core.numerics import full_precision
from capruner.core.patterns import rank_once
from capruner.core.scaling import scale_of
from capruner.distributed import Partition
from capruner.methods.base import LayerSolution, Method, Settings, Stopwatch, Target, naming

PANEL = 32
"""Columns whose errors reach the columns to the right of them together, as one matrix product."""


class FastCAP(Method):
    """``damp`` is relative to the mean diagonal of the shared Fisher matrix.

    The sparsity of each layer has to be known before its sweep. A target over several layers is first shared out among them by one threshold on
    ``w² / (2 H_ii)``; a target per layer is the published method.

    The published damping is 1e-2. One matrix for all neurons of a layer is a rough model of each, and trusting it less does better: from 0.5 on every layer of
    the CIFAR-10 ViT loses less than by magnitude (``benchmarks/fast_cap.py``); with 0.1 three did not.
    """

    name = "fast_cap"
    default_damp = 0.5
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
            for name, fisher in self._fishers.items():
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
                solutions.append({name: self._sweep(name, counts[name]) for name in self.layouts})
        return solutions

    def _counts(self, targets: Sequence[Target]) -> dict[str, int]:
        """Weights to remove from each layer."""
        counts: dict[str, int] = {}
        n_m = self.settings.pattern.n_m
        for target in targets:
            if len(target.names) == 1 and n_m is None:
                counts[target.names[0]] = target.steps()
                continue
            scores = []
            for name in target.names:
                saliency = torch.zeros_like(self._weights[name])
                if name in self._factors:
                    variance = self._by_block(name, lambda U: U.square().sum(dim=0))  # diagonal of H = UᵀU
                    saliency = self._scales[name] * self._weights[name].square() / (2 * variance)
                pruned, padding = (of(name, saliency.device) for of in (self._pruned, self._padding))
                ranked = rank_once(saliency, self.settings.pattern, pruned, padding).losses
                unit = torch.tensor([self._units.get(name, 1.0)], dtype=torch.float64, device=ranked.device)
                scores.append(self.partition.gather(name, ranked * unit).flatten().sort().values[None])
            reach = [(s < torch.inf).sum(dim=1) for s in scores]
            taken = allocate(scores, target.steps(), target.names) if n_m is None else reach
            counts |= {name: int(k) for name, k in zip(target.names, taken)}
        return counts

    def _by_block(self, name: str, of: Callable[[Tensor], Tensor]) -> Tensor:
        """``(n, B)`` values of a layer's factor, those of the last block from a factor of its own if it is padded."""
        values = of(self._factors[name]).repeat(len(self._weights[name]), 1)
        if name in self._last:
            values[-1] = of(self._last[name])
        return values

    @full_precision()
    def _sweep(self, name: str, count: int) -> LayerSolution:
        """Remove exactly ``count`` weights of a layer (or what an N:M pattern says), left to right."""
        dead, padding = (of(name, self._weights[name].device) for of in (self._pruned, self._padding))
        if name not in self._factors:  # another process's layer: no blocks of it here
            return LayerSolution(self._weights[name].clone(), ~dead, 0.0)
        U, n_m = self._factors[name], self.settings.pattern.n_m
        diagonal = self._by_block(name, Tensor.diagonal).T.contiguous()
        # What the last block has to get back of the updates that suit the others.
        excess = U - self._last[name] if name in self._last else None
        # (B, n): a step works on one column of all blocks, which should lie together in memory.
        W, gone = self._weights[name].T.clone(memory_format=torch.contiguous_format), dead.T.contiguous()
        B = len(W)
        width = min(self.settings.block_size or B, B)
        group_size = n_m[1] if n_m else 1
        panel = max(PANEL // group_size, 1) * group_size
        loss, taken = 0.0, 0
        for start in range(0, B, width):
            stop = min(start + width, B)
            if n_m is None:
                columns = slice(start, stop)
                share = _share(count, taken, stop, start, dead, padding)
                gone[columns] = self._cheapest(name, W, columns, share).T
                taken += share
            for first in range(start, stop, panel):
                last = min(first + panel, stop)
                errors = torch.empty_like(W[first:last])
                for i in range(first, last):
                    if n_m is not None and i % n_m[1] == 0:
                        group = slice(i, i + n_m[1])
                        saliency = W[group].T.square() / diagonal[group].T.square()
                        order = rank_once(saliency, self.settings.pattern, dead[:, group], padding[:, group])
                        gone[group] = ~order.keep_mask((order.losses < torch.inf).sum(dim=1)).T
                    torch.mul(W[i], gone[i], out=errors[i - first]).div_(diagonal[i])
                    W[i:last].addr_(U[i, i:last], errors[i - first], alpha=-1)
                    if excess is not None:
                        W[i:last, -1] += excess[i, i:last] * errors[i - first, -1]
                W[last:].addmm_(U[first:last, last:].mT, errors, alpha=-1)
                if excess is not None:
                    W[last:, -1] += errors[:, -1] @ excess[first:last, last:]
                loss += float((self._scales[name][:, 0] * errors.double().square()).sum()) / 2
        return LayerSolution(W.masked_fill_(gone, 0).T.contiguous(), ~gone.T.contiguous(), loss * self._units[name])

    def _cheapest(self, name: str, W: Tensor, columns: slice, count: int) -> Tensor:
        """``(n, width)`` bool: the ``count`` cheapest weights of a column-block of ``W`` ``(B, n)``, the dead first, padding never."""
        variance = self._by_block(name, Tensor.diagonal)[:, columns].square()
        saliency = self._scales[name] * W[columns].T.square() / variance
        saliency = saliency.masked_fill(self._pruned(name, W.device)[:, columns], -torch.inf)
        saliency = saliency.masked_fill(self._padding(name, W.device)[:, columns], torch.inf)
        chosen = saliency.flatten().argsort(stable=True)[:count]
        flat = torch.zeros(saliency.numel(), dtype=torch.bool, device=W.device)
        return flat.index_fill_(0, chosen, True).view(saliency.shape)


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
