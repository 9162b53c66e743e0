"""Labels drawn from the model: the distribution, the Fisher matrix that comes of it, and that nothing else changes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.batches import Batches
from capruner.calibration.gradients import gradient_slabs
from capruner.calibration.labels import draw_uniform, loss_of_model_labels
from capruner.calibration.stream import CalibrationStream
from capruner.models.modes import eval_mode


def data(count: int, batch: int = 5, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, 4, generator=generator), torch.randint(classes, (batch,), generator=generator))
        for _ in range(count)
    ]


def linear(classes: int = 3) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, classes)


def labels_of(batches: Any, logits: Tensor, seed: int = 0) -> Tensor:
    """What the wrapped loss hands to the real one."""
    seen: list[Tensor] = []

    def spy(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return F.cross_entropy(outputs, targets)

    loss, draw = loss_of_model_labels(spy), functools.partial(draw_uniform, seed=seed)
    for index, (x, _) in enumerate(batches):
        chances = draw(index, x)
        loss(logits.expand(len(x), -1), chances)
    return torch.cat(seen)


def test_classes_come_as_often_as_the_model_says() -> None:
    chances = torch.tensor([0.7, 0.05, 0.25])
    found = labels_of(data(800), chances.log()[None]).bincount(minlength=3) / 4000
    torch.testing.assert_close(found, chances, atol=0.03, rtol=0)


def test_draws_follow_from_the_seed_and_start_anew_with_the_data() -> None:
    logits = torch.zeros(1, 3)
    batches = data(20)
    assert torch.equal(labels_of(batches, logits), labels_of(batches, logits))
    assert not torch.equal(labels_of(batches, logits), labels_of(batches, logits, seed=1))


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_their_outer_products_are_the_fisher_matrix(mode: str) -> None:
    """For softmax regression the Fisher matrix of one input is (diag p − p pᵀ) ⊗ x xᵀ."""
    model = linear().double()
    x = torch.randn(1, 4, dtype=torch.float64)
    count = 4000
    stream = CalibrationStream(Batches([(x, None)] * count), x.device, draw_uniform)
    loss = loss_of_model_labels(F.cross_entropy)
    total = torch.zeros(12, 12, dtype=torch.float64)
    with eval_mode(model):
        slabs = gradient_slabs(model, stream, loss, {"weight": model.weight}, count, mode=mode, progress=False)  # type: ignore[arg-type]
        for slab in slabs:
            g = slab["weight"].flatten(1)
            total += g.mT @ g / count
    p = model(x)[0].softmax(0)
    exact = torch.kron(torch.diag(p) - torch.outer(p, p), x.mT @ x)
    assert float(((total - exact).norm() / exact.norm()).detach()) < 0.06


@pytest.mark.parametrize("method", ["cap", "fast_cap", "obs"])
def test_pruning_needs_no_labels(method: str) -> None:
    model = linear(5)
    settings: dict[str, Any] = {
        "sparsity": 0.5,
        "method": method,
        "num_grads": 40,
        "damp": 1e-3,
        "progress": False,
        "labels": "model",
    }
    with_labels = capruner.prune(model, data(40), **settings)
    without = capruner.prune(model, [(x, None) for x, _ in data(40)], **settings)
    assert torch.equal(with_labels.level().weights["weight"], without.level().weights["weight"])
    of_data = capruner.prune(model, data(40), **settings | {"labels": "data"})
    assert not torch.equal(with_labels.level().weights["weight"], of_data.level().weights["weight"])
    assert with_labels.settings["labels"] == "model"


def test_what_is_no_classifier_is_refused() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[..., None]

    with pytest.raises(
        ValueError, match=r"labels='model' draws classes from logits .* gave float32 \(5, 3, 1\); use labels='data'"
    ):
        capruner.prune(Volume(), data(3), num_grads=3, labels="model", progress=False)
    with pytest.raises(ValueError, match=r"labels must be one of .*got 'teacher'"):
        capruner.prune(linear(), data(3), num_grads=3, labels="teacher", progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch 0 is a tuple of 3"):
        capruner.prune(linear(), [(torch.ones(2, 4),) * 3], num_grads=1, labels="model", progress=False)
