"""Name the process that died: collectives only report that one did.

Each process increments a counter in the store that all share, and watches the counters of the others. If one stands still for the time-out, its process is
dead or frozen, and the others report that and exit, whatever they are waiting for. A process that fails leaves its error in the store for the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any

_DONE = "done"
_BEATS_PER_TIMEOUT = 8


class Watch:
    """A thread that watches over all processes, from :meth:`start` to :meth:`stop`.

    Args:
        store: a ``torch.distributed`` store for the thread alone.
        timeout: seconds.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self._interval = min(2.0, timeout / _BEATS_PER_TIMEOUT)
        self._seen: dict[int, tuple[str, float]] = {}
        self._quit = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start; all processes must."""
        self._beat("0")
        self._thread.start()

    def stop(self) -> None:
        """Stop; the processes no longer wait for each other."""
        self._quit.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):  # rank 0, which holds the store, exited first
            self._beat(_DONE)

    def explain(self, error: BaseException) -> str:
        """The message for an error: another process's failure if that came first."""
        own = f"{type(error).__name__}: {error}" if not str(error) else str(error)
        try:
            for rank in range(self.size):
                if rank != self.rank and self._store.check([f"failed/{rank}"]):
                    return f"rank {rank} failed: {self._store.get(f'failed/{rank}').decode()}"
            began = time.monotonic()
            while time.monotonic() - began < 3 * self._interval:  # a dead process shows by its silence
                time.sleep(self._interval / 2)
            silent = [rank for rank in self._silent(2.5 * self._interval) if rank != self.rank]
            if silent:
                return f"{_ranks(silent)} died or froze; the last checkpoint is good ({own.splitlines()[0]})"
            self._store.set(f"failed/{self.rank}", own)
        except RuntimeError:
            return f"rank 0 died or left, and with it the store that all processes share; the last checkpoint is good ({own.splitlines()[0]})"
        return f"rank {self.rank} failed: {own}"

    def _beat(self, value: str) -> None:
        self._store.set(f"alive/{self.rank}", value)

    def _run(self) -> None:
        count = 0
        while not self._quit.wait(self._interval):
            count += 1
            try:
                self._beat(str(count))
                self._look()
            except RuntimeError:
                return  # the store is gone, and collectives will fail for that reason
            silent = self._silent(self.timeout)
            if silent:
                print(
                    f"error: {_ranks(silent)} gave no sign of life for {self.timeout:g} seconds, so rank {self.rank} stops; the last checkpoint is good",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)

    def _look(self) -> None:
        for rank in range(self.size):
            key = f"alive/{rank}"
            value = self._store.get(key).decode() if self._store.check([key]) else ""
            with self._lock:
                if rank not in self._seen or self._seen[rank][0] != value:
                    self._seen[rank] = (value, time.monotonic())

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        with self._lock:
            return [r for r, (value, since) in sorted(self._seen.items()) if value != _DONE and now - since > seconds]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
