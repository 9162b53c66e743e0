"""The processes of a training run, each on its device."""

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

from capruner import distributed
from capruner.cli.arguments import UserError
from capruner.files import digest
from capruner.vision.training_watch import Watch


@dataclass(frozen=True)
class Processes:
    """The processes of a training run, and the device of this one."""

    device: torch.device
    everybody: distributed.Processes

    @property
    def rank(self) -> int:
        return self.everybody.rank

    @property
    def size(self) -> int:
        return self.everybody.world_size

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print, once for all processes."""
        if self.first:
            print(text, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        return [self.everybody.sum(value) for value in values]

    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raise ``RuntimeError``, naming ranks and tensor, unless all processes hold bit-identical tensors."""
        if self.size == 1:
            return
        digests = self.everybody.all_gather_objects([digest([tensor]) for tensor in tensors.values()])
        for rank, theirs in enumerate(digests):
            if different := [name for name, a, b in zip(tensors, theirs, digests[0]) if a != b]:
                raise RuntimeError(
                    f"{when}: rank {rank} has other bits than rank 0 in {different[0]} and {len(different) - 1} more; training stops here, "
                    "the last checkpoint is good"
                )


@contextmanager
def started(device: torch.device, timeout: float) -> Iterator[Processes]:
    """Join the other processes if a launcher has set ``WORLD_SIZE``: NCCL on GPUs, gloo on CPUs.

    Args:
        device: with several processes on GPUs each uses the one of its ``LOCAL_RANK``.
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
    if size == 1:
        yield Processes(device, distributed.processes())
        return
    limit = timedelta(seconds=timeout)
    store, _, _ = next(dist.rendezvous("env://", timeout=limit))
    watch = Watch(dist.PrefixStore("watch", store.clone()), rank, size, timeout)
    watch.start()
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield Processes(device, distributed.processes())
    except (RuntimeError, ValueError) as error:
        raise UserError(watch.explain(error)) from error
    finally:
        watch.stop()
    dist.destroy_process_group()
    gc.collect()  # reference cycles keep the group alive, and its threads may abort when the interpreter exits


_ENVIRONMENT = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """``model`` with gradients averaged over several processes in the backward pass; itself if there is one process."""
    if processes.size == 1:
        return model
    devices = [processes.device] if processes.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices)
