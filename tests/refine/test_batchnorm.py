from __future__ import annotations

import pytest
import torch
from torch import nn

import capruner


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def images(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, 8, 8) + 1, torch.zeros(16)) for _ in range(count)]


def test_statistics_are_the_average_over_the_batches_and_dropout_stays_off() -> None:
    model, data = conv_net(), images(5)
    model[1].momentum = 0.3
    assert capruner.recalibrate_bn(model, data, num_batches=3) == 2
    first = torch.stack([model[0](x).mean(dim=(0, 2, 3)) for x, _ in data[:3]]).mean(dim=0)
    torch.testing.assert_close(model[1].running_mean, first)
    second = torch.stack(
        [
            model[4](nn.functional.batch_norm(model[0](x), None, None, training=True).relu()).mean(dim=(0, 2, 3))
            for x, _ in data[:3]
        ]
    ).mean(dim=0)
    torch.testing.assert_close(model[5].running_mean, second, rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.3
    assert all(module.training for module in model.modules())


def test_an_exception_leaves_everything_as_it_was() -> None:
    model = conv_net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the model fails on batch 1 \(inputs: float32 \(2, 5\)\): RuntimeError"):
        capruner.recalibrate_bn(model, [*images(1), (torch.randn(2, 5), None)])
    with pytest.raises(ValueError, match="no batch"):
        capruner.recalibrate_bn(model, [])
    with pytest.raises(ValueError, match="num_batches must be at least 1, got 0"):
        capruner.recalibrate_bn(model, images(1), 0)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_without_batchnorm() -> None:
    assert capruner.recalibrate_bn(nn.Linear(3, 2), images(1)) == 0
