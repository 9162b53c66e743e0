"""The interface of a pruning method: add gradients, then solve for any number of sparsity levels."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from capruner.core.allocation import Score, allocate, step_scores
from capruner.core.elimination import Elimination, compensate_prefixes
from capruner.core.factors import cholesky, invert
from capruner.core.fisher import RUNGS, BlockFisher, Solver
from capruner.core.numerics import NotPositiveDefiniteError
from capruner.core.patterns import Pattern
from capruner.core.shrinkage import phases
from capruner.distributed import Partition

MOST_DAMPED = 0.05
"""Raise if more than this fraction of a layer's blocks needs extra damping."""

PATIENCE = 1.0
"""Seconds before a progress bar appears."""


@dataclass(frozen=True)
class Settings:
    """The knobs of :class:`capruner.PruneConfig` that a method reads, with the method's defaults filled in."""

    num_grads: int | Literal["auto"]
    fisher_block_size: int | None
    damp: float
    relative_damp: bool
    shrinkage: float | None
    solver: Solver
    score: Score
    blocks_in_parallel: int | None
    fisher_inv_device: str | None
    block_size: int | None
    costs: Mapping[str, float] | None
    pattern: Pattern


@dataclass(frozen=True)
class Target:
    """A number of zeros over some layers.

    Attributes:
        names: the layers.
        numel: number of their weights.
        sparsity: fraction of these weights to prune.
    """

    names: tuple[str, ...]
    numel: int
    sparsity: float

    def steps(self, group: int = 1) -> int:
        """Number of weights to prune, or of groups of ``group`` weights, rounded."""
        return round(self.sparsity * (self.numel / group))


@dataclass(frozen=True)
class SparsityLevel:
    """What is asked of one level.

    Attributes:
        sparsity: over all layers.
        targets: each layer is in one of them.
    """

    sparsity: float
    targets: tuple[Target, ...]


@dataclass(frozen=True)
class LayerSolution:
    """One layer at one sparsity: the blocks that this process owns.

    Attributes:
        weight: ``(n, B)``, exactly 0 where the mask is False.
        keep: ``(n, B)`` bool, the mask, True = keep.
        loss: predicted increase of the loss, ``½ w_Sᵀ (H[S,S])⁻¹ w_S``; 0 for methods without a model of the loss.
    """

    weight: Tensor
    keep: Tensor
    loss: float


@dataclass
class Stopwatch:
    """Seconds by stage, CUDA work included."""

    seconds: dict[str, float] = field(default_factory=dict)

    def load_state_dict(self, seconds: Mapping[str, float]) -> None:
        """Restore the seconds; raises ``ValueError`` if they are not numbers."""
        if not all(type(value) in (int, float) for value in seconds.values()):
            raise ValueError(f"seconds are {seconds!r}")
        self.seconds = dict(seconds)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Method(ABC):
    """One calibration of some layers. Every tensor covers the blocks that this process owns.

    Call :meth:`add` with every gradient, :meth:`prepare` once, then :meth:`solve` any number of times.

    Args:
        partition: the layers, in the order that breaks ties, and which process owns which of their blocks.
        settings: the knobs.
        clock: collects the seconds of each stage.
        pruned: ``(n, B)`` bool by layer, True = pruned by an earlier mask; None: nothing is.
    """

    name: ClassVar[str]
    uses_gradients: ClassVar[bool] = True
    default_damp: ClassVar[float] = 1e-2
    """Relative to the mean diagonal: the same share whatever the scale of the loss, the size of the batches and the layer. See docs/studies/damping.md."""
    shrinks: ClassVar[bool] = False
    """True where Fisher blocks are shrunk by default."""
    competing: ClassVar[bool] = False
    """True where the blocks of all layers compete by losses, which costs can divide."""
    whole_layers: ClassVar[bool] = False
    """True for methods that cannot split a layer over processes."""

    def __init__(
        self, partition: Partition, settings: Settings, clock: Stopwatch, pruned: Mapping[str, Tensor] | None = None
    ) -> None:
        self.partition, self.processes = partition, partition.processes
        self.layouts = partition.layouts
        self.settings = settings
        self.clock = clock
        self.progress = False
        """Show progress bars."""
        self._fishers: dict[str, BlockFisher] = {}
        self._earlier = pruned or {}
        self.drowned: dict[str, int] = {}
        """Blocks of each layer, other processes' too, whose absolute damping is less than the rounding error of their Fisher matrix."""
        self.shares: dict[str, float] = {}
        """Mean share of the common Fisher matrix in the blocks of each layer, other processes' too; see :mod:`capruner.core.shrinkage`."""
        self.damped: dict[str, int] = {}
        """Blocks of each layer, other processes' too, that needed more damping than asked for."""

    def _bar(self, names: Iterable[str], what: str) -> Iterable[str]:
        """The layers, with a progress bar."""
        hidden = None if self.progress else True  # None: where nobody looks
        return tqdm(list(names), desc=what, unit="layer", delay=PATIENCE, disable=hidden, leave=False)

    def _own_shape(self, name: str) -> tuple[int, int]:
        return self.partition.count(name), self.layouts[name].block_size

    def _padding(self, name: str, device: torch.device) -> Tensor:
        return self.layouts[name].is_padding(device)[self.partition.own(name)]

    def _pruned(self, name: str, device: torch.device) -> Tensor:
        if name in self._earlier:
            return self._earlier[name].to(device)
        return torch.zeros(self._own_shape(name), dtype=torch.bool, device=device)

    @abstractmethod
    def add(self, slab: Mapping[str, Tensor]) -> None:
        """Fold in ``{name: (k, n, B)}`` gradients."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """The gradients added so far, folded, by layer; the tensors themselves, not copies."""
        return {name: fisher.tensors() for name, fisher in self._fishers.items()}

    def silent(self) -> list[str]:
        """Layers of which this process owns blocks, all of whose gradients were exactly zero. Valid between ``add`` and ``prepare``."""
        return [name for name, fisher in self._fishers.items() if not fisher.largest]

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Resume from the :meth:`state_dict` of a layer; raise ``ValueError`` if it is from a different calibration."""
        raise ValueError(f"method {self.name!r} keeps no gradients of {name}")

    def compile(self, dtype: torch.dtype) -> None:  # noqa: B027
        """Compile what :meth:`prepare` runs on a CPU, so that a broken compiler shows before the gradients are computed."""

    @abstractmethod
    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        """After the last gradient: ``(n, B)`` float32 weights of each layer."""

    @abstractmethod
    def solve(self, levels: Sequence[Sequence[Target]]) -> list[dict[str, LayerSolution]]:
        """Masks and weights of every layer, for the targets of each level; raise ``ValueError`` if one is out of reach."""


