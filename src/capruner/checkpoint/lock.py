"""A lock on a folder, against two runs that write to it; the system releases it when the process ends, for whatever reason."""

from __future__ import annotations

import logging
import os
import socket
import weakref
from pathlib import Path

LOCK = "lock"
"""Name of the lock file in the folder; it contains who holds the lock."""

_LOGGER = logging.getLogger(__name__)
_OWNERS: dict[tuple[int, Path], tuple[int, weakref.ref[FolderLock]]] = {}
"""The open file and the lock in use, by process (a fork does not inherit locks) and file. A process must open a locked file only once: closing it anywhere
releases the lock."""


class InUseError(OSError):
    """Another process holds the lock; the message says which."""


class FolderLock:
    """Lock ``folder`` for this process. A later lock in the same process takes over, and :meth:`check` of the earlier one then raises.

    Raises:
        InUseError: another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        self._key = os.getpid(), folder.resolve() / LOCK
        descriptor = _OWNERS[self._key][0] if self._key in _OWNERS else _locked(self._key[1])
        _OWNERS[self._key] = (descriptor, weakref.ref(self))
        self._release = weakref.finalize(self, _release, self._key, descriptor, id(self))

    def check(self) -> None:
        """Raise :class:`InUseError` if a later lock took over."""
        owner = _OWNERS.get(self._key)
        if owner is None or owner[1]() is not self:
            raise InUseError(
                f"{self._key[1].parent} was taken over by another run in this process, so this one cannot save to it"
            )

    def release(self) -> None:
        """Release the lock."""
        self._release()


def _release(key: tuple[int, Path], descriptor: int, identity: int) -> None:
    owner = _OWNERS.get(key)
    if owner is not None and owner[0] == descriptor and (owner[1]() is None or id(owner[1]()) == identity):
        del _OWNERS[key]
        os.close(descriptor)


def _locked(file: Path) -> int:
    import fcntl  # not on Windows, where everything but checkpoints works

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            with os.fdopen(descriptor) as opened:
                holder = opened.read(200).strip() or "another process"
            raise InUseError(
                f"{file.parent} is in use by {holder}; wait until that run has ended, or choose another folder"
            ) from error
        except OSError as error:
            _LOGGER.warning(
                "%s: this file system has no locks (%s); do not start two runs on one folder", file.parent, error
            )
        if _is_at(descriptor, file):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # deleted by the previous run just after it was opened here


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
