"""Calibrations as a whole: gradients that say nothing, or that only float64 can square."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_case import TWO_GROUPS
from memory_case import net as three_layers
from processes import run
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.distributed import processes


def data(count: int = 8, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(2, (size,), generator=generator))
        for _ in range(count)
    ]


def prune(model: nn.Module, loss: Any = F.cross_entropy, batches: Any = None, **more: Any) -> capruner.PruningResult:
    arguments: dict[str, Any] = {"sparsity": 0.5, "num_grads": 8, "progress": False}
    return capruner.prune(model, data() if batches is None else batches, loss, **arguments | more)


def two_layers(outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


METHODS = ["cap", "obs", "fast_cap"]


@pytest.mark.promise("Numbers", "Gradients that are all zero are an error: the result would be magnitude pruning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", ["batch", "sample"])
@pytest.mark.parametrize("solver", ["auto", "woodbury"])
def test_a_loss_that_is_constant_is_refused(method: str, gradients: str, solver: str, tmp_path: Path) -> None:
    more = {} if solver == "auto" else {"solver": solver, "damp": 1e-3}
    batches = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in data()]
    for _ in range(2):  # also when it is resumed
        with pytest.raises(ValueError, match=r"every gradient of the calibration is exactly 0.*mse_loss"):
            prune(two_layers(1), batches=batches, method=method, gradients=gradients, state_dir=tmp_path, **more)
    with pytest.raises(ValueError, match="every gradient of the calibration is exactly 0"):
        capruner.compensate_masks(
            two_layers(1), batches, F.cross_entropy, {"0.weight": torch.ones(6, 4)}, num_grads=8, progress=False
        )


def test_a_constant_loss_within_a_memory_budget() -> None:
    batches = [(torch.randn(4, 40), None) for _ in range(4)]
    with pytest.raises(ValueError, match="every gradient of the calibration is exactly 0"):
        prune(
            three_layers(),
            lambda outputs, _: outputs.sum() * 0,
            batches,
            num_grads=4,
            fisher_block_size=60,
            memory_budget=TWO_GROUPS,
        )


class TwoPaths(nn.Module):
    """Of two layers that take part in the loss one has no influence on it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.silent = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.heard(x) + 0 * self.silent(x)


@pytest.mark.promise("Numbers", "A layer whose gradients are all zero is named in a warning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", ["batch", "sample"])
def test_a_layer_without_gradients_is_named(method: str, gradients: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "capruner"):
        result = prune(TwoPaths(), method=method, gradients=gradients)
    assert [record.message for record in caplog.records if "every gradient of silent.weight is" in record.message]
    assert "heard" not in caplog.text
    assert result.settings["layers_without_gradient"] == ["silent.weight"]
    caplog.clear()
    assert prune(two_layers(), method=method).settings["layers_without_gradient"] == []
    assert not caplog.records


def test_a_layer_without_gradients_goes_first_however_small_the_others_are() -> None:
    for scale in (1.0, 1e-19):
        kept = prune(TwoPaths(), lambda o, y, scale=scale: scale * F.cross_entropy(o, y)).masks()
        assert kept["heard.weight"].all()
        assert not kept["silent.weight"].any()


def on_ranks(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in METHODS:
        try:
            prune(two_layers(), lambda outputs, _: outputs.sum() * 0, method=method)
        except ValueError as error:
            found[method] = str(error)
        # One process alone has gradients.
        found[f"{method} layers"] = prune(
            two_layers(), lambda outputs, _: outputs.sum() * float(processes().rank == 1), method=method
        ).settings["layers_without_gradient"]
        silent = prune(TwoPaths(), method=method).settings["layers_without_gradient"]
        found[f"{method} silent"] = silent
    # Of 13 gradients one process draws seven in one slab more than the other, in float64.
    model = nn.Linear(8, 4).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 8, generator=generator).double(), torch.randint(4, (2,), generator=generator))] * 7
    result = prune(model, batches=batches, num_grads=13)
    mixed = nn.Sequential(nn.Linear(8, 4), Float64(), nn.Linear(4, 2).double())
    weights = prune(mixed, lambda o, _: o.square().sum(), [(x.float(), y) for x, y in batches], num_grads=13)
    found["dtypes"] = [str(w.dtype) for r in (result, weights) for w in r.level().weights.values()]
    return found


class Float64(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_several_processes(tmp_path: Path) -> None:
    for found in run(2, tmp_path / "ranks", on_ranks):
        for method in METHODS:
            assert found[method].startswith("every gradient of the calibration is exactly 0")
            assert found[f"{method} layers"] == []
            assert found[f"{method} silent"] == ["silent.weight"]
        assert found["dtypes"] == ["torch.float64", "torch.float32", "torch.float64"]


def scaled(loss: Callable[..., Tensor], scale: float) -> Callable[..., Tensor]:
    return lambda outputs, targets: scale * loss(outputs, targets)


@pytest.mark.promise("Numbers", "The scale of the loss does not change the masks")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-12, 1e15, 1e25])
@pytest.mark.parametrize("model", [lambda: nn.Linear(4, 2, bias=False), two_layers], ids=["one", "two"])
def test_the_scale_of_the_loss_makes_no_difference(method: str, scale: float, model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    network = model()
    plain, other = (prune(network, scaled(F.cross_entropy, s), method=method) for s in (1.0, scale))
    for name, mask in plain.masks().items():
        assert torch.equal(other.masks()[name], mask)
        torch.testing.assert_close(other.level().weights[name], plain.level().weights[name], rtol=1e-3, atol=1e-4)
    assert other.predicted_loss() == pytest.approx(plain.predicted_loss() * scale**2, rel=1e-3)


@pytest.mark.parametrize("method", ["cap", "obs"])
def test_tiny_gradients_with_absolute_damping(method: str) -> None:
    network = two_layers()
    for solver in ("woodbury", "accumulate"):
        plain = prune(network, method=method, damp=1e-4, solver=solver)
        tiny = prune(network, scaled(F.cross_entropy, 1e-15), method=method, damp=1e-34, solver=solver)
        for name, mask in plain.masks().items():
            assert torch.equal(tiny.masks()[name], mask)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_update_that_leaves_one_weight_of_a_block_with_a_tiny_gradient(method: str) -> None:
    """The gradients of weights that are gone are 1e20 times those of the ones that are left."""
    network = nn.Linear(4, 2, bias=False)
    batches = [(x * torch.tensor([1.0, 1.0, 1.0, 1e-20]), y) for x, y in data()]
    masks = {"weight": torch.tensor([[False, False, False, True]] * 2)}
    result = prune(network, batches=batches, method=method, masks=masks, sparsity=7 / 8, fisher_block_size=4)
    assert int((~result.masks()["weight"]).sum()) == 7
    assert torch.isfinite(result.level().weights["weight"]).all()