class RankedMethod(Method):
    """A method whose blocks each have an order of elimination, so that a target is met by :func:`capruner.core.allocation.allocate`."""

    def __init__(
        self, partition: Partition, settings: Settings, clock: Stopwatch, pruned: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(partition, settings, clock, pruned)
        self._eliminations: dict[str, Elimination] = {}
        self._scores: dict[str, Tensor] = {}
        self._unit = 1 if settings.pattern.n_m is not None else settings.pattern.group

    def _rank(self, name: str, elimination: Elimination, units: Tensor | None = None) -> None:
        """Store an order. ``units``: ``(n,)``, the unit of the losses of each block; None: 1."""
        # Two bytes per weight instead of eight: the order is kept for every weight of the model.
        small = elimination.order.shape[1] <= torch.iinfo(torch.int16).max
        order = elimination.order.to(torch.int16) if small else elimination.order
        self._eliminations[name] = Elimination(order, elimination.losses)
        # Groups that are pruned together compete as one.
        losses = elimination.losses[:, :: self._unit]
        if units is not None:  # in float64: a float32 cannot hold the losses of tiny gradients
            losses = losses * units[:, None].to(losses.device)
        scores = step_scores(losses, self.settings.score)
        self._scores[name] = scores if self.settings.costs is None else scores / self.settings.costs[name]

    def solve(self, levels: Sequence[Sequence[Target]]) -> list[dict[str, LayerSolution]]:
        with self.clock("allocate"):
            scores = self.scores()
            counts = [self.count(scores, targets) for targets in levels]
        return self.solve_counts(counts)

    def scores(self) -> dict[str, Tensor]:
        """Per layer the scores that its steps compete with, those of other processes' blocks too."""
        return {name: self.partition.gather(name, scores) for name, scores in self._scores.items()}

    def count(self, scores: Mapping[str, Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Per layer the steps that each of its blocks takes, other processes' blocks too.

        Args:
            scores: see :meth:`scores`; they may hold layers of other calibrations.
        """
        counts: dict[str, Tensor] = {}
        for target in targets:
            competing = [scores[name] for name in target.names]
            if self.settings.pattern.n_m is not None:  # the pattern itself says how far each block goes
                steps = [(s < torch.inf).sum(dim=1) for s in competing]
            else:
                steps = allocate(competing, target.steps(self._unit), target.names)
            counts |= {name: s * self._unit for name, s in zip(target.names, steps)}
        return counts

    def solve_counts(self, counts: Sequence[Mapping[str, Tensor]]) -> list[dict[str, LayerSolution]]:
        """The layers of this calibration, for each decision of :meth:`count`."""
        solutions: list[dict[str, LayerSolution]] = [{} for _ in counts]
        with self.clock("compensate"):
            for name in self._bar(self.layouts, "re-fitting weights"):
                elimination = self._eliminations[name]
                of_layer = torch.stack([c[name][self.partition.own(name)] for c in counts]).to(elimination.order.device)
                weights, losses = self._compensate(name, elimination.order, of_layer)
                for solution, w, k, loss in zip(solutions, weights, of_layer, losses):
                    solution[name] = LayerSolution(w, elimination.keep_mask(k), float(loss.sum()))
        return solutions

    @abstractmethod
    def _compensate(self, name: str, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``(levels, n, B)`` and losses ``(levels, n)`` of a layer whose blocks take ``(levels, n)`` steps."""


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Prefix :class:`NotPositiveDefiniteError` with the layer name."""
    try:
        yield
    except NotPositiveDefiniteError as error:
        raise NotPositiveDefiniteError(f"{layer}: {error}") from None


class SecondOrderMethod(RankedMethod):
    """Fisher blocks, their inverses, an order from them, and the closed-form OBS update. Methods differ in the order."""

    competing = True

    def __init__(
        self, partition: Partition, settings: Settings, clock: Stopwatch, pruned: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(partition, settings, clock, pruned)
        self._inverses: dict[str, Tensor] = {}
        self._units: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def compile(self, dtype: torch.dtype) -> None:
        one = torch.ones(1, 1, 1, dtype=dtype)
        invert(one.double(), one)
        cholesky(one, torch.zeros(1, 1, dtype=torch.int64))

    def add(self, slab: Mapping[str, Tensor]) -> None:
        with self.clock("fisher"):
            for name, rows in slab.items():
                self._fisher(name, rows).add(rows)

    def _fisher(self, name: str, like: Tensor) -> BlockFisher:
        """The Fisher blocks of a layer that this process owns; created at the first call."""
        if name not in self._fishers:
            blocks, size = self._own_shape(name)
            device = torch.device(self.settings.fisher_inv_device or like.device)
            self._fishers[name] = BlockFisher(
                blocks,
                size,
                None if self.settings.num_grads == "auto" else self.settings.num_grads,
                self.settings.damp,
                relative_damp=self.settings.relative_damp,
                solver=self.settings.solver,
                shrinkage=self.settings.shrinkage,
                dead=self._pruned(name, device) | self._padding(name, device),
                device=device,
                dtype=like.dtype,
            )
        return self._fishers[name]

    def load_state_dict(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._fisher(name, tensors["peak"]).load(tensors)

    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        for name in self._bar(self.layouts, "inverting, eliminating"):
            fisher, layout = self._fishers.pop(name), self.layouts[name]
            with naming(name):
                with self.clock("fisher"):
                    if self.settings.shrinkage != 0:
                        self._set_common(name, fisher)
                    H = fisher.inverse(RUNGS)
                if self.settings.shrinkage != 0:
                    self.shares[name] = self.processes.sum(float(fisher.shares.sum())) / layout.num_blocks
                self._count_damped(name, fisher.damped)
                self._count_drowned(name, fisher.drowned)
                with self.clock("eliminate"):
                    weight = weights[name].to(H)
                    pruned, padding = self._pruned(name, H.device), self._padding(name, H.device)
                    self._rank(name, self._order(weight, H, pruned, padding), fisher.units)
            self._weights[name], self._inverses[name], self._units[name] = weight, H, fisher.units

    def _set_common(self, name: str, fisher: BlockFisher) -> None:
        """Average the layer's blocks over all processes."""
        layout, own, repeat = self.layouts[name], self.partition.own(name), phases(self.layouts[name])
        phase_of = torch.arange(own.start, own.stop, device=fisher.shares.device) % repeat
        whole = layout.num_blocks - bool(layout.padding) if layout.num_blocks > 1 else 1
        common = fisher.sums(phase_of, repeat, max(0, min(own.stop, whole) - own.start))
        self.processes.all_reduce([common])
        fisher.set_common(common, phase_of)

    def _count_damped(self, name: str, own: int) -> None:
        damped, blocks = self.processes.total(own, "inverting Fisher blocks"), self.layouts[name].num_blocks
        if damped > MOST_DAMPED * blocks:
            raise NotPositiveDefiniteError(
                f"{damped} of {blocks} Fisher blocks will not factor at damp={self.settings.damp:g}: raise it tenfold, or take more gradients "
                f"(up to {MOST_DAMPED:.0%} of a layer's blocks would get more damping by themselves)"
            )
        if damped:
            self.damped[name] = damped

    def _count_drowned(self, name: str, own: int) -> None:
        if drowned := self.processes.total(own, "inverting Fisher blocks"):
            self.drowned[name] = drowned

    def solve_masks(self, pruned: Mapping[str, Tensor]) -> dict[str, LayerSolution]:
        """The weights for given masks: ``(n, B)`` bool per layer, True = pruned."""
        solution = {}
        with self.clock("compensate"):
            for name in self._bar(pruned, "re-fitting weights"):
                zeros = pruned[name].to(self._weights[name].device)
                order = zeros.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
                weights, losses = self._compensate(name, order, zeros.sum(dim=1)[None])
                solution[name] = LayerSolution(weights[0], ~zeros, float(losses.sum()))
        return solution

    @abstractmethod
    def _order(self, weight: Tensor, fisher_inv: Tensor, pruned: Tensor, padding: Tensor) -> Elimination:
        """The order in which the weights of each block are pruned."""

    def _compensate(self, name: str, order: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        with naming(name):
            weights, losses = compensate_prefixes(
                self._weights[name],
                self._inverses[name],
                order,
                counts,
                blocks_in_parallel=self.settings.blocks_in_parallel,
            )
        return weights, losses * self._units[name].to(losses.device)
