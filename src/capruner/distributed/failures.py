"""Errors of other processes: the transport only says that a connection broke; the message names the ranks that died."""

from __future__ import annotations

import os
import socket
import time
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist


class PeerError(RuntimeError):
    """Another process failed or died; the message names it."""


_PEERS: weakref.WeakKeyDictionary[Any, list[tuple[int, int]]] = weakref.WeakKeyDictionary()
"""``(machine, process id)`` by rank, for each process group in use.

Weak, because a group that something still references outlives ``destroy_process_group``: its threads then abort at the interpreter's exit.
"""


def peers_known() -> bool:
    """Whether :func:`remember_peers` was called for the process group in use."""
    return dist.group.WORLD in _PEERS


def identity() -> tuple[int, int]:
    """Machine and id of this process, for :func:`remember_peers`."""
    return zlib.crc32(socket.gethostname().encode()), os.getpid()


def remember_peers(peers: list[tuple[int, int]]) -> None:
    """Record the :func:`identity` of every process of the group in use, by rank."""
    _PEERS[dist.group.WORLD] = peers


@contextmanager
def naming_dead_peers() -> Iterator[None]:
    """Turn a ``RuntimeError`` of the transport into a :class:`PeerError` that names the processes of this machine that died."""
    try:
        yield
    except RuntimeError as error:
        if dead := _dead_peers():
            who = f"rank {dead[0]} died" if len(dead) == 1 else f"ranks {', '.join(map(str, dead))} died"
            reason = f"{who}: killed (for example out of memory), or stopped by its own error"
        else:
            reason = "the connection to another process broke, or it timed out; see that process's log"
        raise PeerError(f"{reason}. Start all processes again; with a state_dir the run resumes ({error})") from error


def _dead_peers(patience: float = 1.0) -> list[int]:
    machine, until = identity()[0], time.monotonic() + patience
    while True:
        here = [
            (rank, process)
            for rank, (where, process) in enumerate(_PEERS.get(dist.group.WORLD, []))
            if where == machine
        ]
        dead = [rank for rank, process in here if not _is_alive(process)]
        if dead or time.monotonic() > until:
            return dead
        time.sleep(0.02)  # a process closes its sockets a moment before it ends


def _is_alive(process: int) -> bool:
    with suppress(OSError):  # no /proc on this system
        # The state follows the name, which is in parentheses; Z: dead, and not yet waited for by its parent.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
