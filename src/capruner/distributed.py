"""Who owns which block: gradients in, decisions out.

Every process draws its own share of the gradients; the Fisher blocks are shared out, so that each process holds and inverts ``1/size`` of them. A gradient's
blocks travel to their owners, scores and pruned weights travel back to all, as tensors and in lockstep: every process ends with the same bytes.

Without ``torch.distributed``, or with one process, nothing travels.
"""

from __future__ import annotations

import os
import socket
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from capruner.layout import BlockLayout

if dist.is_available():
    # Default arguments in it hold the group that exists when it is imported. Optimizers import it, later: the group would never end.
    import torch.distributed.nn.functional


class PeerError(RuntimeError):
    """Another process failed, or is gone; the message names it."""


_PEERS: weakref.WeakKeyDictionary[Any, list[tuple[int, int]]] = weakref.WeakKeyDictionary()
"""Who takes part: ``(machine, process id)`` by rank, for each group of processes in use.

Weak, because a group that something still holds lives on after ``destroy_process_group``: its threads then run into the interpreter's end, where they abort.
"""


def world() -> tuple[int, int]:
    """Rank of this process, and their number; ``(0, 1)`` where ``torch.distributed`` is not in use."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Shards:
    """Contiguous ranges of blocks, balanced by the ``B²`` numbers that each block's Fisher matrix takes.

    Args:
        layouts: all layers; the same on every process.
        whole_layers: never cut a layer in two (for methods with one Fisher matrix per layer).
    """

    def __init__(self, layouts: Mapping[str, BlockLayout], whole_layers: bool = False) -> None:
        self.layouts = dict(layouts)
        self.rank, self.size = world()
        if self.size > 1 and dist.group.WORLD not in _PEERS:
            machines, processes = (
                self._report(value) for value in (zlib.crc32(socket.gethostname().encode()), os.getpid())
            )
            _PEERS[dist.group.WORLD] = [(int(machine), int(process)) for machine, process in zip(machines, processes)]
        self._bounds: dict[str, list[int]] = {}
        total = sum(layout.num_blocks * layout.block_size**2 for layout in layouts.values())
        before = 0
        for name, layout in layouts.items():
            cost, n = layout.block_size**2, layout.num_blocks
            if whole_layers:
                middle = (before + n * cost / 2) * self.size / total
                self._bounds[name] = [0 if r <= int(middle) else n for r in range(self.size)] + [n]
            else:
                cuts = [round((r * total / self.size - before) / cost) for r in range(self.size + 1)]
                self._bounds[name] = [min(max(cut, 0), n) for cut in cuts]
            before += n * cost

    def own(self, name: str, rank: int | None = None) -> slice:
        """The blocks of a layer that a process (this one) owns."""
        bounds, rank = self._bounds[name], self.rank if rank is None else rank
        return slice(bounds[rank], bounds[rank + 1])

    def exchange(
        self, rows: Mapping[str, Tensor] | None, dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor] | None:
        """Send this process's ``{name: (k, num_blocks, B)}`` gradients to the owners of the blocks; None when it has no more.

        Args:
            dtypes: of each layer's gradients. A process without rows of its own has to know them too.

        Returns:
            ``{name: (K, own blocks, B)}``: everybody's gradients for the blocks owned here, interleaved by process; None when all are done.

        Raises:
            PeerError: another process reported a failure.
        """
        if self.size == 1:
            return None if rows is None else dict(rows)
        some = next(iter(rows.values())) if rows else None
        counts = self._all_counts(0 if some is None else len(some))
        if not any(counts):
            return None
        device = self._device()
        dtype = torch.float64 if torch.float64 in dtypes.values() else torch.float32
        elements = [
            sum(
                (own.stop - own.start) * layout.block_size
                for name, layout in self.layouts.items()
                for own in [self.own(name, r)]
            )
            for r in range(self.size)
        ]
        send = torch.empty(0, dtype=dtype, device=device)
        if rows:
            parts = [rows[name][:, self.own(name, r)].flatten(1) for r in range(self.size) for name in self.layouts]
            send = torch.cat([part.reshape(-1) for part in self._by_receiver(parts)]).to(device, dtype)
        mine = elements[self.rank]
        received = torch.empty(sum(counts) * mine, dtype=dtype, device=device)
        with naming_the_dead():
            dist.all_to_all_single(
                received, send, [k * mine for k in counts], [counts[self.rank] * e for e in elements]
            )
        by_sender = received.split([k * mine for k in counts])
        # Row i of every process before row i + 1 of any: the order in which one process would have seen interleaved data.
        ranked = [
            (i, r, row)
            for r, (k, part) in enumerate(zip(counts, by_sender))
            for i, row in enumerate(part.view(k, mine))
        ]
        stacked = torch.stack([row for _, _, row in sorted(ranked, key=lambda item: item[:2])])
        result, start = {}, 0
        for name, layout in self.layouts.items():
            own = self.own(name)
            width = (own.stop - own.start) * layout.block_size
            blocks = stacked[:, start : start + width].unflatten(1, (own.stop - own.start, layout.block_size))
            result[name] = blocks.to(dtypes[name])
            start += width
        return result

    def _by_receiver(self, parts: list[Tensor]) -> Iterator[Tensor]:
        per = len(self.layouts)
        for r in range(self.size):
            yield torch.cat(parts[r * per : (r + 1) * per], dim=1)

    def gather(self, name: str, local: Tensor, dim: int = 0) -> Tensor:
        """Everybody's blocks of a layer along ``dim``, from each process's own."""
        if self.size == 1:
            return local
        sizes = [self.own(name, r).stop - self.own(name, r).start for r in range(self.size)]
        moved = local.movedim(dim, 0)
        device = self._device()
        wire = torch.uint8 if local.dtype == torch.bool else local.dtype
        padded = torch.zeros(max(sizes), *moved.shape[1:], dtype=wire, device=device)
        padded[: len(moved)] = moved.to(device, wire)
        parts = [torch.empty_like(padded) for _ in sizes]
        with naming_the_dead():
            dist.all_gather(parts, padded)
        whole = torch.cat([part[:k] for part, k in zip(parts, sizes)])
        return whole.to(local.device, local.dtype).movedim(0, dim)

    def sum(self, value: float) -> float:
        """The sum over all processes, added in the order of ranks: the same bits everywhere."""
        return value if self.size == 1 else sum(self._report(value))

    def add(self, tensors: Sequence[Tensor], share: float) -> None:
        """Replace each tensor by the sum of ``share · tensor`` over all processes; shapes are the same everywhere."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(self._device(), torch.float64) for tensor in tensors]) * share
        with naming_the_dead():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))

    def total(self, count: int, what: str) -> int:
        """The sum of everybody's counts, at least 0 each.

        Raises:
            PeerError: another process failed while doing ``what``.
        """
        return count if self.size == 1 else sum(self._all_counts(count, what))

    def any(self, flag: bool) -> bool:
        """Whether it is so on one process at least; the same answer on all, who wait for each other here.

        Raises:
            PeerError: another process reported a failure.
        """
        return flag if self.size == 1 else any(self._all_counts(int(flag)))

    def least(self, count: int) -> int:
        """The smallest of everybody's counts, at least 0."""
        return count if self.size == 1 else min(self._all_counts(count))

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A stage that all processes finish or none: when one fails, the others raise too instead of waiting for it."""
        try:
            yield
        except PeerError:
            raise
        except BaseException:
            if self.size > 1:
                with suppress(PeerError):  # it is gone already; this process's own error counts
                    self._all_counts(-1)
            raise
        if self.size > 1 and any(failed := [k < 0 for k in self._report(0)]):
            raise PeerError(f"rank {failed.index(True)} failed while {what}; its own error says why")

    def _all_counts(self, count: int, what: str = "drawing gradients") -> list[int]:
        counts = [int(k) for k in self._report(count)]
        failed = [r for r, k in enumerate(counts) if k < 0]
        if failed and count >= 0:
            raise PeerError(f"rank {failed[0]} failed while {what}; its own error says why")
        return counts

    def _report(self, value: float) -> list[float]:
        """Everybody's value."""
        mine = torch.tensor([value], dtype=torch.float64, device=self._device())
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        with naming_the_dead():
            dist.all_gather(everybody, mine)
        return [float(k) for k in everybody]

    @staticmethod
    def _device() -> torch.device:
        if dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


