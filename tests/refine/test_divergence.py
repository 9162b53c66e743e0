from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 5))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 20, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(40)]


def prune(model: nn.Module) -> capruner.PruningResult:
    return capruner.prune(model, batches(), sparsity=[0.3, 0.9], num_grads=40, labels="model", progress=False)


def test_it_is_the_divergence_of_the_applied_models_and_leaves_the_model_alone() -> None:
    model = net().train()
    result = prune(model)
    before = [p.clone() for p in model.parameters()]
    found = capruner.measure_divergence(result, model, batches(), samples=100)
    assert model.training
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    x = torch.cat([inputs for inputs, _ in batches()[:13]])  # the first whole batches with 100 samples
    with torch.no_grad():
        target = model.eval()(x).log_softmax(dim=1)
        for level in result.levels:
            pruned = net().eval()
            result.apply(pruned, level.sparsity)
            exact = F.kl_div(pruned(x).log_softmax(dim=1), target, log_target=True, reduction="batchmean")
            assert found[level.sparsity] == level.divergence == pytest.approx(float(exact), rel=1e-5)
    assert found[0.3] < found[0.9]


def test_it_is_saved_with_the_result(tmp_path: Path) -> None:
    model = net()
    result = prune(model)
    assert [level.divergence for level in result.levels] == [None, None]
    result.save(tmp_path / "unmeasured.safetensors")
    assert capruner.load_result(tmp_path / "unmeasured.safetensors").level(0.9).divergence is None
    found = capruner.measure_divergence(result, model, batches())
    result.save(tmp_path / "measured.safetensors")
    assert capruner.load_result(tmp_path / "measured.safetensors").level(0.9).divergence == found[0.9]


def test_what_cannot_be_measured() -> None:
    model = net()
    result = prune(model)
    with pytest.raises(ValueError, match="batches is empty"):
        capruner.measure_divergence(result, model, [])
    with pytest.raises(ValueError, match="no parameter"):
        capruner.measure_divergence(result, nn.Linear(20, 5), batches())
