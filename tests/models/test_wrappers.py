"""Compiled and data-parallel models, or parts of models, have the names of the plain one, in both directions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import capruner
from capruner.models.wrappers import all_parameters, by_first_name, first_names, owner, unwrap


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 3))


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(6)]


def compiled_part(model: nn.Module) -> nn.Module:
    model[0] = torch.compile(model[0])  # type: ignore[operator]
    return model


def checkpointed_part(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])  # type: ignore[operator, index]
    return model


def parallel_part(model: nn.Module) -> nn.Module:
    model[0] = nn.DataParallel(model[0])  # type: ignore[operator, index]
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,  # type: ignore[dict-item]
    "data parallel": nn.DataParallel,
    "average": AveragedModel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(torch.compile(model))),  # type: ignore[dict-item, return-value, arg-type]
    "compiled part": compiled_part,
    "checkpointed part": checkpointed_part,
    "parallel part": parallel_part,
}


@pytest.mark.promise(
    "Models and masks", "Results and masks fit a model with and without `torch.compile` and data-parallel wrappers"
)
@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        (name, mode)
        for name in WRAPPERS
        for mode in ("batch", "sample")
        if (name, mode) != ("checkpointed part", "sample")
    ],
)
def test_results_fit_with_and_without_the_wrapper(name: str, gradients: str, tmp_path: Path) -> None:
    wrapped = WRAPPERS[name](plain())
    call = {"num_grads": 6, "gradients": gradients, "progress": False}
    expected = capruner.prune(plain(), data(), **call)  # type: ignore[arg-type]
    found = capruner.prune(wrapped, data(), **call)  # type: ignore[arg-type]
    assert list(found.masks()) == list(expected.masks()) == ["0.0.weight", "2.weight"]
    for key, mask in expected.masks().items():
        assert torch.equal(mask, found.masks()[key])
    found.save(tmp_path / "result.safetensors")
    for model in (plain(), WRAPPERS[name](plain())):
        capruner.load_result(tmp_path / "result.safetensors").apply(model)
        handle = capruner.mask_model(model)
        assert list(handle.masks) == list(expected.masks())
        assert handle.sparsity == 0.5
    capruner.mask_model(wrapped, masks=found.masks())
    assert capruner.recalibrate_bn(wrapped, data()) == 1
    used, base = capruner.multiply_adds(wrapped, (6,)), capruner.multiply_adds(plain(), (6,))
    assert used.weights == base.weights
    assert used.per_weight(wrapped) == base.per_weight(plain())


@pytest.mark.parametrize("name", ["compile", "data parallel", "compiled data parallel"])
def test_names_of_the_wrapped_model_are_understood(name: str) -> None:
    wrapped = WRAPPERS[name](plain())
    own = [n for n, _ in wrapped.named_parameters()][-2]
    mask = torch.ones(3, 8)
    mask[0] = 0
    assert list(capruner.mask_model(wrapped, masks={own: mask}).masks) == ["2.weight"]
    result = capruner.prune(wrapped, None, method="magnitude", params=[own], masks={own: mask})
    assert not result.masks()["2.weight"][0].any()


def test_nothing_is_compiled() -> None:
    def fail(*args: object) -> None:
        raise AssertionError("compiled")

    model = torch.compile(plain(), backend=fail)
    inplace = plain()
    inplace.compile(backend=fail)
    started = time.monotonic()
    for compiled in (model, inplace):
        for gradients in ("batch", "sample"):
            capruner.prune(compiled, data(), num_grads=6, gradients=gradients, progress=False)  # type: ignore[arg-type]
        capruner.recalibrate_bn(compiled, data())  # type: ignore[arg-type]
    assert time.monotonic() - started < 60


def test_weights_that_are_sharded_are_refused() -> None:
    class FullyShardedLike(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = model

    for call in (capruner.mask_model, lambda m: capruner.prune(m, None, method="magnitude")):
        with pytest.raises(ValueError, match="FullyShardedLike are sharded over processes"):
            call(FullyShardedLike(plain()))


def tied() -> nn.Module:
    model = nn.Module()
    model.first, model.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model.second.weight = model.first.weight
    model.forward = lambda x: model.second(model.first(x).relu())  # type: ignore[method-assign]
    return model


def test_the_second_name_of_a_tied_weight() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, 0] = False
    batches = [(torch.randn(4, 4), torch.arange(4)) for _ in range(4)]
    model = tied()
    for result in (
        capruner.prune(model, None, method="magnitude", masks={"second.weight": mask}),
        capruner.prune(
            model, None, sparsity={0.5: ["second.weight"]}, method="magnitude", masks={"second.weight": mask}
        ),
        capruner.prune(model, batches, num_grads=4, masks={"second.weight": mask}, progress=False),
        capruner.prune(
            model,
            batches,
            num_grads=4,
            costs={"second.weight": 1.0},
            masks={"first.weight": mask, "second.weight": mask},
            progress=False,
        ),
        capruner.compensate_masks(
            model, batches, nn.functional.cross_entropy, {"second.weight": mask}, num_grads=4, progress=False
        ),
    ):
        assert list(result.masks()) == ["first.weight"]
        assert not result.masks()["first.weight"][:, 0].any()
    handle = capruner.mask_model(model, masks={"second.weight": mask})
    assert torch.equal(model.second.weight != 0, mask)
    assert list(handle.masks) == ["first.weight"]
    with pytest.raises(ValueError, match=r"two different values for first\.weight, which is tied"):
        capruner.mask_model(model, masks={"first.weight": ~mask, "second.weight": mask})


def test_names_and_owners() -> None:
    model = compiled_part(plain())
    assert list(first_names(model)) == [name for name, _ in plain().named_parameters()]
    assert owner(model, "0.0.weight") == (model[0]._orig_mod[0], "weight")  # type: ignore[index, union-attr]
    assert list(all_parameters(tied())) == ["first.weight", "second.weight"]
    assert by_first_name(tied(), {"second.weight": 1, "other": 2}, "x") == {"first.weight": 1, "other": 2}
    inner = plain()
    assert unwrap(AveragedModel(inner)) is not inner  # a copy
    assert unwrap(nn.DataParallel(inner)) is inner
    assert copy.deepcopy(model)[0] is not model[0]  # type: ignore[index]
