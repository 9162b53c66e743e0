"""Refinement of a pruning run: distill each level, starting from its own pruned weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from capruner.batches import BatchFunction, as_batch, batch_size
from capruner.calibration.driver import Calibration
from capruner.checkpoint import StateError
from capruner.distributed import processes
from capruner.files import digest
from capruner.models.modes import weights_restored
from capruner.models.wrappers import first_names
from capruner.refine.distill import SAMPLES, collect, copy_of, inputs_of, zeros_of
from capruner.refine.training import Lesson, train, trainable
from capruner.result import Level, pack_levels, unpack_levels


class Replay(Iterator[Any]):
    """An iterator over batches that keeps copies of the inputs of the first ones.

    Args:
        batches, batch_fn: see :func:`capruner.prune`.
    """

    def __init__(self, batches: Iterator[Any], batch_fn: BatchFunction | None) -> None:
        self.batches, self.batch_fn = batches, batch_fn
        self.first: list[Any] = []
        self._missing = -(-SAMPLES // processes().world_size)

    def __next__(self) -> Any:
        batch = next(self.batches)
        if self._missing > 0:
            inputs = copy_of(as_batch(batch, len(self.first), self.batch_fn)[0])
            self._missing -= batch_size(inputs, len(self.first))
            self.first.append(inputs)
        return batch

    def inputs(self) -> Iterator[Any]:
        """The inputs of the first batches, then of those that have not been read yet."""
        yield from list(self.first)
        yield from inputs_of(self.batches, self.batch_fn)


def refine_levels(calibration: Calibration, levels: list[Level], passes: float) -> list[Level]:
    """Distill each level; masks and predicted losses do not change. The model, which is dense, is restored.

    Args:
        calibration: whose data is trained on, and whose notes report what was done.
        passes: see :func:`capruner.distill`; 0: nothing is done.
    """
    if not passes:
        return levels
    lessons = _Lessons(calibration)
    return [
        calibration.checkpoint.stage(
            functools.partial(_distill, calibration, level, passes, lessons),
            lessons,
            lambda level: pack_levels([level]),
            lambda tensors, values: unpack_levels(tensors.__getitem__, values)[0].to(calibration.parameters),
        )
        for level in levels
    ]


class _Lessons:
    """The dense network's outputs on the first batches, computed when the first level needs them."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._lessons: list[Lesson] = []
        self._digest: str | None = None

    def collect(self) -> list[Lesson]:
        """The lessons (the model must be dense at the first call); raise ``StateError`` if they differ from those of an interrupted run."""
        if self._lessons:
            return self._lessons
        batches, checkpoint = self._calibration.batches, self._calibration.checkpoint
        source = batches.source
        inputs = source.inputs() if isinstance(source, Replay) else inputs_of(source, batches.batch_fn)
        skip_bad = self._calibration.on_bad_batch == "skip"
        self._lessons = collect(self._calibration.model, inputs, processes(), SAMPLES, skip_bad)
        found = digest(lesson.target for lesson in self._lessons)
        if self._digest not in (None, found):
            raise StateError(
                f"the calibration data differs from the data that {checkpoint.folder} was saved with; cannot resume. Pass the same data in the same order "
                "(seed what shuffles or augments it), or delete the folder"
            )
        self._digest = found
        return self._lessons

    def state_dict(self) -> dict[str, Any]:
        return {"digest": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._digest = state["digest"]

    def skip(self) -> None:
        """A finished level has drawn nothing; :meth:`collect` compares the data if another level is distilled."""


def _distill(calibration: Calibration, level: Level, passes: float, lessons: _Lessons) -> Level:
    model, everybody = calibration.model, processes()
    dense = trainable(model)
    with calibration.clock("distill"), everybody.together("distilling"), weights_restored(model):
        targets = lessons.collect()
        _write(model, level)
        said = train(
            model,
            targets,
            {**level.masks, **zeros_of(dense)},  # zeros of other layers do not change either
            passes=passes,
            processes=everybody,
            checkpoint=calibration.checkpoint,
            progress=calibration.progress,
        )
        trained = {name: p.detach().clone() for name, p in dense.items()}
    calibration.notes.distill.append({"sparsity": level.sparsity} | asdict(said))
    weights = {name: trained.get(name, weight) for name, weight in level.weights.items()}
    others = {n: t for n, t in trained.items() if n not in weights and not torch.equal(t, dense[n])}
    return replace(level, weights=weights, others=others)


@torch.no_grad()
def _write(model: nn.Module, level: Level) -> None:
    parameters = first_names(model)
    for name, weight in level.weights.items():
        parameters[name].copy_(weight)