@contextmanager
def naming_the_dead() -> Iterator[None]:
    """An error of the transport says no more than that a connection broke: look who is gone.

    Raises:
        PeerError: with the ranks of this machine that are no longer there.
    """
    try:
        yield
    except RuntimeError as error:
        gone = _gone()
        if gone:
            who = f"rank {gone[0]} is gone" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are gone"
            said = f"{who}: killed (out of memory, say) or stopped by an error of its own"
        else:
            said = "the connection to another process broke, or it did not answer in time; its own log says why"
        raise PeerError(f"{said}. Start all of them again; with a state folder the run goes on ({error})") from error


def _gone(patience: float = 1.0) -> list[int]:
    machine = zlib.crc32(socket.gethostname().encode())
    until = time.monotonic() + patience
    while True:
        peers = _PEERS.get(dist.group.WORLD, [])
        here = [(rank, process) for rank, (where, process) in enumerate(peers) if where == machine]
        gone = [rank for rank, process in here if not _alive(process)]
        if gone or time.monotonic() > until:
            return gone
        time.sleep(0.02)  # its sockets close a moment before it is gone


def _alive(process: int) -> bool:
    with suppress(OSError):  # no /proc on this system
        # After the name, which is in parentheses; Z: it is dead, and its parent has not looked yet.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
