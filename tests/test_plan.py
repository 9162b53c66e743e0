"""The plan names what would be pruned and what not, with memory and time; and it leaves everything as it was."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from pruning_case import METHODS, conv_net, images
from torch import nn
from torch.nn import functional as F
from untouched import same, snapshot

import capruner

WHOLE = {"num_grads": 8, "fisher_block_size": 16}


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def test_rows_are_those_of_the_result() -> None:
    plan = capruner.plan(Tokens(), exclude=["head"], fisher_block_size=16)
    assert plan.layers == [{"name": "body.weight", "shape": [24, 8], "numel": 192, "block_size": 16}]
    assert [(row["name"], row["shape"], row["numel"]) for row in plan.left_dense] == [
        ("embed.weight", [10, 8], 80),
        ("head.weight", [4, 24], 96),
    ]
    data = [(torch.randint(10, (3, 5)), torch.randint(4, (3,))) for _ in range(4)]
    result = capruner.prune(Tokens(), data, exclude=["head"], fisher_block_size=16, num_grads=4, progress=False)
    assert result.settings["left_dense"] == plan.left_dense
    assert result.settings["block_sizes"] == {row["name"]: row["block_size"] for row in plan.layers}


def test_the_table_says_it_all() -> None:
    plan = capruner.plan(Tokens(), exclude=["head"])
    lines = str(plan).splitlines()
    assert lines[0] == "cap, unstructured: 1 layers with 192 of 396 weights"
    assert any(line.split() == ["body.weight", "24x8", "192", "192"] for line in lines)
    assert any(line.startswith("embed.weight") and line.endswith("an embedding") for line in lines)
    assert lines[-1] == "time     not measured: pass batches"
    measured = capruner.plan(conv_net(), images(), F.cross_entropy, **WHOLE)
    assert "estimated from one gradient" in str(measured).splitlines()[-1]


@pytest.mark.parametrize(
    ("method", "fisher"),
    [("cap", (7 + 5 + 3) * 16 * 16 * 4), ("obs", 15 * 1024), ("fast_cap", 3 * 1024), ("magnitude", 0)],
)
def test_memory(method: Any, fisher: int) -> None:
    plan = capruner.plan(conv_net(), method=method, **WHOLE)
    assert plan.memory["fisher_blocks"] == fisher
    assert plan.memory["peak"] > fisher
    assert plan.seconds is None
    double = capruner.plan(conv_net().double(), method=method, **WHOLE)
    assert double.memory["fisher_blocks"] == 2 * fisher


def test_groups_of_a_memory_budget() -> None:
    model = nn.Sequential(nn.Linear(108, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3))
    whole = capruner.plan(model, fisher_block_size=96)
    plan = capruner.plan(model, fisher_block_size=96, memory_budget=2**27 + 5_000_000)
    assert (whole.memory["groups"], plan.memory["groups"]) == (1, 2)
    assert plan.memory["peak"] <= 2**27 + 5_000_000 < whole.memory["peak"]


def seed_all() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what people's augmentations draw from
    torch.manual_seed(0)


def draw_all() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("gradients", ["batch", "sample"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_changed(method: Any, gradients: Any) -> None:
    model = conv_net().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    loader = torch.utils.data.DataLoader([(x[0], int(y[0])) for x, y in images()], batch_size=2, shuffle=True)
    seed_all()
    expected = draw_all()
    seed_all()
    plan = capruner.plan(model, loader, F.cross_entropy, method=method, gradients=gradients, **WHOLE)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert draw_all() == expected
    assert same(before, snapshot(model))


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = conv_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return self.inner(x)


def test_the_estimate_grows_with_the_work() -> None:
    one = capruner.plan(Slow(), images(), F.cross_entropy, num_grads=50, fisher_block_size=16)
    assert one.seconds is not None
    assert one.seconds >= 50 * 0.02
    two = capruner.plan(Slow(), images(), F.cross_entropy, num_grads=50, fisher_block_size=16, num_recomputations=2)
    assert two.seconds is not None
    assert two.seconds >= 100 * 0.02


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batches is an iterator, which would lose what"):
        capruner.plan(conv_net(), iter(images()), F.cross_entropy)
    with pytest.raises(ValueError, match="no parameter or module is called 'nothing'"):
        capruner.plan(conv_net(), params=["nothing"])
    with pytest.raises(TypeError, match="did you mean num_grads"):
        capruner.plan(conv_net(), num_grad=3)  # type: ignore[call-arg]
