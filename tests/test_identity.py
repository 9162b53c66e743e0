"""What a resumed run recognises: equal code has equal digests, changed code has others, and counters make no difference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.batches import ModelInputs
from capruner.identity import batch_digest, loss_digest, model_digest


def closed_over(scale: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, y: scale * F.cross_entropy(o, y)


def counting() -> Callable[[Tensor, Tensor], Tensor]:
    seen = 0

    def loss(o: Tensor, y: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return F.cross_entropy(o, y)

    return loss


def calling(inner: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda o, y: inner(o, y)


class Scaled:
    def __init__(self, scale: float, last: int = 0) -> None:
        self.scale, self.last, self.seen = scale, last, 0

    def __call__(self, o: Tensor, y: Tensor) -> Tensor:
        self.seen += 1
        return self.scale * F.cross_entropy(o, y)

    def loss(self, o: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(o, y)


class Weighted(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return self.scale * F.cross_entropy(o, y)


LOSSES: list[Callable[[], Any]] = [
    lambda: F.cross_entropy,
    lambda: F.mse_loss,
    lambda: lambda o, y: F.cross_entropy(o, y),
    lambda: lambda o, y: 2 * F.cross_entropy(o, y),
    lambda: lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1),
    lambda: lambda o, y, scale=3: scale * F.cross_entropy(o, y),
    lambda: lambda o, y, scale=4: scale * F.cross_entropy(o, y),
    lambda: closed_over(2),
    lambda: closed_over(2.5),
    lambda: closed_over(torch.tensor(2.0)),
    lambda: closed_over(torch.tensor(3.0)),
    lambda: calling(F.cross_entropy),
    lambda: calling(F.nll_loss),
    lambda: calling(lambda o, y: F.cross_entropy(o, y)),
    lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
    lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
    lambda: nn.CrossEntropyLoss(),
    lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
    lambda: Weighted(1.0),
    lambda: Weighted(2.0),
    lambda: Scaled(1.0),
    lambda: Scaled(2.0),
    lambda: Scaled(1.0).loss,
    lambda: Scaled(2.0).loss,
    lambda: counting(),
]


def test_losses_that_differ_have_different_digests_and_those_made_again_the_same() -> None:
    digests = [loss_digest(make()) for make in LOSSES]
    assert len(set(digests)) == len(LOSSES)
    assert [loss_digest(make()) for make in LOSSES] == digests


def test_counters_make_no_difference() -> None:
    used, loss = counting(), Scaled(1.0, last=7)
    before = loss_digest(used)
    used(torch.zeros(1, 2), torch.tensor([0]))
    loss(torch.zeros(1, 2), torch.tensor([0]))
    assert loss_digest(used) == before
    assert loss_digest(loss) == loss_digest(Scaled(1.0))


SOURCE = """
import torch
from torch import nn
SLOPE = 0.1
def act(x):
    return torch.relu(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.scale = 2
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        return self.helper(act(self.fc(x)) * SLOPE * self.scale)
    def helper(self, x):
        return x
"""


def built(source: str) -> nn.Module:
    space: dict[str, Any] = {"__name__": "somewhere"}
    exec(compile(source, "net.py", "exec"), space)
    torch.manual_seed(0)
    model: nn.Module = space["Net"]()
    return model


@pytest.mark.promise("Resume", "Another loss or another model code is refused")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu(x)", "torch.tanh(x)"),
        ("SLOPE = 0.1", "SLOPE = 0.2"),
        ("return x\n", "return x + 1\n"),
        ("self.scale = 2", "self.scale = 3"),
        ("* self.scale", "* self.scale**2"),
    ],
)
def test_changed_code_of_a_model_is_seen(old: str, new: str) -> None:
    assert old in SOURCE
    assert model_digest(built(SOURCE)) != model_digest(built(SOURCE.replace(old, new)))


def test_unchanged_code_of_a_model_is_the_same() -> None:
    model = built("# a comment, which moves all lines\n" + SOURCE)
    model(torch.zeros(1, 3))
    assert model_digest(model) == model_digest(built(SOURCE))
    with torch.no_grad():
        model.fc.weight.add_(1)  # type: ignore[union-attr, operator]
    assert model_digest(model.train()) == model_digest(built(SOURCE).eval())  # weights are compared apart


def test_modules_and_their_attributes() -> None:
    makes: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3)),
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3, stride=2)),
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3, padding_mode="circular")),
        lambda: nn.Sequential(nn.LayerNorm(3, eps=1e-6)),
        lambda: nn.Sequential(nn.LayerNorm(3, eps=1e-5)),
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)),
        lambda: nn.Sequential(nn.MultiheadAttention(4, 4)),
    ]
    digests = [model_digest(make()) for make in makes]
    assert len(set(digests)) == len(makes)
    assert [model_digest(make()) for make in makes] == digests


class Sample:
    """A batch of no kind that is known; refers to itself."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.all = x, [self]


def test_every_value_of_a_batch_counts() -> None:
    x, y = torch.arange(6.0).view(2, 3), torch.tensor([0, 1])
    batches: list[Any] = [
        (x, y), (x + 1, y), (x, y + 1), (x.view(3, 2), y), (x.double(), y), ([x], y), {"x": x, "labels": y}, {"z": x, "labels": y},
        (ModelInputs((x,), {"scale": 2}), y), (ModelInputs((x,), {"scale": 3}), y), (x, None), (x, 3), (x, "word"), (np.ones(3), y), (np.zeros(3), y),
        Sample(x), Sample(y),
    ]  # fmt: skip
    assert len({batch_digest(batch) for batch in batches}) == len(batches)
    assert batch_digest((x.clone(), y.clone())) == batch_digest((x, y))
