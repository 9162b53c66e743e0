"""One calibration: gradients out of the model, into a method, ready to solve. What ``prune`` and ``compensate_masks`` share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from capruner.batches import Batches
from capruner.distributed import Shards, world
from capruner.finite import NO_GRADIENT, check_heard
from capruner.gradients import (
    GradientMode,
    LossFunction,
    OnBadBatch,
    Position,
    gradient_slabs,
)
from capruner.layout import BlockLayout, largest
from capruner.memory import shown
from capruner.methods import LayerSolution, Method, Settings, Stopwatch, Target
from capruner.methods.base import RankedMethod, SecondOrderMethod
from capruner.modes import eval_mode
from capruner.numerics import working_dtype
from capruner.result import Level
from capruner.resume import Record, packed, position_of, unpacked
from capruner.state import State, StateError
from capruner.weights import linear_weights

_LOGGER = logging.getLogger(__name__)

WORKING_SET = 128 * 2**20
"""Chunks of blocks that are being eliminated or solved, in bytes; the same whatever the model."""


@dataclass
class Calibration:
    """The fixed part of a run: a model, its data, the parameters to prune, the knobs.

    Attributes:
        model: not wrapped; called in eval mode.
        batches: see :func:`capruner.prune`; None for methods without gradients.
        parameters: ``{name: parameter}``.
        budget: bytes that the Fisher blocks and gradients of one process may take; None: no limit.
        on_bad_batch: see :func:`capruner.prune`.
        state: where to save what is done, and to find what an earlier run has done.
        clock: seconds by stage, over all calibrations.
        notes: what the report says of all calibrations: ``skipped_batches``; ``layers_without_gradient``, by name;
            ``damped_blocks`` by layer, the most of one calibration.
        whole: these are all layers, and not one of several groups.
    """

    model: nn.Module
    batches: Batches | None
    loss_fn: LossFunction
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    gradients: GradientMode = "batch"
    progress: bool = True
    budget: int | None = None
    on_bad_batch: OnBadBatch = "raise"
    state: State | None = None
    clock: Stopwatch = field(default_factory=Stopwatch)
    notes: dict[str, Any] = field(
        default_factory=lambda: {
            "skipped_batches": 0,
            "layers_without_gradient": [],
            "damped_blocks": {},
            "shrinkage_by_layer": {},
        }
    )
    whole: bool = True
    _digests: list[str] = field(default_factory=list, init=False)
    _samples_per_gradient: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        size, group = self.settings.fisher_block_size, self.settings.pattern.group
        limit = largest(sum(p.numel() for p in self.parameters.values()))
        linear = linear_weights(self.model)
        self.layouts = {}
        for name, p in self.parameters.items():
            inputs = linear[name].inputs if name in linear else 1
            self.layouts[name] = BlockLayout.of(
                p.shape, size, inputs if group > 1 or inputs == 0 else None, group, limit
            )

    def run(self, method: type[Method], kept: Mapping[str, Tensor]) -> Method:
        """Calibrate ``method`` at the model's present weights, of which ``kept`` (bool, True = stays) says what earlier pruning left."""
        shards = Shards(self.layouts, method.whole_layers)
        pruner = method(shards, self.settings, self.clock)
        where = torch.device(self.settings.fisher_inv_device or next(iter(self.parameters.values())).device)
        for dtype in {working_dtype(p) for p in self.parameters.values()} if where.type == "cpu" else ():
            pruner.compile(dtype)
        if pruner.uses_gradients:
            with shards.together("drawing gradients"):
                self._feed(pruner)
            check_heard(pruner.silent(), shards, self.notes["layers_without_gradient"], self.whole)
        dead, weights = {}, {}
        for name, p in self.parameters.items():
            own = shards.own(name)
            dead[name] = self.layouts[name].to_blocks(~kept[name], torch.bool)[own]
            weights[name] = self.layouts[name].to_blocks(p.detach(), working_dtype(p))[own].masked_fill(dead[name], 0)
        with shards.together("inverting Fisher blocks"):
            pruner.prepare(weights, dead)
        self.notes["shrinkage_by_layer"] |= pruner.shares
        damped = self.notes["damped_blocks"]
        for name, count in pruner.damped.items():
            damped[name] = max(damped.get(name, 0), count)
            _LOGGER.warning(
                "%s: %d of %d Fisher blocks would not factor at damp=%g and got more",
                *(name, count, self.layouts[name].num_blocks, self.settings.damp),
            )
        for name, count in pruner.drowned.items():
            _LOGGER.warning(
                "%s: damp=%g is below the float32 rounding error of %d of %d Fisher blocks, so their weights may be off: raise damp, or leave it out",
                *(name, self.settings.damp, count, self.layouts[name].num_blocks),
            )
        return pruner

    def _feed(self, pruner: Method) -> None:
        if self.batches is None:
            raise ValueError(f"method {pruner.name!r} needs calibration data: give `batches`")
        shards = pruner.shards
        batches = self.batches
        dtypes = {name: working_dtype(p) for name, p in self.parameters.items()}
        mine = self._share(shards)
        position, self._digests = (Position(), []) if self.state is None else self._found(self.state, pruner)
        if self.state is not None:
            batches = replace(batches, seen=Record(self.state, self._digests))
        if mine and position.taken == mine:
            # All were drawn by a run that was killed then; the next pass has to come after this one all the same.
            batches.pass_over(position.batches)
        with eval_mode(self.model):
            slabs = gradient_slabs(
                self.model,
                batches,
                self.loss_fn,
                self.parameters,
                mine,
                mode=self.gradients,
                slab=max(1, self.slab() // shards.size),
                on_bad_batch=self.on_bad_batch,
                position=position,
                progress=self.progress and shards.rank == 0,
            )
            while True:
                with self.clock("gradients"):
                    gradients = next(slabs, None) if mine else None
                with self.clock("exchange"):
                    rows = shards.exchange(None if gradients is None else self._in_blocks(gradients), dtypes)
                if rows is None:
                    break
                pruner.add(rows)
                if self.state is not None and self.state.due():
                    self._save(self.state, pruner, position)
        if self.state is not None:
            self._save(self.state, pruner, position)
        if position.skipped:
            some = ", ".join(map(str, position.skipped[:8])) + (", ..." if len(position.skipped) > 8 else "")
            _LOGGER.warning(
                "skipped %d of %d calibration batches for NaN or Inf: %s", len(position.skipped), position.batches, some
            )
        self.notes["skipped_batches"] += int(shards.sum(len(position.skipped)))
        self._samples_per_gradient = shards.sum(position.averaged) / shards.sum(position.taken)

    def _share(self, shards: Shards) -> int:
        """Of ``num_grads`` each process draws its share; the first ones draw what is left over."""
        return self.settings.num_grads // shards.size + (shards.rank < self.settings.num_grads % shards.size)

    def _found(self, state: State, pruner: Method) -> tuple[Position, list[str]]:
        """Where an earlier run had stopped drawing, ``pruner`` being brought to where it was then, and the digests of the batches drawn."""
        state.check_space(self._bytes_saved(pruner))
        saved = state.load_feed()
        if saved is None:
            return Position(), []
        layers, place = saved
        try:
            for name, tensors in zip(place["layers"], layers, strict=True):
                pruner.load(name, tensors)
            own = {name: pruner.shards.own(name) for name in pruner.layouts}
            if absent := [n for n, blocks in own.items() if blocks.stop > blocks.start and n not in place["layers"]]:
                raise ValueError(f"{absent[0]} is absent")
            return position_of(place, self._share(pruner.shards))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise StateError(f"{state.folder} holds no gradients of this run ({error}); {state.remedy}") from error

    def _bytes_saved(self, pruner: Method) -> int:
        blocks = {name: own.stop - own.start for name in pruner.layouts for own in [pruner.shards.own(name)]}
        return sum(
            (min(blocks[name], 1) if pruner.whole_layers else blocks[name])
            * layout.block_size**2
            * working_dtype(self.parameters[name]).itemsize
            for name, layout in pruner.layouts.items()
        )

    def _save(self, state: State, pruner: Method, position: Position) -> None:
        with self.clock("state"):
            layers = pruner.state()
            place = {
                "layers": list(layers),
                "taken": position.taken,
                "batches": position.batches,
                "samples": position.samples,
                "averaged": position.averaged,
                "skipped": position.skipped,
                "digests": self._digests,
            }
            state.notes |= self.notes | {"seconds": self.clock.seconds}
            state.save_feed(list(layers.values()), place)

    def _step(self, calibrate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The outcome of a calibration: an earlier run's if it had come so far."""
        assert self.state is not None
        found = self.state.next_step()
        if found is not None:
            outcome, digests = found
            with Shards({}).together("comparing the calibration data"):
                # Also where no gradient is left to draw: other data would have given another outcome.
                if self.batches is not None:
                    replace(self.batches, seen=Record(self.state, digests)).pass_over(len(digests))
            device = next(iter(self.parameters.values())).device
            return {key: tensor.to(self.settings.fisher_inv_device or device) for key, tensor in outcome.items()}
        self._digests = []
        outcome = calibrate()
        with self.clock("state"):
            self.state.notes |= self.notes | {"seconds": self.clock.seconds}
            with Shards({}).together("saving the state"):
                self.state.finish_step(outcome, self._digests)
        return outcome

    def _in_blocks(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layouts[name].to_blocks(rows, rows.dtype) for name, rows in gradients.items()}

    def levels(
        self, method: type[Method], kept: Mapping[str, Tensor], rungs: Sequence[tuple[float, Sequence[Target]]]
    ) -> list[Level]:
        """The model at each ``(sparsity, targets)``, as tensors like the parameters; the same on every process.

        Within the memory budget: layers that do not fit together are calibrated one group after the other.
        """
        parts = self.parts(method)
        found = self._levels(parts, method, kept, rungs)
        if set(self.notes["layers_without_gradient"]) >= self.parameters.keys():
            raise ValueError(NO_GRADIENT)
        return [merged(levels) for levels in zip(*found)]

    def _levels(
        self,
        parts: Sequence[Calibration],
        method: type[Method],
        kept: Mapping[str, Tensor],
        rungs: Sequence[tuple[float, Sequence[Target]]],
    ) -> list[list[Level]]:
        """The levels of each part."""
        targets = [targets for _, targets in rungs]
        if all(any(set(t.names) <= part.parameters.keys() for part in parts) for ts in targets for t in ts):
            # No target reaches over two groups: each group is solved on its own.
            return [part._solved(method, kept, rungs) for part in parts]
        scores: dict[str, Tensor] = {}
        for part in parts:
            scores |= part._scores(method, kept)
        judge = method(Shards(self.layouts, method.whole_layers), self.settings, self.clock)
        assert isinstance(judge, RankedMethod)
        counts = [judge.count(scores, ts) for ts in targets]
        return [part._solved(method, kept, rungs, counts) for part in parts]

    def _scores(self, method: type[Method], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the steps of this group's layers compete with. The inverses are free again before the next group takes as much."""

        def calibrate() -> dict[str, Tensor]:
            pruner = self.run(method, kept)
            assert isinstance(pruner, RankedMethod)
            return pruner.scores()

        return calibrate() if self.state is None else self._step(calibrate)

    def _solved(
        self,
        method: type[Method],
        kept: Mapping[str, Tensor],
        rungs: Sequence[tuple[float, Sequence[Target]]],
        counts: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[Level]:
        def calibrate() -> list[Level]:
            return self.solved_by(self.run(method, kept), rungs, counts)

        if self.state is None:
            return calibrate()
        outcome = self._step(lambda: packed(calibrate()))
        try:
            return [unpacked(outcome, index, s, self.parameters) for index, (s, _) in enumerate(rungs)]
        except (KeyError, RuntimeError) as error:
            raise StateError(
                f"{self.state.folder} holds no outcome of this run ({error}); {self.state.remedy}"
            ) from error

    def whole_run(self, method: type[Method], kept: Mapping[str, Tensor]) -> Method:
        """Calibrate all layers together, to be solved later with :meth:`solved_by`.

        Raises:
            ValueError: they do not fit the memory budget together.
        """
        parts = self.parts(method)
        if len(parts) > 1:
            assert self.budget is not None
            raise ValueError(
                f"memory_budget={shown(self.budget)} calibrates the layers in {len(parts)} groups, and calibrate() holds all of them at once; call prune() "
                "with the sparsities instead, give more memory, a smaller fisher_block_size, or method='fast_cap'"
            )
        return self.run(method, kept)

    def solved_by(
        self,
        pruner: Method,
        rungs: Sequence[tuple[float, Sequence[Target]]],
        counts: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[Level]:
        """The levels of a calibrated method; ``counts``: what its blocks do, where layers of other calibrations compete too."""
        if counts is None:
            solutions = pruner.solve([[t for t in ts if t.names[0] in self.parameters] for _, ts in rungs])
        else:
            assert isinstance(pruner, RankedMethod)
            solutions = pruner.solve_counts(counts)
        return [self.level(pruner.shards, s, solution) for (s, _), solution in zip(rungs, solutions)]

    def parts(self, method: type[Method]) -> list[Calibration]:
        """This calibration cut into groups of layers whose Fisher blocks fit the budget."""
        if self.budget is None or not issubclass(method, SecondOrderMethod):
            return [self]
        size = world()[1]
        need = {name: self._bytes(name) // size for name in self.layouts}
        dearest = max(need, key=need.__getitem__)
        if need[dearest] + WORKING_SET > self.budget:
            raise ValueError(
                f"memory_budget={shown(self.budget)} is too small: {dearest} alone needs {shown(need[dearest] + WORKING_SET, up=True)} at "
                f"fisher_block_size={self.settings.fisher_block_size}; give that much, a smaller fisher_block_size, or method='fast_cap'"
            )
        groups: list[list[str]] = [[]]
        room = self.budget - WORKING_SET
        for name, bytes_ in need.items():
            if bytes_ > room and groups[-1]:
                groups.append([])
                room = self.budget - WORKING_SET
            groups[-1].append(name)
            room -= bytes_
        if len(groups) > 1 and self.batches is not None and self.batches.once:
            raise ValueError(
                f"memory_budget={shown(self.budget)} needs {len(groups)} groups of layers, each with passes of its own over the data, but "
                "`batches` is an iterator, which ends after one; give a DataLoader or a list"
            )
        if self.progress and world()[0] == 0:
            total = shown(sum(need.values()) + WORKING_SET)
            tqdm.write(
                f"Fisher blocks need {total} at once; {len(groups)} groups of layers fit {shown(self.budget)}",
                file=sys.stderr,
            )
        whole = len(groups) == 1
        return [
            replace(self, parameters={name: self.parameters[name] for name in group}, whole=whole) for group in groups
        ]

    def memory(self, method: type[Method], parts: Sequence[Calibration]) -> tuple[int, int]:
        """Bytes of this process's share of all Fisher blocks, and the most that one of ``parts`` takes beside the model."""
        size = world()[1]
        fisher = {name: self._fisher_bytes(name, method) for name in self.layouts}
        if issubclass(method, SecondOrderMethod):
            peak = max(sum(part._bytes(name) for name in part.layouts) for part in parts) // size + WORKING_SET
        else:
            rows = 16 + (
                self.slab() if method.uses_gradients else 0
            )  # besides gradients: copies, scores, the order of a sort
            peak = sum(fisher[name] + self._row_bytes(name) * rows for name in self.layouts) // size
        return sum(fisher.values()) // size, peak

    def _bytes(self, name: str) -> int:
        """Fisher blocks, a slab of gradients, and what else is kept per weight (order, losses, weights, masks)."""
        return self._row_bytes(name) * (self.layouts[name].block_size + self.slab() + 8)

    def _fisher_bytes(self, name: str, method: type[Method]) -> int:
        blocks = self.layouts[name].num_blocks if issubclass(method, SecondOrderMethod) else int(method.uses_gradients)
        return blocks * self.layouts[name].block_size ** 2 * working_dtype(self.parameters[name]).itemsize

    def _row_bytes(self, name: str) -> int:
        """One number for each weight of a layer."""
        layout = self.layouts[name]
        return layout.num_blocks * layout.block_size * working_dtype(self.parameters[name]).itemsize

    def slab(self) -> int:
        """Gradients that are kept before they are added to the Fisher blocks."""
        # Enough rows for efficient matrix products, few enough to stay a small share of the d·B of the Fisher blocks.
        return max(6, max(layout.block_size for layout in self.layouts.values()) // 12)

    def level(self, shards: Shards, sparsity: float, solutions: Mapping[str, LayerSolution]) -> Level:
        """One level from the solutions of all processes."""
        weights, masks, losses = {}, {}, {}
        for name, p in self.parameters.items():
            solution = solutions[name]
            masks[name] = self.layouts[name].from_blocks(shards.gather(name, solution.keep)).to(p.device)
            weights[name] = self.layouts[name].from_blocks(shards.gather(name, solution.weight)).to(p)
            if not torch.isfinite(weights[name]).all():
                raise ValueError(f"the pruned weights of {name} are not finite in {p.dtype}; raise damp")
            # The outer product of a mean over b independent gradients is 1/b of the mean of their outer products.
            losses[name] = shards.sum(solution.loss) * self._samples_per_gradient
        return Level(sparsity, weights, masks, losses)


def merged(levels: Sequence[Level]) -> Level:
    """One level out of the same level of several groups of layers."""
    first = levels[0]
    together: list[dict[str, Any]] = [{}, {}, {}]
    for level in levels:
        for whole, part in zip(together, (level.weights, level.masks, level.losses)):
            whole |= part
    return Level(first.sparsity, *together)
