"""Functions run in several gloo processes, started as ``torchrun`` would, and a model and data for them."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn


def _threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def _entry(rank: int, size: int, folder: str, work: Callable[[int, int], Any]) -> None:
    log = open(f"{folder}/{rank}.log", "w")  # noqa: SIM115 - to the end of the process
    os.dup2(log.fileno(), 2)
    faulthandler.enable()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    try:
        torch.save(work(rank, size), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    # A group that something of ours still holds keeps its threads: into the interpreter's end, where they abort once in a few hundred times. A thread that has
    # ended is listed for a moment longer.
    deadline = time.monotonic() + 10
    while any("gloo" in name for name in _threads()):
        assert time.monotonic() < deadline, _threads()
        time.sleep(0.01)


def run(size: int, folder: Path, work: Callable[[int, int], Any]) -> list[Any]:
    """What ``work(rank, size)`` returns in each of ``size`` processes."""
    folder.mkdir()
    try:
        mp.start_processes(_entry, (size, str(folder), work), nprocs=size, start_method="spawn")
    except mp.ProcessExitedException as error:  # the first lines say what ended it
        told = "; ".join(f"{log.stem}: {' '.join(log.read_text().split())[:300]}" for log in folder.glob("*.log"))
        raise RuntimeError(f"{error}: {told}") from error
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 5))


def batches(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Every ``size``-th batch of one common stream."""
    generator = torch.Generator().manual_seed(1)
    stream = [(torch.randn(4, 20, generator=generator), torch.randint(5, (4,), generator=generator)) for _ in range(48)]
    return stream[rank::size]


ARGUMENTS = {"num_grads": 48, "fisher_block_size": 96, "damp": 1e-4, "progress": False}
