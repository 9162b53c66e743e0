"""Several processes, one of which dies: the others name it and end, and all go on from the state to the same bytes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import ARGUMENTS, batches, net, run
from torch import Tensor, nn

import capruner
from capruner.checkpoint import StateError
from capruner.checkpoint import run as checkpoint_run
from capruner.distributed import PeerError
from capruner.methods import CAP


def prune(rank: int, size: int, folder: str = "", dies_at: int | None = None) -> dict[str, Any]:
    checkpoint_run.SAVE_EVERY = 0.0
    arguments = ARGUMENTS | {"num_grads": 47, "sparsity": [0.5, 0.9], "state_dir": folder or None}
    result = capruner.prune(net(), batches(rank, size), Loss(dies_at), **arguments)
    return {f"{s} {name}": w for s in (0.5, 0.9) for name, w in result.level(s).weights.items()}


class Going:
    """``run`` hands over rank and size alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __call__(self, rank: int, size: int) -> dict[str, Any]:
        return prune(rank, size, self.folder)


class Loss:
    """Dies at a batch, if it is to."""

    def __init__(self, last: int | None) -> None:
        self.last, self.seen = last, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == self.last:
            die()
        return nn.functional.cross_entropy(outputs, targets)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# qa/kills.py kills at more of them, over four processes.
STAGES = {"solve": (CAP, "solve_counts")}


def dying(rank: int, size: int, victim: int, stage: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    if rank == victim and stage in STAGES:
        setattr(*STAGES[stage], die)
    try:
        prune(rank, size, f"{folder}/state", 15 if rank == victim and stage == "gradients" else None)
    except PeerError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error))
    os._exit(0)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes end with that nobody kills."""
    found: dict[str, Any] = run(2, tmp_path_factory.mktemp("whole") / "ranks", prune)[0]
    return found


@pytest.mark.promise(
    "Resume", "When one of several processes is killed, the others end and name it, and all of them resume"
)
@pytest.mark.parametrize("stage", ["gradients", *STAGES])
def test_one_of_two_is_killed_and_both_go_on(stage: str, expected: dict[str, Any], tmp_path: Path) -> None:
    context, victim = mp.get_context("spawn"), 1
    began = time.monotonic()
    workers = [context.Process(target=dying, args=(rank, 2, victim, stage, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, -signal.SIGKILL]
    assert time.monotonic() - began < 60
    assert (tmp_path / "0.txt").read_text().startswith("rank 1 died: killed")
    for found in run(2, tmp_path / "again", Going(tmp_path / "state")):
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.promise("Resume", "A state of another number of processes is refused")
def test_a_state_of_two_is_not_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_run, "SAVE_EVERY", 0.0)
    (tmp_path / "state" / "rank-1-of-2").mkdir(parents=True)
    with pytest.raises(StateError, match=r"rank-1-of-2 was saved by 2 processes, this run has 1"):
        prune(0, 1, str(tmp_path / "state"))
