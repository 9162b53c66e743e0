"""Checkpoints as the code that computes sees them: a run is a sequence of stages, each computed, resumed in the middle, or already finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from capruner.checkpoint.store import StateError, Store
from capruner.methods import Stopwatch

SAVE_EVERY = 120.0
"""Seconds between two saves, at least. If saving is slow: ten times as long as the last save took, but at most five times this."""

Outcome = TypeVar("Outcome")
Tensors = Mapping[str, Tensor]


class Stateful(Protocol):
    """What can be saved and restored."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ``ValueError``, ``KeyError`` or ``TypeError`` if ``state`` is invalid."""


class Resumable(Stateful, Protocol):
    """The data of a stage, see :class:`capruner.calibration.stream.CalibrationStream`."""

    def skip(self) -> None:
        """Draw what was drawn before again and drop it; raises :class:`StateError` if it differs."""


class NoCheckpoint:
    """Saves nothing: every stage is computed. :class:`RunCheckpoint` overrides all of it."""

    folder: Path | None = None

    def stage(
        self,
        compute: Callable[[], Outcome],
        data: Resumable,
        pack: Callable[[Outcome], tuple[Tensors, Any]],
        unpack: Callable[[Tensors, Any], Outcome],
    ) -> Outcome:
        """The outcome of ``compute()``, or that of the interrupted run if it had finished this stage. Stages come in the same order in both.

        Args:
            data: what ``compute`` draws.
            pack: turns the outcome into tensors and JSON values.
            unpack: the inverse.
        """
        return compute()

    def resume(self, what: str, load: Callable[[Sequence[Tensors], Mapping[str, Any]], None]) -> bool:
        """Call ``load`` with what :meth:`save` saved, if the interrupted run was in the middle of this stage; return whether it was."""
        return False

    def due(self) -> bool:
        """Whether it is time to :meth:`save`; the same answer on every process."""
        return False

    def save(self, parts: Sequence[Tensors], state: Mapping[str, Any]) -> None:
        """Save the stage in progress: tensors by part, and JSON values."""

    def check_space(self, size: int) -> None:
        """Raise ``OSError`` if checkpoints of ``size`` bytes do not fit on the disk."""

    def close(self) -> None:
        """Let other processes use the folder."""


Checkpoint: TypeAlias = NoCheckpoint
"""Where a run saves how far it is, and finds how far an interrupted run with the same arguments was."""


class RunCheckpoint(NoCheckpoint):
    """The checkpoint of one run in a folder.

    Args:
        folder, configuration: see :class:`capruner.checkpoint.store.Store`.
        notes, clock: saved with each checkpoint, and restored here.
    """

    def __init__(self, folder: str | Path, configuration: Mapping[str, Any], notes: Stateful, clock: Stopwatch) -> None:
        self._store = Store(folder, configuration)
        self.folder = self._store.folder
        content = self._store.content
        self._steps: list[dict[str, Any]] = content["steps"]
        self._progress: dict[str, Any] | None = content["progress"]
        self._notes, self._clock, self._done = notes, clock, 0
        with self._reading("notes"):
            if content["notes"]:
                notes.load_state_dict(content["notes"]["report"])
                clock.load_state_dict(content["notes"]["seconds"])
        self._saved_at, self._took = time.monotonic(), 0.0

    def stage(
        self,
        compute: Callable[[], Outcome],
        data: Resumable,
        pack: Callable[[Outcome], tuple[Tensors, Any]],
        unpack: Callable[[Tensors, Any], Outcome],
    ) -> Outcome:
        if self._done < len(self._steps):
            step = self._steps[self._done]
            self._done += 1
            (tensors,) = self._store.load(step["files"])
            with self._store.processes.together("comparing the calibration data"):
                # Also when no gradient is left to compute: other data would have led to another outcome.
                with self._reading("outcome"):
                    data.load_state_dict(step["state"])
                data.skip()
            with self._reading("outcome"):
                return unpack(tensors, step["values"])
        outcome = compute()
        with self._clock("state"), self._store.processes.together("saving the checkpoint"):
            self._finish(*pack(outcome), data.state_dict())
        return outcome

    def resume(self, what: str, load: Callable[[Sequence[Tensors], Mapping[str, Any]], None]) -> bool:
        if self._progress is None or self._done < len(self._steps):
            return False
        parts = self._store.load(self._progress["files"])
        with self._reading(what):
            load(parts, self._progress["state"])
        return True

    def due(self) -> bool:
        elapsed = time.monotonic() - self._saved_at
        return self._store.processes.any(elapsed >= max(SAVE_EVERY, min(10 * self._took, 5 * SAVE_EVERY)))

    def save(self, parts: Sequence[Tensors], state: Mapping[str, Any]) -> None:
        with self._clock("state"):
            start = time.monotonic()
            files = self._store.write(f"progress-{self._store.generation + 1:08d}", parts)
            self._progress = {"files": files, "state": dict(state)}
            self._commit()
            self._saved_at = time.monotonic()
            self._took = self._saved_at - start

    def check_space(self, size: int) -> None:
        self._store.check_space(size)

    def close(self) -> None:
        self._store.close()

    def _finish(self, tensors: Tensors, values: Any, state: dict[str, Any]) -> None:
        files = self._store.write(f"step-{self._done:08d}", [tensors])
        self._steps.append({"files": files, "values": values, "state": state})
        self._done += 1
        self._progress = None
        self._commit()

    def _commit(self) -> None:
        notes = {"report": self._notes.state_dict(), "seconds": dict(self._clock.seconds)}
        self._store.commit({"steps": self._steps, "progress": self._progress, "notes": notes})

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except StateError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise StateError(f"{self.folder} has no {what} of this run ({error}); {self._store.remedy}") from error
