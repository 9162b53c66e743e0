"""The calibration data as a stream of numbered batches, whose place can be saved and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from capruner.batches import Batches, as_batch, own_copy
from capruner.calibration.notes import is_count
from capruner.checkpoint.store import StateError
from capruner.identity import batch_digest

_COUNTS = ("drawn", "used", "taken", "averaged")


class CalibrationStream(Iterator[tuple[int, Any, Any]]):
    """One pass over the calibration data: ``(number, inputs, targets)``, copies on the device.

    After :meth:`load_state_dict` the first ``next`` draws what was drawn before again and drops it, so that a loader with its own random generator is where it
    was, and compares it with the recorded digests.

    Args:
        batches: the data.
        device: of the model.
        draw_targets: computes targets from the number and inputs of a batch; None: the data's own.
        recorded_in: the checkpoint that digests of the batches go into, for messages; None: none are computed.

    Attributes:
        drawn: batches so far, skipped ones included.
        used: with ``gradients="sample"``, samples of the last batch that are used up if it is not finished, else 0.
        taken: gradients computed so far.
        averaged: samples that these gradients are means over, in total.
        skipped: numbers of the batches that were left out, in whole or in part, for NaN or Inf.
        digests: of the batches drawn.
    """

    def __init__(
        self,
        batches: Batches,
        device: torch.device,
        draw_targets: Callable[[int, Any], Any] | None = None,
        recorded_in: Path | None = None,
    ) -> None:
        self.batches, self.device = batches, device
        self._draw_targets, self._recorded_in = draw_targets, recorded_in
        self.drawn = self.used = self.taken = self.averaged = 0
        self.skipped: list[int] = []
        self.digests: list[str] = []
        self._source: Iterator[Any] | None = None
        self._seen = 0  # batches of the source

    # No generator: it would refer to the stream and the stream to it, and a loader's worker processes would live until both are collected as garbage.
    def __next__(self) -> tuple[int, Any, Any]:
        if self._source is None:
            self._skip(self.drawn - bool(self.used))  # an unfinished batch comes again
        batch = self._recorded(at_least=0)
        index = self._seen - 1
        inputs, targets = as_batch(batch, index, self.batches.batch_fn)
        if self._draw_targets is not None:
            targets = self._draw_targets(index, inputs)
        self.drawn = index + 1
        return index, own_copy(inputs, self.device), own_copy(targets, self.device)

    def skip(self) -> None:
        """Draw the first ``drawn`` batches and drop them."""
        self._skip(self.drawn)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "skipped": list(self.skipped), "digests": list(self.digests)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a place before the first batch is drawn; raise ``ValueError`` or ``KeyError`` if ``state`` is invalid."""
        counts = {name: state[name] for name in _COUNTS}
        skipped, digests = state["skipped"], state["digests"]
        if not isinstance(skipped, list) or not all(map(is_count, (*counts.values(), *skipped))):
            raise ValueError(f"{counts} and {skipped} are not counts")
        if any(number >= counts["drawn"] for number in skipped):
            raise ValueError(f"{skipped} were skipped of {counts['drawn']} batches")
        if not isinstance(digests, list) or len(digests) != counts["drawn"] or not all(type(d) is str for d in digests):
            raise ValueError(f"there is no digest for each of {counts['drawn']} batches")
        for name, count in counts.items():
            setattr(self, name, count)
        self.skipped, self.digests = list(skipped), list(digests)

    def _skip(self, count: int) -> None:
        self._source, self._seen = iter(self.batches), 0
        for _ in range(count):
            self._recorded(at_least=count)

    def _recorded(self, at_least: int) -> Any:
        """The next batch, its digest recorded or compared."""
        assert self._source is not None
        try:
            batch = next(self._source)
        except StopIteration:
            if self._seen < at_least:
                raise ValueError(
                    f"the calibration data ended after {self._seen} batches, but {at_least} were drawn before"
                ) from None
            raise
        if self._recorded_in is not None:
            self._record(self._seen, batch_digest(batch))
        self._seen += 1
        return batch

    def _record(self, index: int, digest: str) -> None:
        if index == len(self.digests):
            self.digests.append(digest)
        elif digest != self.digests[index]:
            raise StateError(
                f"batch {index} of the calibration data differs from the one recorded in {self._recorded_in}; cannot resume. Pass the same data in the same "
                f"order (seed what shuffles or augments it), or delete the folder"
            )
