"""The search for a model that is fast enough when it is measured."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.shrinking import latency, run
from capruner.shrinking.run import find_units

X = torch.zeros(1, 4)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.02)


class Slow(nn.Linear):
    """A layer that takes a millisecond for each output, and 10 more."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01 + 0.001 * self.out_features)
        return super().forward(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Slow(4, 40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def shrink(share: float) -> Any:
    batches = [(torch.randn(4, 4), torch.randn(4, 3)) for _ in range(3)]
    return capruner.shrink(Mlp(), batches, F.mse_loss, latency=share, example_inputs=X, num_grads=3, progress=False)


def test_the_measured_time_meets_the_target() -> None:
    small = shrink(0.6)
    dense, now = small.costs["seconds"]
    assert dense >= 0.05
    assert 0.45 <= now / dense <= 0.6
    # The 10 ms do not shrink with the layer: 20 of the 40 outputs are 30 ms.
    assert 12 <= small.model.first.out_features <= 20
    assert "seconds" in small.report()


def test_a_time_out_of_reach_says_how_fast_the_fastest_is() -> None:
    with pytest.raises(ValueError, match=r"latency=0\.1 .*the fastest model .*takes 2[0-9]%"):
        shrink(0.1)


def test_a_time_that_costs_nearly_all_of_the_network_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    shrink(0.6)
    assert not recwarn.list
    monkeypatch.setattr(run, "LITTLE", 2)
    with pytest.warns(UserWarning, match=r"latency=0\.6 was reached with [2-6][0-9]\.[0-9]% of the multiply-adds"):
        shrink(0.6)


def test_layers_cost_what_they_take() -> None:
    model = Mlp().eval()
    costs = latency.seconds_of_layers(model, X, find_units(model, X, ["neurons"])[0])
    assert costs.layers["first"] >= 0.05 > 10 * costs.layers["second"]
    assert costs.total >= costs.layers["first"]
    assert not model.first._forward_hooks
