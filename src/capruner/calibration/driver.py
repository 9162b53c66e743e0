"""One calibration: draw gradients, fold them into a method, and make levels of its solutions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capruner.batches import Batches
from capruner.calibration.enough import ENOUGH, EXPECTED, LEAST, MOST, Sample, milestones
from capruner.calibration.finite import check_heard
from capruner.calibration.gradients import GradientMode, LossFunction, OnBadBatch, gradient_slabs
from capruner.calibration.labels import Labels, draw_uniform
from capruner.calibration.notes import Notes
from capruner.calibration.stream import CalibrationStream
from capruner.checkpoint import Checkpoint, NoCheckpoint
from capruner.core.blocks import BlockLayout, largest
from capruner.core.numerics import working_dtype
from capruner.distributed import Partition, processes
from capruner.methods import LayerSolution, Method, Settings, SparsityLevel, Stopwatch
from capruner.methods.base import RankedMethod
from capruner.models.modes import Mode, eval_mode
from capruner.models.weights import linear_weights
from capruner.result import Level
from capruner.text import some

_LOGGER = logging.getLogger(__name__)


@dataclass
class Calibration:
    """A model, its data, the parameters to prune, and the knobs.

    Attributes:
        model: without wrappers.
        batches: see :func:`capruner.prune`; empty for methods without gradients.
        parameters: ``{name: parameter}``.
        checkpoint: of the run that this calibration is part of.
        clock: seconds by stage, over all calibrations of the run.
        notes: what the run reports.
        whole: these are all layers, and not one of several groups.
    """

    model: nn.Module
    batches: Batches
    loss_fn: LossFunction
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    method: type[Method]
    gradients: GradientMode = "batch"
    labels: Labels = "data"
    on_bad_batch: OnBadBatch = "raise"
    mode: Mode = "eval"
    progress: bool = True
    checkpoint: Checkpoint = field(default_factory=NoCheckpoint)
    clock: Stopwatch = field(default_factory=Stopwatch)
    notes: Notes = field(default_factory=Notes)
    whole: bool = True

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

    @property
    def slab(self) -> int:
        """Gradients that are collected before they are added to the Fisher blocks."""
        # Enough rows for efficient matrix products, few enough to be a small share of the d·B of the Fisher blocks.
        return max(6, max(layout.block_size for layout in self.layouts.values()) // 12)

    def stream(self) -> CalibrationStream:
        """A new pass over the data."""
        device = next(iter(self.parameters.values())).device
        draw = draw_uniform if self.labels == "model" else None
        return CalibrationStream(self.batches, device, draw, self.checkpoint.folder)

    def new_method(self, masks: Mapping[str, Tensor]) -> Method:
        """The method, without gradients yet."""
        partition = Partition(self.layouts, self.method.whole_layers)
        pruned = {
            name: layout.to_blocks(~masks[name], torch.bool)[partition.own(name)]
            for name, layout in self.layouts.items()
        }
        pruner = self.method(partition, self.settings, self.clock, pruned)
        pruner.progress = self.progress and pruner.processes.rank == 0
        return pruner

    def run(self, masks: Mapping[str, Tensor], stream: CalibrationStream) -> Calibrated:
        """Calibrate the method at the model's present weights, some of which ``masks`` (True = keep) have pruned already."""
        pruner = self.new_method(masks)
        where = torch.device(self.settings.fisher_inv_device or stream.device)
        for dtype in {working_dtype(p) for p in self.parameters.values()} if where.type == "cpu" else ():
            pruner.compile(dtype)
        if pruner.uses_gradients:
            with pruner.processes.together("drawing gradients"):
                self._draw(pruner, stream)
            check_heard(pruner.silent(), pruner.partition, self.notes.layers_without_gradient, self.whole)
        weights = {}
        for name, p in self.parameters.items():
            kept = p.detach().masked_fill(~masks[name], 0)
            weights[name] = self.layouts[name].to_blocks(kept, working_dtype(p))[pruner.partition.own(name)]
        with pruner.processes.together("inverting Fisher blocks"):
            pruner.prepare(weights)
        self._report(pruner)
        return Calibrated(pruner, self.parameters, self._samples_per_gradient(pruner, stream))

    def _draw(self, pruner: Method, stream: CalibrationStream) -> None:
        """Fold this rank's share of the gradients into ``pruner``."""
        group, counts = pruner.processes, milestones(self._most_gradients())
        where = torch.device(self.settings.fisher_inv_device or stream.device)
        sample = None if self._decided else Sample(pruner.partition, where)
        shares = [group.share(count) for count in counts]
        self._resume(pruner, stream, sample, shares[-1])
        resumed = stream.taken
        with eval_mode(self.model, self.mode):
            slabs = gradient_slabs(
                self.model,
                stream,
                self.loss_fn,
                self.parameters,
                shares[-1],
                stops=shares,
                mode=self.gradients,
                slab=max(1, self.slab // pruner.processes.world_size),
                on_bad_batch=self.on_bad_batch,
                progress=self.progress and group.rank == 0,
            )
            for count, share in zip(counts, shares):
                if group.any(stream.taken > share):
                    continue  # resumed after it
                self._draw_until(share, slabs, pruner, stream, sample)
                if sample is not None and count < counts[-1]:
                    error = sample.error(count)
                    if count >= LEAST and error <= ENOUGH:
                        break
            slabs.close()
        if resumed and stream.taken == resumed:
            stream.skip()  # so that the next calibration has the next pass
        self.notes.num_grads = int(group.sum(stream.taken))
        self._save(pruner, stream, sample)
        if skipped := stream.skipped:
            _LOGGER.warning(
                "skipped %d of %d calibration batches for NaN or Inf: %s", len(skipped), stream.drawn, some(skipped, 8)
            )
        self.notes.skipped_batches += int(pruner.processes.sum(len(skipped)))

    def _draw_until(
        self,
        share: int,
        slabs: Iterator[Mapping[str, Tensor]],
        pruner: Method,
        stream: CalibrationStream,
        sample: Sample | None,
    ) -> None:
        """Fold in gradients until every rank has drawn its share."""
        dtypes = {name: working_dtype(p) for name, p in self.parameters.items()}
        while True:
            with self.clock("gradients"):
                gradients = next(slabs) if stream.taken < share else None
            with self.clock("exchange"):
                rows = pruner.partition.exchange(None if gradients is None else self._in_blocks(gradients), dtypes)
            if rows is None:
                return
            pruner.add(rows)
            if sample is not None:
                with self.clock("fisher"):
                    sample.add(rows)
            if self.checkpoint.due():
                self._save(pruner, stream, sample)

    @property
    def _decided(self) -> bool:
        """Whether the number of gradients is known."""
        return self.settings.num_grads != "auto" or self.notes.num_grads > 0

    def expected_gradients(self) -> int:
        """The number of gradients, or a guess."""
        return self._most_gradients() if self._decided else min(EXPECTED, self._most_gradients())

    def _most_gradients(self) -> int:
        """The number of gradients, or the most that may be drawn."""
        if self.settings.num_grads != "auto":
            return self.settings.num_grads
        if self.notes.num_grads:
            return self.notes.num_grads
        length = self.batches.length if self.gradients == "batch" else None
        group = processes()
        return min(MOST, group.min(MOST if length is None else max(length, 1)) * group.world_size)

    def _in_blocks(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layouts[name].to_blocks(rows, rows.dtype) for name, rows in gradients.items()}

    def _samples_per_gradient(self, pruner: Method, stream: CalibrationStream) -> float:
        if not pruner.uses_gradients:
            return 1.0
        return pruner.processes.sum(stream.averaged) / pruner.processes.sum(stream.taken)

    def _save(self, pruner: Method, stream: CalibrationStream, sample: Sample | None) -> None:
        layers = pruner.state_dict()
        parts = [*layers.values(), *([] if sample is None else [sample.state_dict()])]
        self.checkpoint.save(parts, {"layers": list(layers), "stream": stream.state_dict()})

    def _resume(self, pruner: Method, stream: CalibrationStream, sample: Sample | None, share: int) -> None:
        """Bring ``pruner`` and ``stream`` to where an interrupted run left them."""
        partition = pruner.partition
        blocks = {name: partition.count(name) for name in self.layouts}

        def load(layers: Sequence[Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
            names = state["layers"]
            for name, tensors in zip(names, layers[: len(names)], strict=True):
                pruner.load_state_dict(name, tensors)
            if sample is not None:
                sample.load_state_dict(layers[len(names)])
            if absent := [name for name in blocks if blocks[name] and name not in names]:
                raise ValueError(f"{absent[0]} is absent")
            stream.load_state_dict(state["stream"])
            if stream.taken > share:
                raise ValueError(f"{stream.taken} gradients are more than {share}")

        self.checkpoint.check_space(
            sum(
                (min(blocks[name], 1) if pruner.whole_layers else blocks[name])
                * layout.block_size**2
                * working_dtype(self.parameters[name]).itemsize
                for name, layout in self.layouts.items()
            )
        )
        self.checkpoint.resume("gradients", load)

    def _report(self, pruner: Method) -> None:
        """Note and log what is unusual about the Fisher blocks."""
        self.notes.shrinkage_by_layer |= pruner.shares
        damped, damp = self.notes.damped_blocks, self.settings.damp
        for name, count in pruner.damped.items():
            damped[name] = max(damped.get(name, 0), count)
            _LOGGER.warning(
                "%s: %d of %d Fisher blocks would not factor at damp=%g and got more damping",
                *(name, count, self.layouts[name].num_blocks, damp),
            )
        for name, count in pruner.drowned.items():
            _LOGGER.warning(
                "%s: damp=%g is below the float32 rounding error of %d of %d Fisher blocks, so their weights may be off: raise damp, or leave it out",
                *(name, damp, count, self.layouts[name].num_blocks),
            )


@dataclass
class Calibrated:
    """A method that is ready to solve.

    Attributes:
        pruner: the method.
        parameters: of the shapes, devices and dtypes that levels have.
        samples_per_gradient: samples that one gradient is a mean over, on average.
    """

    pruner: Method
    parameters: Mapping[str, Tensor]
    samples_per_gradient: float

    def solve(
        self, levels: Sequence[SparsityLevel], counts: Sequence[Mapping[str, Tensor]] | None = None
    ) -> list[Level]:
        """Masks and weights at each level.

        Args:
            counts: by level, steps of the blocks of each layer; None: decided among these layers alone.
        """
        if counts is None:
            own = [[t for t in level.targets if t.names[0] in self.parameters] for level in levels]
            solutions = self.pruner.solve(own)
        else:
            assert isinstance(self.pruner, RankedMethod)
            solutions = self.pruner.solve_counts(counts)
        return [self.level(level.sparsity, solution) for level, solution in zip(levels, solutions)]

    def level(self, sparsity: float, solutions: Mapping[str, LayerSolution]) -> Level:
        """One level from the solutions of all processes."""
        partition = self.pruner.partition
        weights, masks, losses = {}, {}, {}
        for name, p in self.parameters.items():
            layout, solution = partition.layouts[name], solutions[name]
            masks[name] = layout.from_blocks(partition.gather(name, solution.keep)).to(p.device)
            weights[name] = layout.from_blocks(partition.gather(name, solution.weight)).to(p)
            if not torch.isfinite(weights[name]).all():
                raise ValueError(f"the pruned weights of {name} are not finite in {p.dtype}; raise damp")
            # The outer product of a mean over b independent gradients is 1/b of the mean of their outer products.
            losses[name] = partition.processes.sum(solution.loss) * self.samples_per_gradient
        return Level(sparsity, weights, masks, losses)
