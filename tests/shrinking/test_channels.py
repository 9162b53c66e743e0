"""Channels of convolutions, with the dependencies that torch-pruning finds."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.shrinking.run import find_units

timm = pytest.importorskip("timm")
pytest.importorskip("torch_pruning")

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", channels=(8, 8, 12, 12), num_classes=5)
    for _ in range(3):  # BatchNorm statistics that are not those of a fresh layer
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


def test_a_resnet_shrinks_through_its_residual_connections(tmp_path: Path) -> None:
    model = resnet()
    small = capruner.shrink(
        model, [(IMAGES, LABELS)] * 4, F.cross_entropy, macs=0.3, example_inputs=IMAGES, num_grads=4, progress=False
    )
    assert not small.left_alone
    dense, now = small.costs["macs"]
    assert now <= 0.3 * dense
    assert capruner.multiply_adds(small.model, (3, 32, 32)).dense * 2 == now
    trunk = [row for row in small.rows if row["name"] in ("conv1", "layer4.0.downsample.0")]
    assert any(row["left"] < row["units"] for row in trunk)
    twin = resnet()
    with torch.no_grad():
        for name, sides in small.removal.layers.items():
            layer, tiny = twin.get_submodule(name), small.model.get_submodule(name)
            size = [*layer.weight.shape[:2]]
            rows = torch.tensor([i for i in range(size[0]) if i not in sides.get("out", [])])
            if layer.weight.dim() > 1:
                columns = torch.tensor([i for i in range(size[1]) if i not in sides.get("in", [])])
                layer.weight.zero_()[rows[:, None], columns] = tiny.weight
            else:
                layer.weight.zero_()[rows] = tiny.weight
            if layer.bias is not None:
                layer.bias.zero_()[rows] = tiny.bias
        assert torch.allclose(small.model(IMAGES), twin(IMAGES), atol=1e-5)
    small.save(tmp_path / "small.safetensors")
    again = capruner.load_shrunk(tmp_path / "small.safetensors", resnet()).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), small.model(IMAGES))
    small.model.train()(IMAGES).sum().backward()


def test_channels_that_remain_are_multiples() -> None:
    small = capruner.shrink(
        resnet(), [(IMAGES, LABELS)] * 4, macs=0.6, example_inputs=IMAGES, multiple_of=4, num_grads=4, progress=False
    )
    left = [row["left"] for row in small.rows]
    assert any(row["left"] < row["units"] for row in small.rows)
    assert all(count % 4 == 0 and count for count in left)


def test_channels_leave_eight_at_a_time_by_default() -> None:
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers).eval()
    small = capruner.shrink(model, [(IMAGES, LABELS)] * 4, macs=0.8, example_inputs=IMAGES, num_grads=4, progress=False)
    assert [row["left"] for row in small.rows] == [16]


def test_depthwise_convolutions_go_along() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 28 * 28, 5),
    ).eval()
    groups, left = find_units(model, IMAGES, ["channels"])
    assert {group.name: group.units for group in groups} == {"1": 8, "4": 4}
    by_name = {group.name: {(cut.layer, cut.side): cut.positions for cut in group.cuts} for group in groups}
    assert set(by_name["1"]) == {("0", "out"), ("1", "out"), ("2", "out"), ("4", "in")}
    assert by_name["4"]["6", "in"].equal(torch.arange(4 * 28 * 28).view(4, 28 * 28))
    assert not left


def test_grouped_convolutions_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 3)
    )
    groups, left = find_units(model.eval(), IMAGES, ["channels"])
    assert [group.name for group in groups] == ["3"]
    assert {item.name for item in left} == {"0", "2", "4"}
    assert "no layer reads them" in next(item.reason for item in left if item.name == "4")


class WithoutNorm(nn.Module):
    """Channels that a parameter outside of all layers is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.shift = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) + self.shift)


def test_parameters_outside_of_layers() -> None:
    with pytest.raises(ValueError, match=r"a: .*parameter"):
        find_units(WithoutNorm().eval(), IMAGES, ["channels"])


def test_without_torch_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch_pruning":
            raise ModuleNotFoundError("No module named 'torch_pruning'", name="torch_pruning")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'capruner\[shrink\]'"):
        find_units(resnet(), IMAGES, ["channels"])
