"""The collectives of a calibration, over ``torch.distributed``; for a single process they return what they are passed.

Every process draws its own share of the gradients and owns some of the Fisher blocks, see :class:`capruner.distributed.partition.Partition`. Gradients travel
to the owners of their blocks, scores and pruned weights to all. Processes run in lockstep, and all of them end with the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from capruner.distributed.failures import PeerError, identity, naming_dead_peers, peers_known, remember_peers

if TYPE_CHECKING:
    from capruner.distributed.partition import Partition

if dist.is_available():
    # Its default arguments hold the process group that exists when it is imported. Optimizers import it later: the group would never end.
    import torch.distributed.nn.functional


class SingleProcess:
    """The only process. :class:`ProcessGroup` overrides what needs communication."""

    rank = 0
    world_size = 1

    def share(self, count: int) -> int:
        """This rank's part of ``count``; the first ranks take the remainder."""
        return count // self.world_size + (self.rank < count % self.world_size)

    def all_gather(self, value: float) -> list[float]:
        """The value of every rank."""
        return [value]

    def all_gather_counts(self, count: int, what: str) -> list[int]:
        """The count of every rank, each at least 0; raise :class:`PeerError` if another failed while doing ``what``."""
        return [count]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The picklable value of every rank."""
        return [value]

    def all_gather_blocks(self, local: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The tensors of all ranks, whose sizes along ``dim`` are ``sizes``, concatenated."""
        return local

    def all_reduce(self, tensors: Sequence[Tensor], weight: float = 1.0) -> None:
        """Replace each tensor by the sum of ``weight * tensor`` over all ranks."""

    def exchange(
        self, rows: Mapping[str, Tensor] | None, partition: Partition, dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor] | None:
        """See :meth:`capruner.distributed.partition.Partition.exchange`."""
        return None if rows is None else dict(rows)

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A stage that all processes finish or none: when one fails, the others raise :class:`PeerError` instead of waiting for it."""
        yield

    def sum(self, value: float) -> float:
        """The sum over all ranks, in their order, so that it is bit-identical everywhere."""
        return sum(self.all_gather(value))

    def total(self, count: int, what: str) -> int:
        """The sum of :meth:`all_gather_counts`."""
        return sum(self.all_gather_counts(count, what))

    def any(self, flag: bool, what: str = "drawing gradients") -> bool:
        """Whether ``flag`` is set on at least one rank. All processes wait for each other here."""
        return any(self.all_gather_counts(int(flag), what))

    def min(self, count: int, what: str = "drawing gradients") -> int:
        """The smallest of :meth:`all_gather_counts`."""
        return min(self.all_gather_counts(count, what))


Processes: TypeAlias = SingleProcess
"""All processes of a run, one or several."""


def processes() -> Processes:
    """The processes of this run: a :class:`ProcessGroup` if ``torch.distributed`` is initialized for more than one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return SingleProcess()


class ProcessGroup(SingleProcess):
    """The processes of the default group of ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, value: float) -> list[float]:
        self._learn_peers()
        return self._all_gather(value)

    def _learn_peers(self) -> None:
        """From here on a process that dies is named."""
        if not peers_known():
            machines, ids = (self._all_gather(part) for part in identity())
            remember_peers([(int(machine), int(process)) for machine, process in zip(machines, ids)])

    def _all_gather(self, value: float) -> list[float]:
        own = torch.tensor([value], dtype=torch.float64, device=self._device())
        everybody = [torch.empty_like(own) for _ in range(self.world_size)]
        with naming_dead_peers():
            dist.all_gather(everybody, own)
        return [float(k) for k in everybody]

    def all_gather_counts(self, count: int, what: str) -> list[int]:
        counts = [int(k) for k in self.all_gather(count)]
        failed = [rank for rank, k in enumerate(counts) if k < 0]
        if failed and count >= 0:
            raise PeerError(f"rank {failed[0]} failed while {what}; its own error says why")
        return counts

    def all_gather_objects(self, value: Any) -> list[Any]:
        self._learn_peers()
        everybody: list[Any] = [None] * self.world_size
        with naming_dead_peers():
            dist.all_gather_object(everybody, value)
        return everybody

    def all_gather_blocks(self, local: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        moved = local.movedim(dim, 0)
        wire = torch.uint8 if local.dtype == torch.bool else local.dtype
        padded = torch.zeros(max(sizes), *moved.shape[1:], dtype=wire, device=self._device())
        padded[: len(moved)] = moved.to(padded.device, wire)
        parts = [torch.empty_like(padded) for _ in sizes]
        with naming_dead_peers():
            dist.all_gather(parts, padded)
        whole = torch.cat([part[:k] for part, k in zip(parts, sizes)])
        return whole.to(local.device, local.dtype).movedim(0, dim)

    def all_reduce(self, tensors: Sequence[Tensor], weight: float = 1.0) -> None:
        flat = torch.cat([tensor.reshape(-1).to(self._device(), torch.float64) for tensor in tensors]) * weight
        with naming_dead_peers():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view(tensor.shape))

    def exchange(
        self, rows: Mapping[str, Tensor] | None, partition: Partition, dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor] | None:
        counts = self.all_gather_counts(len(next(iter(rows.values()))) if rows else 0, "drawing gradients")
        if not any(counts):
            return None
        device, ranks, names = self._device(), range(self.world_size), list(partition.layouts)
        dtype = torch.float64 if torch.float64 in dtypes.values() else torch.float32
        widths = [sum(partition.width(name, rank) for name in names) for rank in ranks]
        send = torch.empty(0, dtype=dtype, device=device)
        if rows:
            parts = [torch.cat([rows[n][:, partition.own(n, rank)].flatten(1) for n in names], dim=1) for rank in ranks]
            send = torch.cat([part.reshape(-1) for part in parts]).to(device, dtype)
        own = widths[self.rank]
        received = torch.empty(sum(counts) * own, dtype=dtype, device=device)
        with naming_dead_peers():
            dist.all_to_all_single(received, send, [k * own for k in counts], [counts[self.rank] * w for w in widths])
        by_sender = [part.view(k, own) for k, part in zip(counts, received.split([k * own for k in counts]))]
        # Row i of every process before row i + 1 of any: the order in which one process would have drawn interleaved data.
        stacked = torch.stack([part[i] for i in range(max(counts)) for part in by_sender if i < len(part)])
        blocks = stacked.split([partition.width(name, self.rank) for name in names], dim=1)
        return {
            name: part.unflatten(1, (partition.count(name), partition.layouts[name].block_size)).to(dtypes[name])
            for name, part in zip(names, blocks)
        }

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        try:
            yield
        except PeerError:
            raise
        except BaseException:
            with suppress(PeerError):  # the other died already; the error of this process counts
                self.all_gather(-1)
            raise
        self.all_gather_counts(0, what)

    @staticmethod
    def _device() -> torch.device:
        if dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
