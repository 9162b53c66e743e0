"""Pruning in several steps inside a training loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import capruner

LEVELS = {0: 0.5, 2: 0.75, 4: 0.9}
KNOBS: dict[str, Any] = {"num_grads": 8, "progress": False}
SELECTED = ["0.weight", "2.weight"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5))


def data(first: int = 0, every: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    stream = [(torch.randn(6, 8, generator=generator), torch.randint(5, (6,), generator=generator)) for _ in range(8)]
    return stream[first::every]


def pruner_of(model: nn.Module, **knobs: Any) -> capruner.GradualPruner:
    return capruner.GradualPruner(model, data(), F.cross_entropy, **{"sparsity": LEVELS, **KNOBS, **knobs})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, check: Callable[[], object] = lambda: None) -> None:
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        check()


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if p.dim() == 2)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.promise("Models and masks", "Pruned weights are 0 after every optimizer step")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_grow_and_hold_through_every_step(name: str) -> None:
    model = net()
    pruner = pruner_of(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    assert (pruner.sparsity, pruner.next, pruner.history) == (0, 0, [])
    counts, before = [], pruner.masks
    for epoch in range(6):
        result = pruner.step(epoch)
        assert (result is None) == (epoch not in LEVELS)
        assert pruner.step(epoch) is None  # at the same epoch
        if result is not None:
            assert isinstance(result, capruner.PruningResult)
            assert result.sparsities == [LEVELS[epoch]]
        masks = pruner.masks
        assert all(not (masks[key] & ~before[key]).any() for key in masks)
        before, expected = masks, round(260 * max(s for e, s in LEVELS.items() if e <= epoch))

        def check(expected: int = expected) -> None:
            assert zeros(model) == expected

        check()
        train(model, optimizer, check)
        counts.append(zeros(model))
    assert counts == [130, 130, 195, 195, 234, 234]
    assert pruner.sparsity == pytest.approx(0.9)
    assert pruner.next is None
    assert [(row["epoch"], row["sparsity"]) for row in pruner.history] == list(LEVELS.items())
    pruner.remove()
    train(model, optimizer)
    assert zeros(model) < 234


def test_updates_that_were_skipped_are_not_made_up_for_one_by_one() -> None:
    model = net()
    pruner = pruner_of(model, sparsity={0.5: 0.3, 2: 0.6, 7: 0.9})
    assert pruner.step(0) is None
    assert pruner.step(2.9999999) is not None
    assert (pruner.next, zeros(model)) == (7, 156)
    assert pruner.step(1) is None  # an earlier epoch does not bring weights back
    assert pruner.step(6.9999999) is not None  # a loop that counts in floats
    assert [row["sparsity"] for row in pruner.history] == [0.6, 0.9]


def test_numbers_of_numpy_are_plain_numbers_in_the_state() -> None:
    model = net()
    pruner = pruner_of(model, sparsity={np.int64(0): np.float64(0.5), np.float32(1.5): np.float32(0.75)})
    assert pruner.step(np.int64(0)) is not None  # type: ignore[arg-type]
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["schedule"] == [[0, 0.5], [1.5, 0.75]]


def test_step_keeps_gradients_modes_and_optimizer_state() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    momentum = copy.deepcopy(optimizer.state_dict())
    pruner_of(model).step(0)
    assert model.training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum["state"][key]["momentum_buffer"])


@pytest.mark.promise(
    "Models and masks", "Training with `GradualPruner` resumes from a checkpoint of the loop with bit-identical results"
)
@pytest.mark.parametrize("weights_first", [True, False])
def test_resumed_training_is_bit_identical(weights_first: bool) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: capruner.GradualPruner, epochs: range) -> None:
        for epoch in epochs:
            pruner.step(epoch)
            train(model, optimizer)

    model = net()
    optimizer, pruner = OPTIMIZERS["adamw"](model.parameters()), pruner_of(model)
    run(model, optimizer, pruner, range(4))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    assert sum(mask.numel() for mask in pruner.state_dict()["masks"].values()) == 20 + 13  # bytes, for 260 weights
    run(model, optimizer, pruner, range(4, 6))

    file.seek(0)
    weights, optimizer_state, state = torch.load(file, weights_only=True)
    again = net()
    with torch.no_grad():
        again[0].weight.add_(1)
    resumed, optimizer = pruner_of(again), OPTIMIZERS["adamw"](again.parameters())
    if weights_first:
        again.load_state_dict(weights, assign=True)
    resumed.load_state_dict(state)
    if not weights_first:
        again.load_state_dict({key: value + 1 for key, value in weights.items()})  # not zero where pruned
        assert zeros(again) == 195
        again.load_state_dict(weights)
    optimizer = OPTIMIZERS["adamw"](again.parameters())
    optimizer.load_state_dict(optimizer_state)
    assert (resumed.next, zeros(again), len(resumed.history)) == (4, 195, 2)
    assert resumed.step(3) is None
    run(again, optimizer, resumed, range(4, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert resumed.history == pruner.history


@pytest.mark.promise("Models and masks", "A `GradualPruner` state of another model, schedule or method is refused")
def test_a_state_of_something_else_is_refused_and_changes_nothing() -> None:
    state = pruner_of(net()).state_dict()
    other = nn.Sequential(nn.Linear(8, 21), nn.ReLU(), nn.Linear(21, 5))
    cases: list[tuple[capruner.GradualPruner, Any, str]] = [
        (pruner_of(other), state, r"0.weight is of shape \(20, 8\) in it and of shape \(21, 8\) here"),
        (pruner_of(net(), params="0.weight"), state, r"2.weight is of shape \(5, 20\) in it and missing here"),
        (pruner_of(net(), sparsity={0: 0.5}), state, r"sparsity=\{0: 0.5, 2: 0.75, 4: 0.9\}, .* sparsity=\{0: 0.5\}"),
        (pruner_of(net(), method="magnitude"), state, "method=cap, and this one has method=magnitude"),
        (pruner_of(net()), {"model": 1}, "not a state of a GradualPruner"),
        (pruner_of(net()), state | {"version": 99}, "newer capruner"),
        (pruner_of(net()), state | {"masks": {}}, "damaged"),
        (pruner_of(net()), state | {"masks": dict.fromkeys(SELECTED, torch.zeros(3))}, "damaged"),
    ]
    for pruner, wrong, message in cases:
        masks = pruner.masks
        with pytest.raises(ValueError, match=message):
            pruner.load_state_dict(wrong)
        assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())


@pytest.mark.promise("Models and masks", "`GradualPruner` and its callbacks check all arguments before training")
@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"params": "no.such"}, "no.such"),
        ({"num_grads": 0}, "num_grads"),
        ({"method": "sap"}, "method must be one of"),
        ({"gradients": "epoch"}, "gradients must be one of"),
        ({"solver": "fast"}, "solver must be one of"),
        ({"on_bad_batch": "ignore"}, "on_bad_batch must be one of"),
        ({"fisher_block_size": 0}, "fisher_block_size"),
        ({"mask_type": "2:4"}, r"sparsity of 0.5; got \[0.75, 0.9\]"),
        ({"mask_type": "2:4", "sparsity": {0: 0.5}, "num_recomputations": 2}, "num_recomputations must be 1"),
        ({"sparsity": {0: 0.9, 1: 0.5}}, "must rise"),
        ({"masks": {"0.weight": torch.zeros(20, 8)}, "sparsity": {0: 0.1}}, "0.1|below|already"),
    ],
)
def test_arguments_are_checked_at_construction(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pruner_of(net(), **knobs)


def test_unknown_knobs_epochs_that_are_no_numbers_and_removed_pruners() -> None:
    with pytest.raises(TypeError, match="num_gradients"):
        pruner_of(net(), num_gradients=3)
    with pytest.raises(ValueError, match="give `batches`"):
        capruner.GradualPruner(net(), None, sparsity=LEVELS)
    pruner = pruner_of(net())
    for epoch in (None, "0", True, float("nan")):
        with pytest.raises(ValueError, match="epoch must be a number"):
            pruner.step(epoch)  # type: ignore[arg-type]
    pruner.remove()
    with pytest.raises(ValueError, match="was removed"):
        pruner.step(0)


def test_magnitude_needs_no_data_and_earlier_masks_hold_from_the_start() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:4] = 0
    pruner = capruner.GradualPruner(model, None, sparsity={1: 0.5}, method="magnitude", masks="zeros", progress=False)
    train(model, OPTIMIZERS["sgd"](model.parameters()))
    assert zeros(model) == 32
    pruner.step(1)
    assert zeros(model) == 130
    assert not pruner.masks["0.weight"][:4].any()


def test_parameters_that_are_unfrozen_later_stay_dense() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    pruner = pruner_of(model)
    pruner.step(0)
    model[0].weight.requires_grad_(True)
    pruner.step(2)
    assert (zeros(model), list(pruner.masks)) == (75, ["2.weight"])
    assert pruner_of(model, params="2.weight").load_state_dict(pruner.state_dict()) is None


def test_step_inside_inference_mode() -> None:
    model = net()
    pruner = pruner_of(model)
    with torch.inference_mode():
        pruner.step(0)
    pruner.step(2)
    assert zeros(model) == 195


def test_knobs_may_come_as_a_config() -> None:
    model = net()
    config = capruner.PruneConfig(num_grads=8, method="fast_cap", exclude="0.weight")
    pruner = capruner.GradualPruner(model, data(), sparsity=LEVELS, config=config, progress=False)
    result = pruner.step(2)
    assert result is not None
    assert (result.method, zeros(model), list(pruner.masks)) == ("fast_cap", 75, ["2.weight"])
    with pytest.raises(ValueError, match="method=cap, and this one has method=fast_cap"):
        pruner.load_state_dict(pruner_of(net(), params="2.weight").state_dict())


def test_each_update_has_its_own_state_folder(tmp_path: Path) -> None:
    model = net()
    pruner = pruner_of(model, state_dir=tmp_path / "state")
    pruner.step(0)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["epoch-0"]
    pruner.step(2)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["epoch-2"]
    assert zeros(model) == 195


def test_moving_averages_keep_the_zeros_after_apply_to() -> None:
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner, optimizer = pruner_of(model), OPTIMIZERS["sgd"](model.parameters())
    for epoch in range(3):
        if pruner.step(epoch) is not None:
            pruner.apply_to(average)
        train(model, optimizer, lambda: average.update_parameters(model))
        for name, p in average.module.named_parameters():
            if name in pruner.masks:
                assert torch.equal(p == 0, ~pruner.masks[name])
    with pytest.raises(ValueError, match=r"no parameter or module is called '0\.weight'"):
        pruner.apply_to(nn.Linear(8, 20))


def test_a_loader_that_accelerate_has_prepared_is_not_left_in_the_middle_of_an_epoch() -> None:
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    dataset = [(torch.randn(8), torch.randint(5, ())) for _ in range(12)]
    model, optimizer, loader = accelerator.prepare(
        model, OPTIMIZERS["adamw"](model.parameters()), torch.utils.data.DataLoader(dataset, batch_size=2)
    )
    pruner = capruner.GradualPruner(model, loader, sparsity={0: 0.5}, num_grads=3, progress=False)
    accelerator.register_for_checkpointing(pruner)
    pruner.step(0)
    assert not accelerator.gradient_state.in_dataloader
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        assert zeros(model) == 130


def test_accelerate_stops_and_resumes_in_the_middle(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    dataset = [(torch.randn(8), torch.randint(5, ())) for _ in range(12)]

    def prepared() -> tuple[Any, nn.Module, Any, Any, capruner.GradualPruner]:
        accelerator, model = accelerate.Accelerator(cpu=True), net()
        model, optimizer, loader = accelerator.prepare(
            model, OPTIMIZERS["adamw"](model.parameters()), torch.utils.data.DataLoader(dataset, batch_size=2)
        )
        pruner = capruner.GradualPruner(model, loader, sparsity={0: 0.5, 2: 0.75}, num_grads=3, progress=False)
        accelerator.register_for_checkpointing(pruner)
        return accelerator, model, optimizer, loader, pruner

    def run(epochs: range, accelerator: Any, model: nn.Module, optimizer: Any, loader: Any, pruner: Any) -> None:
        for epoch in epochs:
            pruner.step(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()

    whole = prepared()
    run(range(2), *whole)
    whole[0].save_state(str(tmp_path / "state"))
    run(range(2, 4), *whole)
    again = prepared()
    again[0].load_state(str(tmp_path / "state"))
    assert zeros(again[1]) == 130
    run(range(2, 4), *again)
    assert zeros(again[1]) == 195
    assert all(torch.equal(a, b) for a, b in zip(whole[1].parameters(), again[1].parameters(), strict=True))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        model = net()
        wrapped = DistributedDataParallel(model)
        share = data(rank, 2)
        pruner = capruner.GradualPruner(wrapped, share, F.cross_entropy, sparsity=LEVELS, **KNOBS)
        optimizer = OPTIMIZERS["adamw"](wrapped.parameters())
        for epoch in range(3):
            pruner.step(epoch)
            for x, y in share:
                optimizer.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
        torch.save([model.state_dict(), pruner.state_dict()["masks"], zeros(model)], f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.promise("Several processes", "Gradual pruning on two processes ends with identical bytes on both")
def test_two_processes_end_with_the_same_bytes(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first[2] == second[2] == 195
    for a, b in zip(first[:2], second[:2]):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
