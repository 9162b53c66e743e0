"""What every shrunk model does, by family: it matches its masked twin, loads, trains on, and exports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.shrinking.result import Shrunk

timm = pytest.importorskip("timm")
pytest.importorskip("torch_pruning")

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5
FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4},
    "resnet18": {"channels": (8, 8, 12, 12)},
    "mobilenetv2_035": {},  # depthwise layers in inverted residuals
    "mobilenetv3_small_050": {},  # squeeze-and-excitation, too
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)},
}


@dataclass
class Case:
    build: Callable[[], nn.Module]
    small: Shrunk


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(request.param, num_classes=5, **FAMILIES[request.param])
        for _ in range(3):  # BatchNorm statistics that are not those of a fresh layer
            model.train()(IMAGES)
        return model.eval()

    small = capruner.shrink(build(), [(IMAGES, LABELS)] * 4, macs=0.7, example_inputs=IMAGES, num_grads=4)
    return Case(build, small)


def put_back(small: Tensor, dense: Tensor, sides: dict[str, list[int]]) -> None:
    """``dense`` becomes ``small``, with zeros for the rows and columns that were removed."""
    if small.shape == dense.shape:
        dense.copy_(small)
        return
    index = torch.arange(dense.numel()).view(dense.shape)
    for dim, side in enumerate(("out", "in")[: dense.dim()]):
        keep = [i for i in range(dense.shape[dim]) if dense.shape[dim] == 1 or i not in sides.get(side, [])]
        index = index.index_select(dim, torch.tensor(keep))
    dense.zero_().view(-1)[index.flatten()] = small.flatten()


@torch.no_grad()
def test_its_outputs_are_those_of_its_masked_twin(case: Case) -> None:
    twin = case.build()
    weights = case.small.model.state_dict()
    for key, tensor in twin.state_dict().items():
        put_back(weights[key], tensor, case.small.removal.layers.get(key.rpartition(".")[0], {}))
    expected, outputs = twin(IMAGES), case.small.model(IMAGES)
    assert float((outputs - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_it_loads(case: Case, tmp_path: Path) -> None:
    case.small.save(tmp_path / "small.safetensors")
    again = capruner.load_shrunk(tmp_path / "small.safetensors", case.build())
    assert sum(p.numel() for p in again.parameters()) == case.small.costs["parameters"][1]
    assert torch.equal(again(IMAGES), case.small.model(IMAGES))


def test_it_exports(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from capruner.deploy.export import to_onnx

    to_onnx(case.small.model, tmp_path / "small.onnx", (3, 32, 32))  # compares the outputs with torch's


def test_it_trains_on(case: Case, tmp_path: Path) -> None:
    case.small.save(tmp_path / "small.safetensors")
    model = capruner.load_shrunk(tmp_path / "small.safetensors", case.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model.train()(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())
