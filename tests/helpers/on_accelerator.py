"""Run every method on the simulated accelerator and on the CPU; print ``{case: "equal" or what went wrong}`` as JSON. For ``tests/test_accelerator.py``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerator import DEVICE, SimTensor
from torch import Tensor, nn

import capruner

METHODS = ("cap", "fast_cap", "obs", "magnitude")
MASK_TYPES = ("unstructured", "2:4", "block4")
KNOBS: dict[str, Any] = {"num_grads": 8, "fisher_block_size": 16, "progress": False}


class Net(nn.Module):
    """Convolution, BatchNorm, attention-free MLP: every kind of layer that needs its own handling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def network(device: str) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(device)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(4, 4, 4, 4, generator=generator) for _ in range(8)]
    return [(x, torch.randint(4, (4,), generator=generator)) for x in draw]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def prune(device: str, **knobs: Any) -> Mapping[str, Tensor]:
    model = network(device)
    data = None if knobs.get("method") == "magnitude" else batches()
    result = capruner.prune(model, data, nn.functional.cross_entropy, sparsity=0.5, **KNOBS | knobs)
    result.apply(model)
    return state(model) | {f"mask of {name}": mask.cpu() for name, mask in result.masks().items()}


def distill(device: str) -> Mapping[str, Tensor]:
    model, dense = network(device), network(device)
    capruner.prune(model, None, method="magnitude", sparsity=0.5, progress=False).apply(model)
    capruner.distill(model, dense, batches(), progress=False)
    return state(model)


def compensate_masks(device: str) -> Mapping[str, Tensor]:
    model = network(device)
    masks = {"hidden.weight": torch.arange(16 * 32).view(16, 32) % 3 > 0}
    capruner.compensate_masks(model, batches(), nn.functional.cross_entropy, masks, **KNOBS).apply(model)
    return state(model)


def recalibrate_bn(device: str) -> Mapping[str, Tensor]:
    model = network(device)
    capruner.recalibrate_bn(model, batches())
    return state(model)


def sparsest(device: str) -> Mapping[str, Tensor]:
    model = network(device)
    x, y = (torch.cat(part).to(device) for part in zip(*batches()))

    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(nn.functional.cross_entropy(model(x), y))

    calibration = capruner.calibrate(model, batches(), nn.functional.cross_entropy, **KNOBS)
    best = calibration.sparsest(metric, within=0.05)
    best.result.apply(model)
    return state(model) | {"sparsity": torch.tensor(best.sparsity)}


def gradual(device: str) -> Mapping[str, Tensor]:
    model = network(device).train()
    pruner = capruner.GradualPruner(model, batches(), nn.functional.cross_entropy, sparsity={0: 0.3, 1: 0.6}, **KNOBS)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for epoch in range(2):
        pruner.step(epoch)
        for x, y in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    return state(model)


CASES: dict[str, Callable[[str], Mapping[str, Tensor]]] = {
    f"{method} {mask}": lambda device, method=method, mask=mask: prune(device, method=method, mask_type=mask)
    for method in METHODS
    for mask in MASK_TYPES
} | {
    "recomputation": lambda device: prune(device, method="cap", num_recomputations=2),
    "distill": distill,
    "compensate_masks": compensate_masks,
    "recalibrate_bn": recalibrate_bn,
    "sparsest": sparsest,
    "GradualPruner": gradual,
}


def compare(case: Callable[[str], Mapping[str, Tensor]]) -> str:
    here, there = case("cpu"), case(DEVICE)
    for name, value in here.items():
        zeros_differ = not torch.equal(value == 0, there[name] == 0)
        if zeros_differ or not torch.allclose(value, there[name], rtol=1e-4, atol=1e-5):
            return f"{name} differs"
    return "equal"


def main() -> None:
    assert isinstance(network(DEVICE).conv.weight.data, SimTensor)
    told = {}
    for name in sys.argv[1:] or CASES:
        try:
            told[name] = compare(CASES[name])
        except Exception:
            told[name] = traceback.format_exc(limit=-6)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
