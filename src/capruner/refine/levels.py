"""The refinement of a pruning result: each level is distilled, from its own pruned weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from capruner.batches import Batches, BatchFunction, as_batch, batch_size
from capruner.distributed import Shards, world
from capruner.files import digest
from capruner.methods import Stopwatch
from capruner.modes import weights_restored
from capruner.refine.distill import SAMPLES, collect, copy_of, inputs_of, zeros_of
from capruner.refine.training import Distillation, Lesson, train, trainable
from capruner.result import Level
from capruner.state import State, StateError
from capruner.wrappers import first_names


class Replay(Iterator[Any]):
    """An iterator over batches that keeps copies of the inputs of the first ones, as they pass.

    Args:
        batches, batch_fn: see :func:`capruner.prune`.
    """

    def __init__(self, batches: Iterator[Any], batch_fn: BatchFunction | None) -> None:
        self.batches, self.batch_fn = batches, batch_fn
        self.first: list[Any] = []
        self._missing = -(-SAMPLES // world()[1])

    def __next__(self) -> Any:
        batch = next(self.batches)
        if self._missing > 0:
            inputs = copy_of(as_batch(batch, len(self.first), self.batch_fn)[0])
            self._missing -= batch_size(inputs, len(self.first))
            self.first.append(inputs)
        return batch

    def inputs(self) -> Iterator[Any]:
        """The inputs of the first batches, and of those that have not been read yet."""
        yield from list(self.first)
        yield from inputs_of(self.batches, self.batch_fn)


class Distiller:
    """Distills levels of one pruning run.

    Args:
        model: dense; afterwards, also after an exception, it is as before.
        batches: whose source must be a :class:`Replay` if it is an iterator.
        passes: see :func:`capruner.distill`.
        skip_bad: leave out batches for which the dense network's outputs are not finite.
        state: where to save what is done, and to find what an earlier run has done.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        passes: float,
        skip_bad: bool,
        state: State | None,
        clock: Stopwatch,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.passes, self.skip_bad = model, batches, passes, skip_bad
        self.state, self.clock, self.progress = state, clock, progress
        self.shards = Shards({})
        self.notes: list[dict[str, Any]] = []
        """By level: its sparsity, and what :class:`Distillation` says."""
        self._lessons: list[Lesson] = []
        self._digest: Tensor | None = None

    def __call__(self, level: Level) -> Level:
        """The level with distilled weights and what else the training changed; masks and predicted losses stay."""
        outcome = self._outcome(level)
        try:
            before, after, passes, lr, steps = outcome["distillation"].tolist()
            said = Distillation(before, after, passes, lr, int(steps))
            own = trainable(self.model)
            found = {n: outcome[f"parameter/{n}"].to(p).view(p.shape) for n, p in own.items()}
            weights = {n: found.get(n, weight) for n, weight in level.weights.items()}
        except (KeyError, RuntimeError, ValueError, IndexError, TypeError) as error:
            if self.state is None:
                raise
            raise StateError(f"{self.state.folder} holds no distilled level ({error}); {self.state.remedy}") from error
        self.notes.append({"sparsity": level.sparsity} | asdict(said))
        others = {n: t for n, t in found.items() if n not in weights and not torch.equal(t, own[n])}
        return replace(level, weights=weights, others=others)

    def _outcome(self, level: Level) -> dict[str, Tensor]:
        if self.state is None:
            return self._distilled(level)
        step = self.state.next_step()
        if step is not None:
            self._digest = step[0].get("digest")
            return step[0]
        outcome = self._distilled(level)
        self.state.notes |= {"seconds": self.clock.seconds}
        with self.clock("state"), self.shards.together("saving the state"):
            self.state.finish_step(outcome, [])
        return outcome

    def _distilled(self, level: Level) -> dict[str, Tensor]:
        with self.clock("distill"), self.shards.together("distilling"), weights_restored(self.model):
            self._lessons = self._lessons or self._collected()
            parameters = first_names(self.model)
            with torch.no_grad():
                for name, weight in level.weights.items():
                    parameters[name].copy_(weight)
            said = train(
                self.model,
                self._lessons,
                {**level.masks, **zeros_of(trainable(self.model))},  # what was zero elsewhere stays so, too
                passes=self.passes,
                shards=self.shards,
                checkpoint=self.state,
                progress=self.progress,
            )
            found = {f"parameter/{n}": p.detach().clone() for n, p in trainable(self.model).items()}
        assert self._digest is not None
        numbers = torch.tensor([said.before, said.after, said.passes, said.lr, said.steps], dtype=torch.float64)
        return found | {"distillation": numbers, "digest": self._digest}

    def _collected(self) -> list[Lesson]:
        batches = self.batches
        source = batches.source
        inputs = source.inputs() if isinstance(source, Replay) else inputs_of(source, batches.batch_fn)
        lessons = collect(self.model, inputs, self.shards, SAMPLES, self.skip_bad)
        content = bytes.fromhex(digest(lesson.target for lesson in lessons))
        found = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self.state is not None and self._digest is not None and not torch.equal(found, self._digest):
            raise StateError(
                f"the calibration data is not what it was when {self.state.folder} was saved, so the run cannot resume: pass the same data in the "
                f"same order (seed what shuffles or augments it), or {self.state.remedy}"
            )
        self._digest = found
        return lessons
