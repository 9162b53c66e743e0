"""A calibration that is interrupted, and its resumption."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Killed(BaseException):
    """As sudden as a signal, but in this process."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 24), nn.Tanh(), nn.Linear(24, 5))


class Data:
    """Batches of a stream that goes on from pass to pass, as a seeded loader's does; counts what the loss saw."""

    def __init__(self, kill_at: int | None = None, sizes: tuple[int, ...] = (4,)) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.kill_at, self.sizes, self.seen = kill_at, sizes, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for size in itertools.cycle(self.sizes):
            x = torch.randn(size, 20, generator=self.generator)
            yield x, torch.randint(5, (size,), generator=self.generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.seen += 1
        if self.kill_at is not None and self.seen > self.kill_at:
            raise Killed
        return nn.functional.cross_entropy(outputs, targets)


ARGUMENTS: dict[str, Any] = {"num_grads": 40, "fisher_block_size": 72, "damp": 1e-3, "progress": False}
