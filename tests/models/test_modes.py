"""A forward pass leaves no trace: modes, and buffers that it changes, replaces, resizes, adds or forgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import capruner
from capruner.models.modes import eval_mode


class Cache(nn.Module):
    """A layer with a cache that ``change`` does something to in ``forward``."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.fc, self.change, self.length = nn.Linear(4, 3), change, 2
        self.register_buffer("cache", torch.tensor([1.0, 2.0]))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.fc(x)


def replace(module: Cache) -> None:
    module.cache = torch.zeros(1)  # values of this size would be broadcast into the old one without an error
    module.length = 1


def grow(module: Cache) -> None:
    module.cache = torch.zeros(5)
    module.length = 5


def resize(module: Cache) -> None:
    module.cache.resize_(7).fill_(3)


def add(module: Cache) -> None:
    module.cache += 1
    module.nothing = torch.ones(3)
    if "more" not in module._buffers:
        module.register_buffer("more", torch.ones(2))


def forget(module: Cache) -> None:
    module.cache = None


def cast(module: Cache) -> None:
    module.cache = module.cache.double() if module.cache is not None else None


CHANGES = [replace, grow, resize, add, forget, cast]


@pytest.mark.promise("Models and masks", "Buffers that `forward` replaces or resizes are restored")
@pytest.mark.parametrize("change", CHANGES)
def test_buffers_are_the_same_tensors_with_the_same_values(change: Any) -> None:
    model = nn.Sequential(Cache(change), nn.BatchNorm1d(3))
    model[1].eval()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    with eval_mode(model):
        assert not model.training
        model(torch.ones(2, 4))
    assert {name: buffer for name, buffer in model.named_buffers()}.keys() == before.keys()
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
    assert model[0].length == 2
    assert model.training
    assert not model[1].training


@pytest.mark.parametrize("change", CHANGES)
def test_pruning_and_recalibration_with_a_changing_buffer(change: Any) -> None:
    model = nn.Sequential(Cache(change), nn.BatchNorm1d(3))
    x = torch.randn(8, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capruner.prune(model, [(x, torch.arange(8) % 3)] * 4, num_grads=4, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    mean = model[0].fc(x).mean(dim=0)
    assert capruner.recalibrate_bn(model, [(x, None)]) == 1
    assert torch.equal(model[0].cache, before["0.cache"])
    torch.testing.assert_close(model[1].running_mean, mean)


class Interrupted(nn.Linear):
    """Interrupted as its mode changes, so many times."""

    times = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and self.times > 0:
            self.times -= 1
            raise KeyboardInterrupt
        super().__setattr__(name, value)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_as_modes_change(times: int) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Interrupted(2, 2), nn.Linear(2, 2))
    model[1].times = times
    with pytest.raises(KeyboardInterrupt), eval_mode(model):
        raise AssertionError("not reached")
    assert [module.training for module in model.modules()] == [True] * 4


def test_an_exception_restores_too() -> None:
    model = Cache(grow)

    def fail() -> None:
        with eval_mode(model):
            model(torch.ones(1, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.cache.tolist() == [1, 2]
    assert model.training


def test_training_mode_with_normalization_and_dropout_of_eval_mode() -> None:
    class DropPath(nn.Dropout):
        """Known by its name, as timm's and torchvision's are."""

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), DropPath(0.5), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with eval_mode(model):
        expected = model(x)
    with eval_mode(model, "train"):
        assert [module.training for module in model] == [True, False, False, False, True]
        assert torch.equal(model(x), expected)
    assert [module.training for module in model] == [True, True, False, True, True]
    with eval_mode(model, "as_is"):
        assert [module.training for module in model] == [True, True, False, True, True]
        assert not torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
