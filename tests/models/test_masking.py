"""Zeros stay zeros in anyone's training loop."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import capruner


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        model[0].weight[torch.rand(16, 8) < 0.6] = 0
        model[3].weight[:, ::2] = 0
    return model


def zeros(model: nn.Module) -> list[Tensor]:
    return [p == 0 for name, p in model.named_parameters() if p.dim() == 2]


def train(model: nn.Module, optimizer: Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 8, generator=generator), torch.randint(3, (12,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam with L2": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
}


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "masks first"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_hold_and_the_others_learn(name: str, before: bool) -> None:
    model = pruned()
    first, start = zeros(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters()) if before else None
    handle = capruner.mask_model(model)
    train(model, optimizer or OPTIMIZERS[name](model.parameters()))
    for mask, now, p, old in zip(
        first, zeros(model), (model[0].weight, model[3].weight), (start[0].weight, start[3].weight)
    ):
        assert torch.equal(mask, now)
        assert not torch.equal(p, old)
    assert handle.sparsity == pytest.approx(float(torch.cat([m.flatten() for m in first]).float().mean()))


def test_momentum_of_the_time_before_the_masks_does_not_move_them() -> None:
    model = pruned()
    dense = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer)  # every weight has momentum now
    model.load_state_dict(dense.state_dict())
    with capruner.mask_model(model):
        train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(zeros(model), zeros(dense)))


def test_let_go_they_grow_again() -> None:
    model = pruned()
    first = zeros(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = capruner.mask_model(model)
    train(model, optimizer)
    handle.remove()
    handle.remove()
    train(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(first, zeros(model)))


def test_names_and_types_are_untouched() -> None:
    model = pruned()
    keys = list(model.state_dict())
    with capruner.mask_model(model):
        assert list(model.state_dict()) == keys
        assert type(model[0].weight) is nn.Parameter
        assert not model[0].weight._backward_hooks
        copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == keys


def test_moving_average_compiled_and_half() -> None:
    ema_of = pytest.importorskip("timm.utils").ModelEmaV3
    model = pruned()
    first = zeros(model)
    ema, handle = ema_of(model, decay=0.5), capruner.mask_model(model)
    train(torch.compile(model, backend="eager"), torch.optim.AdamW(model.parameters(), 0.01))  # type: ignore[arg-type]
    ema.update(model)
    assert all(torch.equal(a, b) for a, b in zip(first, zeros(ema.module)))
    model.bfloat16()
    with torch.no_grad():
        model[0].weight.add_(1)
    handle.apply()
    assert all(torch.equal(a, b) for a, b in zip(first, zeros(model)))


def test_masks_from_elsewhere() -> None:
    model = pruned()
    mask = torch.zeros(3, 16)
    mask[:, :4] = 1
    handle = capruner.mask_model(model, masks={"3.weight": mask})
    assert torch.equal(model[3].weight[:, 4:], torch.zeros(3, 12))
    assert list(handle.masks) == ["3.weight"]


def test_a_model_is_not_kept_alive() -> None:
    model = pruned()
    handle = capruner.mask_model(model)
    gone = weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert gone() is None
    handle.apply()


def test_masks_hold_though_nobody_keeps_the_handle_until_the_model_goes() -> None:
    model = pruned()
    first = zeros(model)
    mask = weakref.ref(capruner.mask_model(model).masks["0.weight"])
    gc.collect()
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert all(torch.equal(a, b) for a, b in zip(first, zeros(model)))
    del model
    gc.collect()
    assert mask() is None


def test_a_model_may_be_collected_during_the_step_of_another() -> None:
    """Torch iterates over its hooks meanwhile, and refuses when one is removed."""
    models = [pruned()]
    hook = register_optimizer_step_post_hook(lambda *_: models.clear())
    try:
        capruner.mask_model(models[0])
        other = nn.Linear(2, 1)
        other.weight.grad = torch.ones_like(other.weight)
        torch.optim.SGD(other.parameters(), 0.1).step()
    finally:
        hook.remove()
    assert not models


def test_mistakes_are_told() -> None:
    dense = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="found no zeros"):
        capruner.mask_model(dense)
    with pytest.raises(ValueError, match=r"the mask of weight has shape \(2, 4\), the parameter \(4, 4\)"):
        capruner.mask_model(dense, masks={"weight": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="wieght"):
        capruner.mask_model(dense, masks={"wieght": torch.ones(4, 4)})


def _data_parallel(rank: int, folder: str) -> None:
    importlib.import_module("torch._dynamo")  # torch would import it while it wraps the model, and hold the group
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = pruned()
    first = zeros(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    handle = capruner.mask_model(wrapped)
    train(wrapped, torch.optim.AdamW(wrapped.parameters(), 0.01))
    assert all(torch.equal(a, b) for a, b in zip(first, zeros(model)))
    handle.remove()
    dist.destroy_process_group()
    del wrapped, handle
    gc.collect()
    # Threads of a group that something still holds abort at the interpreter's end now and then.
    assert not any("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def test_data_parallel(tmp_path: Path) -> None:
    mp.start_processes(_data_parallel, (str(tmp_path),), nprocs=2, start_method="spawn")


# What re-binds parameters


def rebind_by_loading(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    model.load_state_dict(dense, assign=True)


def rebind_by_hand(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    model[0].weight = nn.Parameter(dense["0.weight"].clone())
    model[3].register_parameter("weight", nn.Parameter(dense["3.weight"].clone()))


def replace_the_layer(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    model[0] = nn.Linear(8, 16)
    model[3] = nn.utils.skip_init(nn.Linear, 16, 3)
    model.load_state_dict(dense)


def move_to_new_parameters(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    model.float()


def swap_tensors(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()
        model.load_state_dict(dense)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def compile_a_part(model: nn.Sequential, dense: dict[str, Tensor]) -> None:
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]


@pytest.mark.promise(
    "Models and masks", "Masks hold in parameters that are replaced, by `load_state_dict(assign=True)` for example"
)
@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "optimizer last"])
@pytest.mark.parametrize(
    "rebind",
    [rebind_by_loading, rebind_by_hand, replace_the_layer, move_to_new_parameters, swap_tensors, compile_a_part],
)
def test_masks_hold_in_parameters_that_are_new(rebind: Callable[..., None], before: bool) -> None:
    model = pruned()
    first = zeros(model)
    dense = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    handle = capruner.mask_model(model)
    stale = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rebind(model, dense)
    assert handle.sparsity == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2) / (8 * 16 + 16 * 3)
    train(model, stale if before else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    assert all(torch.equal(mask, now) for mask, now in zip(first, zeros(model)))
    assert handle.sparsity == pytest.approx(float(torch.cat([m.flatten() for m in first]).float().mean()))


def test_loading_weights_applies_the_masks_at_once() -> None:
    model = pruned()
    first, dense = zeros(model), {k: torch.ones_like(v) for k, v in model.state_dict().items()}
    with capruner.mask_model(model):
        nn.DataParallel(model).load_state_dict({f"module.{k}": v for k, v in dense.items()})
        assert all(torch.equal(mask, now) for mask, now in zip(first, zeros(model)))
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        copied.load_state_dict(dense)
        assert not any(mask.any() for mask in zeros(copied))
    model.load_state_dict(dense)
    assert not any(mask.any() for mask in zeros(model))


def test_the_handle_counts_the_model() -> None:
    model = pruned()
    handle = capruner.mask_model(model)
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[3].weight.fill_(1)
    assert handle.sparsity == 0
    handle.apply()
    assert handle.sparsity > 0.5
    del model
    gc.collect()
    with pytest.raises(ValueError, match="no longer exists"):
        _ = handle.sparsity


@pytest.mark.promise("Models and masks", "A mask that can no longer be applied is an error")
def test_a_mask_that_cannot_hold_any_more_is_an_error_and_not_forgotten() -> None:
    model = pruned()
    handle = capruner.mask_model(model)
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"the mask of 0\.weight cannot be held: the model has no such parameter"):
        train(model, torch.optim.SGD(model.parameters(), 0.1))
    handle.remove()
    other = pruned()
    with capruner.mask_model(other):
        other[3] = nn.Linear(16, 5)
        with pytest.raises(ValueError, match=r"3\.weight cannot be held: its shape is \(3, 16\), .* \(5, 16\) now"):
            train(other, torch.optim.SGD(other.parameters(), 0.1))


def test_another_models_optimizer_leaves_the_graph_alone() -> None:
    model, other = pruned(), pruned()
    with capruner.mask_model(model), capruner.mask_model(other):
        loss = model(torch.ones(4, 8)).square().sum()
        train(other, torch.optim.SGD(other.parameters(), 0.1))
        loss.backward()  # an error where a weight has been written since
