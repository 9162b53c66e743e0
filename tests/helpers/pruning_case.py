"""Small models and data of the pruning tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner

METHODS = ["cap", "fast_cap", "obs", "magnitude"]


SMALL = {"num_grads": 12, "fisher_block_size": 25, "damp": 1e-2, "progress": False}


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


WEIGHTS = 108 + 72 + 48


def images(count: int = 12, dtype: torch.dtype = torch.float32, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 3, 6, 6).to(dtype), torch.randint(3, (size,))) for _ in range(count)]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


SAMPLES = 3
"""Of each batch of :func:`vectors`. The outer products of their mean gradients are to be multiplied by it to predict the loss of a sample."""


def vectors(count: int = 30, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    mix = torch.randn(9, 9, dtype=torch.float64)
    return [
        ((torch.randn(SAMPLES, 9, dtype=torch.float64) @ mix).to(dtype), torch.randint(4, (SAMPLES,)))
        for _ in range(count)
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1}


def zeros(model: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in weights(model).values())


class Counted:
    """A loader that counts what is drawn from it."""

    def __init__(self, items: list) -> None:
        self.items, self.drawn, self.passes = items, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for item in self.items:
            self.drawn += 1
            yield item


def prune(model: nn.Module, batches: Any = None, sparsity: Any = 0.5, **more: Any) -> capruner.PruningResult:
    return capruner.prune(model, images() if batches is None else batches, F.cross_entropy, sparsity, **(SMALL | more))


def gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    params = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    rows: dict[str, list[Tensor]] = {n: [] for n in params}
    model.eval()
    for x, y in batches:
        for name, g in zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), list(params.values()))):
            rows[name].append(g.flatten())
    model.train()
    return {name: torch.stack(r) for name, r in rows.items()}
