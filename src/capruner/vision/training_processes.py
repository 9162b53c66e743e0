"""One process or many: who am I, on which device, and are we all still the same?"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.files import digest
from capruner.vision.training_watch import Watch


@dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.first:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._wire())
        dist.all_reduce(total)
        return [float(v) for v in total]

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Every process must hold the same bits.

        Raises:
            RuntimeError: names the ranks and the first tensor that differ from rank 0.
        """
        if self.size == 1:
            return
        mine = torch.stack([_digest(tensor) for tensor in tensors.values()]).to(self._wire())
        everybody = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everybody, mine)
        for rank, theirs in enumerate(everybody):
            if different := (theirs != everybody[0]).any(dim=1).nonzero().flatten().tolist():
                name = list(tensors)[different[0]]
                raise RuntimeError(
                    f"{when}: rank {rank} has other bits than rank 0 in {name} and {len(different) - 1} more; training stops here, "
                    "the last checkpoint is good"
                )

    def _wire(self) -> torch.device:
        return self.device if dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def started(device: torch.device, timeout: float) -> Iterator[Processes]:
    """Among the other processes, if a launcher has set ``WORLD_SIZE``: NCCL on GPUs, gloo on CPUs.

    Args:
        device: where to work; of several processes on GPUs each takes the one of its ``LOCAL_RANK``.
        timeout: seconds after which waiting for another process is an error.

    Raises:
        UserError: fewer GPUs than processes; another process failed or died (says which).
    """
    rank, local_rank, size = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    if size > 1 and device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine finds {torch.cuda.device_count()} GPUs; start at most that many (--nproc-per-node)"
            )
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    processes = Processes(rank, size, device)
    if size == 1:
        yield processes
        return
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size, timeout)
    watch.start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield processes
    except (RuntimeError, ValueError) as error:
        raise UserError(watch.explain(error)) from error
    finally:
        watch.stop()
    dist.destroy_process_group()
    gc.collect()  # cycles of the training hold the group, whose threads would abort at the interpreter's end now and then


_ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """``model`` with gradients averaged over processes in the backward pass; as it is for one."""
    if processes.size == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)


def _digest(tensor: Tensor) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digest([tensor])), dtype=torch.uint8)
