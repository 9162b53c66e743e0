"""The modifiers as SparseML itself drives them: ``from_yaml``, ``apply``, ``modify``, a short training."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
from sparseml.pytorch.optim import ScheduledModifierManager
from sparseml.pytorch.utils import GradSampler
from untouched import same, snapshot

import capruner
from capruner.config import recipe_knobs
from capruner.sparseml import CAPruningModifier, FastCAPruningModifier

STEPS = 3
WEIGHTS = 6 * 5 + 4 * 6 + 3 * 4
LAYERS = ["0.weight", "2.weight", "4.weight"]
BASE: dict[str, Any] = {
    "params": "__ALL_PRUNABLE__",
    "init_sparsity": 0.3,
    "final_sparsity": 0.6,
    "start_epoch": 0.0,
    "end_epoch": 2.0,
    "update_frequency": 1.0,
    "inter_func": "linear",
    "num_grads": 8,
    "damp": 1e-3,
    "fisher_block_size": 7,
}


def recipe(*modifiers: dict[str, Any] | str, kind: str = "CAPruningModifier") -> str:
    """A recipe with one modifier for each dict; what a dict does not say is from BASE."""
    lines = ["modifiers:"]
    for given in modifiers or ({},):
        lines.append(f"  - !{kind}")
        for key, value in (BASE | given).items():
            lines.append(f"      {key}: {yaml.safe_dump(value, default_flow_style=True).replace('...', '').strip()}")
    return "\n".join(lines) + "\n"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): p.detach() for n, p in model.named_parameters() if n.endswith("weight")}


def zeros(model: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in weights(model).values())


class Sampler(dict):
    """A grad_sampler that counts its draws and records what its builder was called with."""

    def __init__(self) -> None:
        super().__init__(data_loader_builder=self.build, loss_function=F.cross_entropy)
        self.drawn = self.built = 0
        self.arguments: list[Any] = []

    def build(self, kwargs: Any = None, **more: Any) -> Iterator[Any]:
        self.built += 1
        self.arguments.append(kwargs)
        generator = torch.Generator().manual_seed(self.built)
        while True:
            self.drawn += 1
            x = torch.randn(2, 5, generator=generator)
            yield [x], {}, torch.randint(3, (2,), generator=generator)


def plan(text: str) -> ScheduledModifierManager:
    return ScheduledModifierManager.from_yaml(text)


class Training:
    def __init__(self, text: str, model: nn.Module | None = None, **more: Any) -> None:
        self.model = net() if model is None else model
        self.sampler = Sampler()
        self.manager = plan(text)
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.optimizer = self.manager.modify(self.model, self.sgd, STEPS, grad_sampler=self.sampler, **more)
        self.generator = torch.Generator().manual_seed(7)

    def step(self) -> None:
        self.model.train()
        self.sgd.zero_grad()
        x = torch.randn(8, 5, generator=self.generator)
        F.cross_entropy(self.model(x), torch.randint(3, (8,), generator=self.generator)).backward()
        self.optimizer.step()

    def masks(self, index: int = 0) -> list[Tensor]:
        return [mask != 0 for mask in self.manager.iter_modifiers().__next__().module_masks.param_masks]


def applied(text: str, model: nn.Module | None = None, **more: Any) -> tuple[nn.Module, Sampler]:
    model, sampler = net() if model is None else model, Sampler()
    plan(text).apply(model, grad_sampler=sampler, **more)
    return model, sampler


# One shot


@pytest.mark.parametrize("kind", ["CAPruningModifier", "FastCAPruningModifier"])
@pytest.mark.parametrize("global_sparsity", [True, False])
def test_apply_prunes_exactly_and_like_the_core(kind: str, global_sparsity: bool) -> None:
    model, sampler = applied(recipe({"global_sparsity": global_sparsity}, kind=kind))
    if global_sparsity:
        assert zeros(model) == round(0.6 * WEIGHTS)
    else:
        assert all(int((w == 0).sum()) == round(0.6 * w.numel()) for w in weights(model).values())
    assert sampler.drawn == 8
    expected, data = net(), Sampler().build()
    capruner.prune(
        expected,
        [(args, target) for args, _, target in (next(data) for _ in range(8))],
        F.cross_entropy,
        0.6,
        method="cap" if kind == "CAPruningModifier" else "fast_cap",
        global_sparsity=global_sparsity,
        num_grads=8,
        damp=1e-3,
        fisher_block_size=7,
        progress=False,
    ).apply(expected, 0.6)
    for name, weight in weights(expected).items():
        assert torch.equal(weights(model)[name], weight)


def test_apply_leaves_mode_gradients_and_hooks_as_they_were() -> None:
    model = net().train()
    model[2].eval()
    model[0].weight.grad = torch.ones(6, 5)
    before = snapshot(model)
    applied(recipe(), model)
    after = snapshot(model)
    assert [same(b, a) for b, a in zip(before, after)] == [True, True, True, False, True, True, True]


def test_a_sparsity_for_each_layer() -> None:
    text = recipe(
        {"params": [], "final_sparsity": {0.5: ["0.weight"], 0.25: ["re:[24].weight"]}, "global_sparsity": False}
    )
    model, _ = applied(text)
    assert [int((w == 0).sum()) for w in weights(model).values()] == [15, 6, 3]


def test_layer_targets_and_one_global_target_exclude_each_other() -> None:
    text = recipe({"params": [], "final_sparsity": {0.5: ["0.weight"]}, "global_sparsity": True})
    with pytest.raises(ValueError, match="set global_sparsity: False"):
        plan(text)


@pytest.mark.parametrize(("target", "calibrations"), [(0.2, 0), (0.8, 1)])
def test_one_shot_on_a_model_whose_masks_another_manager_holds(target: float, calibrations: int) -> None:
    training = Training(recipe({"init_sparsity": 0.5}))
    training.step()
    held = {name: w != 0 for name, w in weights(training.model).items()}
    _, sampler = applied(recipe({"final_sparsity": target}), training.model)
    assert sampler.built == calibrations
    assert zeros(training.model) == round(max(0.5, target) * WEIGHTS)
    assert not any(((w != 0) & ~held[name]).any() for name, w in weights(training.model).items())


@pytest.mark.parametrize("steps", [1, 2])
def test_recomputations_draw_anew(steps: int) -> None:
    model, sampler = applied(recipe({"num_recomputations": steps}))
    assert (sampler.built, sampler.drawn) == (steps, 8 * steps)
    assert zeros(model) == round(0.6 * WEIGHTS)


@pytest.mark.parametrize("mask_type", ["block4", "2:4", 124])
def test_patterns(mask_type: str | int) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    text = recipe({"mask_type": mask_type, "final_sparsity": 0.5, "fisher_block_size": 8, "skip_unsupported": True})
    sampler = {
        "data_loader_builder": lambda kwargs: iter([([torch.randn(2, 8)], {}, torch.tensor([0, 1]))] * 8),
        "loss_function": F.cross_entropy,
    }
    plan(text).apply(model, grad_sampler=sampler)
    groups = (model[0].weight != 0).view(-1, 4).sum(dim=1)
    assert set(groups.tolist()) == ({0, 4} if mask_type == "block4" else {2})
    assert (model[1].weight != 0).all()


# Training


def test_every_update_is_exact_and_survivors_live() -> None:
    training = Training(recipe({"end_epoch": 2.0}))
    counts = []
    for _ in range(3 * STEPS):
        training.step()
        counts.append(zeros(training.model))
        for mask, weight in zip(training.masks(), weights(training.model).values()):
            assert torch.equal(weight != 0, mask)
            assert (weight != 0).any()
    expected = [round(s * WEIGHTS) for s in (0.3, 0.45, 0.6)]
    assert counts == [count for count in expected for _ in range(STEPS)]
    assert training.sampler.drawn == 3 * 8


@pytest.mark.parametrize("kind", ["CAPruningModifier", "FastCAPruningModifier"])
def test_the_update_step_still_trains(kind: str) -> None:
    text = recipe({"init_sparsity": 0.5}, kind=kind)
    training = Training(text)
    one_shot, _ = applied(recipe({"final_sparsity": 0.5}, kind=kind))
    training.step()
    # Weights after the first step: pruned as in one shot, and moved by that step's own gradient.
    moved = 0
    for name, weight in weights(training.model).items():
        alive = weight != 0
        assert torch.equal(alive, weights(one_shot)[name] != 0)
        moved += int((weight[alive] != weights(one_shot)[name][alive]).sum())
    assert moved == sum(int((w != 0).sum()) for w in weights(training.model).values())
    assert training.model.training


def test_gradients_of_the_update_step_are_masked_and_otherwise_kept() -> None:
    training = Training(recipe({"init_sparsity": 0.5}))
    model = training.model.train()
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    F.cross_entropy(model(x), y).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    training.manager.update(model, training.sgd, 0.0, STEPS)
    for n, p in model.named_parameters():
        if n in LAYERS:
            alive = p != 0
            assert torch.equal(p.grad[alive], before[n][alive])
        else:
            assert torch.equal(p.grad, before[n])


def test_masks_hold_in_forward_passes_and_are_gone_after_finalize() -> None:
    training = Training(recipe())
    training.step()
    with torch.no_grad():
        training.model[0].weight.add_(1)
    training.model(torch.randn(1, 5))
    assert torch.equal(training.model[0].weight != 0, training.masks()[0])
    training.manager.finalize(training.model)
    assert not any(m._forward_pre_hooks for m in training.model.modules())


def test_masks_are_dropped_at_the_end_where_the_recipe_says_so() -> None:
    training = Training(recipe({"leave_enabled": False}))
    for _ in range(2 * STEPS + 2):
        training.step()
    assert zeros(training.model) < round(0.6 * WEIGHTS)


def test_a_later_start() -> None:
    training = Training(recipe({"start_epoch": 1.0}))
    counts = []
    for _ in range(2 * STEPS + 1):
        training.step()
        counts.append(zeros(training.model))
    assert counts == [0] * STEPS + [round(0.3 * WEIGHTS)] * STEPS + [round(0.6 * WEIGHTS)]


def test_a_ladder_hands_over_masks_and_shares_the_epoch_between() -> None:
    text = recipe(
        {"init_sparsity": 0.2, "final_sparsity": 0.4, "end_epoch": 1.0},
        {"init_sparsity": 0.4, "final_sparsity": 0.8, "start_epoch": 1.0, "end_epoch": 2.0},
    )
    training = Training(text)
    counts, masks = [], []
    for _ in range(2 * STEPS + 1):
        training.step()
        counts.append(zeros(training.model))
        masks.append({name: w != 0 for name, w in weights(training.model).items()})
    expected = [round(s * WEIGHTS) for s in (0.2, 0.4, 0.8)]
    assert counts == [expected[0]] * STEPS + [expected[1]] * STEPS + [expected[2]]
    # At epoch 1 one calibration, not two.
    assert (training.sampler.built, training.sampler.drawn) == (3, 24)
    for earlier, later in itertools.pairwise(masks):
        assert not any((later[name] & ~earlier[name]).any() for name in later)


def test_a_target_below_what_is_pruned_keeps_the_masks() -> None:
    text = recipe(
        {"init_sparsity": 0.5, "final_sparsity": 0.5, "end_epoch": 1.0},
        {"init_sparsity": 0.3, "final_sparsity": 0.7, "start_epoch": 1.0, "end_epoch": 2.0},
    )
    training = Training(text)
    counts = []
    for _ in range(2 * STEPS + 1):
        training.step()
        counts.append(zeros(training.model))
    assert counts == [round(0.5 * WEIGHTS)] * 2 * STEPS + [round(0.7 * WEIGHTS)]


@pytest.mark.parametrize("global_sparsity", [True, False])
def test_from_param(global_sparsity: bool) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:3] = 0  # half of the first layer, 15 of 66 weights
    training = Training(recipe({"init_sparsity": "__FROM_PARAM__", "global_sparsity": global_sparsity}), model)
    training.step()
    after = [int((w == 0).sum()) for w in weights(model).values()]
    assert after[0] >= 15 if global_sparsity else after == [15, 0, 0]
    assert sum(after) == 15
    for _ in range(2 * STEPS):
        training.step()
    after = [int((w == 0).sum()) for w in weights(model).values()]
    assert sum(after) == round(0.6 * WEIGHTS) if global_sparsity else after == [18, 14, 7]


@pytest.mark.parametrize("s", [0.25, 0.35, 0.55, 0.75, 0.85, 0.95])
def test_counts_on_the_edge_of_rounding(s: float) -> None:
    # 10 layers of odd sizes: the mean of ten equal targets must be that target, to the last bit.
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)), nn.Linear(3, 3))
    sampler = {
        "data_loader_builder": lambda kwargs: iter([([torch.randn(2, 3)], {}, torch.tensor([0, 1]))] * 8),
        "loss_function": F.cross_entropy,
    }
    plan(recipe({"final_sparsity": s})).apply(model, grad_sampler=sampler)
    assert zeros(model) == round(s * 90)


def test_an_exception_during_an_update_leaves_the_model_as_it_was() -> None:
    training = Training(recipe({"num_recomputations": 2}))
    model = training.model.train()
    F.cross_entropy(model(torch.randn(8, 5)), torch.randint(3, (8,))).backward()
    before = snapshot(model)
    calls = 0

    def build() -> Iterator[Any]:
        nonlocal calls
        calls += 1
        for _ in range(8 if calls == 1 else 3):
            yield [torch.randn(2, 5)], {}, torch.randint(3, (2,))
        raise ValueError("the disk is gone")

    next(training.manager.iter_modifiers())._batches._builder = build
    with pytest.raises(ValueError, match="the disk is gone"):
        training.optimizer.step()
    assert same(before[:6], snapshot(model)[:6])  # not the last: SparseML's hooks hold masks of ones by now


# Distributed wrapper


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("allow_parallel_module", [True, False])
def test_a_distributed_wrapper_does_not_disturb_anchored_patterns(allow_parallel_module: bool) -> None:
    wrapped = nn.parallel.DistributedDataParallel(net())
    text = recipe({"params": ["re:^(0|2|4).weight$"]})
    training = Training(text, wrapped, allow_parallel_module=allow_parallel_module)
    plain = Training(text)
    for _ in range(2 * STEPS + 1):
        training.step()
        plain.step()
    assert zeros(wrapped) == round(0.6 * WEIGHTS)
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weights(wrapped)[name], weight)
    assert set(training.manager.state_dict().popitem()[1]) >= {f"{name}.sparsity_mask" for name in LAYERS}


# The grad_sampler


@pytest.mark.parametrize(
    "sampler",
    [None, {}, {"data_loader_builder": Sampler().build}, {"loss_function": F.cross_entropy}],
)
def test_no_grad_sampler(sampler: Any) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"pass grad_sampler=\{'data_loader_builder': f, 'loss_function': g\}"):
        plan(recipe()).apply(model, grad_sampler=sampler)
    with pytest.raises(RuntimeError, match="needs gradients"):
        plan(recipe()).modify(model, torch.optim.SGD(model.parameters(), lr=0.1), STEPS, grad_sampler=sampler)
    assert same(before[:6], snapshot(model)[:6])


def test_the_spelling_of_the_published_release() -> None:
    sampler = Sampler()
    sampler["loss_fn"] = sampler.pop("loss_function")
    model = net()
    plan(recipe()).apply(model, grad_sampler=sampler)
    assert zeros(model) == round(0.6 * WEIGHTS)


@pytest.mark.parametrize("given", [None, {"size": 4, "name": "x"}])
def test_the_builder_is_called_positionally_with_the_recipe_s_arguments(given: dict[str, Any] | None) -> None:
    _, sampler = applied(recipe({"grad_sampler_kwargs": given}))
    assert sampler.arguments == [given or {}]


def batch() -> Any:
    return [torch.randn(2, 5)], {}, torch.tensor([0, 1])


@pytest.mark.parametrize(
    "builder",
    [
        lambda kwargs: iter([batch() for _ in range(8)]),
        lambda kwargs: [batch() for _ in range(8)],
        lambda kwargs: lambda: iter([batch() for _ in range(8)]),
        lambda kwargs: iter([((x[0],), k, t) for x, k, t in (batch() for _ in range(8))]),
        lambda kwargs: iter([([], {"input": x[0]}, t) for x, _, t in (batch() for _ in range(8))]),
    ],
    ids=["iterator", "list", "callable", "tuple of inputs", "keywords"],
)
def test_builders_of_several_kinds(builder: Callable[..., Any]) -> None:
    model = net()
    plan(recipe()).apply(model, grad_sampler={"data_loader_builder": builder, "loss_function": F.cross_entropy})
    assert zeros(model) == round(0.6 * WEIGHTS)


def same_data() -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield [torch.randn(2, 5, generator=generator)], {}, torch.randint(3, (2,), generator=generator)


def some(count: int = 8) -> list[Any]:
    return [item for item, _ in zip(same_data(), range(count))]


@pytest.mark.parametrize(
    "sampler",
    [
        GradSampler(some(), F.cross_entropy),
        GradSampler(same_data, F.cross_entropy),
        some(),
        [(x[0], y) for x, _, y in some()],
        [{"input": x[0], "labels": y} for x, _, y in some()],
        lambda kwargs: same_data(),
        lambda **kwargs: [(x[0], y) for x, _, y in some()],
        lambda: some(),
        {"data_loader_builder": some(), "loss_function": F.cross_entropy},
        {"data_loader_builder": lambda **kwargs: some(), "loss_function": F.cross_entropy},
        {"data_loader_builder": lambda kwargs: [(x[0], y) for x, _, y in some()], "loss_function": F.cross_entropy},
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_form_of_a_grad_sampler(sampler: Any) -> None:
    class Keywords(nn.Sequential):
        def forward(self, input: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
            out = super().forward(input)
            return out if labels is None else {"logits": out, "loss": F.cross_entropy(out, labels)}

    expected, model = (Keywords(*net().children()) for _ in range(2))
    plan(recipe()).apply(expected, grad_sampler=Sampler())
    plan(recipe()).apply(model, grad_sampler=sampler)
    assert same(list(weights(model).values()), list(weights(expected).values()))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (3, r"this modifier needs gradients: pass grad_sampler=.* \(got int\)"),
        ("loader", r"this modifier needs gradients: pass grad_sampler=.* \(got str\)"),
        ({"data_loader_builder": 3, "loss_function": F.cross_entropy}, r"needs gradients: .* \(got int\)"),
        ({"data_loader_builder": some, "loss_function": "mse"}, "loss function is str, not a function"),
        (lambda kwargs: 3, "builder returned int, not an iterable"),
        (
            [(torch.zeros(2, 5), torch.zeros(2), torch.zeros(2))],
            r"the grad_sampler gave a tuple of 3 \(float32 \(2, 5\)",
        ),
        ([4], "batch 0 is int"),
    ],
)
def test_a_grad_sampler_that_is_none(sampler: Any, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        plan(recipe()).apply(net(), grad_sampler=sampler)


class TwoOutputs(nn.Sequential):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out.softmax(dim=1)


def test_of_a_tuple_of_outputs_the_first_counts() -> None:
    model, _ = applied(recipe(), TwoOutputs(*net()))
    plain, _ = applied(recipe())
    assert torch.equal(model[0].weight, plain[0].weight)


# Recipes


EVERY: dict[str, dict[str, Any]] = {
    "CAPruningModifier": {
        "params": ["re:[02].weight", "4"],
        "init_sparsity": 0.25,
        "final_sparsity": 0.75,
        "start_epoch": 1.0,
        "end_epoch": 9.0,
        "update_frequency": 0.5,
        "leave_enabled": False,
        "inter_func": "linear",
        "global_sparsity": False,
        "mask_type": "block4",
        "num_grads": 17,
        "damp": 3e-7,
        "shrinkage": 0.25,
        "fisher_block_size": 48,
        "grad_sampler_kwargs": {"size": 4, "name": "x"},
        "num_recomputations": 3,
        "recomputation_inter_func": "cubic",
        "distill_passes": 0.5,
        "blocks_in_parallel": 5,
        "fisher_inv_device": "cpu",
        "traces_backup_dir": "traces",
        "gradients": "sample",
        "labels": "model",
        "score": "cumulative",
        "relative_damp": True,
        "skip_unsupported": True,
        "memory_budget": "8GiB",
        "on_bad_batch": "skip",
        "exclude": ["4"],
        "solver": "accumulate",
        "mode": "as_is",
    }
}
EVERY["FastCAPruningModifier"] = {
    key: value
    for key, value in EVERY["CAPruningModifier"].items()
    if key not in ("blocks_in_parallel", "shrinkage", "score", "relative_damp", "memory_budget", "solver")
} | {"global_sparsity": True, "block_size": 12}
CLASSES = {"CAPruningModifier": CAPruningModifier, "FastCAPruningModifier": FastCAPruningModifier}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_is_tested_here_and_none_is_at_its_default(kind: str) -> None:
    defaults = {
        name: p.default
        for name, p in inspect.signature(CLASSES[kind].__init__).parameters.items()
        if name != "self" and p.kind is not p.VAR_KEYWORD
    } | {name: knob.default for name, knob in recipe_knobs(CLASSES[kind].method).items()}
    assert set(defaults) - {"n", "m"} == set(EVERY[kind])
    assert all(defaults[name] != value for name, value in EVERY[kind].items())


@pytest.mark.parametrize("kind", CLASSES)
def test_every_parameter_survives_saving_and_loading(kind: str, tmp_path: Path) -> None:
    first = plan(recipe(EVERY[kind], kind=kind))
    first.save(str(tmp_path / "saved.yaml"))
    second = plan(str(tmp_path / "saved.yaml"))
    third = plan(str(second))
    for manager in (first, second, third):
        modifier = next(manager.iter_modifiers())
        assert type(modifier) is CLASSES[kind]
        got = {name: getattr(modifier, name) for name in EVERY[kind]}
        assert {n: str(v) if n == "mask_type" else v for n, v in got.items()} == EVERY[kind]
    assert next(first.iter_modifiers()).identifier() == next(third.iter_modifiers()).identifier()


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_survive_saving_and_loading(kind: str) -> None:
    needed = {"params": "__ALL__", "init_sparsity": 0.1, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 1}
    direct = CLASSES[kind](**needed, update_frequency=1)
    manager = plan("modifiers:\n" + "\n".join("  " + line for line in str(direct).splitlines()))
    loaded = next(manager.iter_modifiers())
    for name in EVERY[kind]:
        assert getattr(loaded, name) == getattr(direct, name)


@pytest.mark.parametrize("mask_type", ["2:4", "1:4", "4:8", 124, "N:M"])
def test_mask_types_survive_saving_and_loading(mask_type: Any) -> None:
    given = {"mask_type": mask_type, "fisher_block_size": 8, "init_sparsity": 0.5, "final_sparsity": 0.5}
    first = plan(recipe(given | ({"n": 2, "m": 4} if mask_type == "N:M" else {})))
    second = plan(str(first))
    pattern = capruner.core.patterns.parse_mask_type(next(first.iter_modifiers()).mask_type)
    assert capruner.core.patterns.parse_mask_type(next(second.iter_modifiers()).mask_type) == pattern
    assert str(pattern) == {124: "2:4", "N:M": "2:4"}.get(mask_type, mask_type)


def test_layer_targets_survive_saving_and_loading() -> None:
    given = {"params": [], "final_sparsity": {0.5: ["0.weight"], 0.25: ["re:[24].weight"]}, "global_sparsity": False}
    again = plan(str(plan(recipe(given))))
    assert next(again.iter_modifiers()).final_sparsity == given["final_sparsity"]


@pytest.mark.parametrize("words", ["1e-7", "'1e-7'", "0.0000001", "1.0e-7"])
def test_damping_as_yaml_writes_it(words: str) -> None:
    manager = plan(recipe().replace("damp: 0.001", f"damp: {words}"))
    assert next(manager.iter_modifiers()).damp == 1e-7


@pytest.mark.parametrize("words", ["None", "null", "~", "''"])
def test_a_backup_directory_that_is_none(words: str) -> None:
    manager = plan(recipe({"traces_backup_dir": "DIR"}).replace("DIR", words))
    assert next(manager.iter_modifiers()).traces_backup_dir in (None, "")


@pytest.mark.promise("Resume", "A state is deleted only after its result is safe")
def test_a_backup_directory_holds_the_state_until_the_model_has_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = tmp_path / "traces", []
    monkeypatch.setattr(
        capruner.PruningResult, "apply", lambda self, model, s=None: found.append(sorted(folder.glob("*/step-*")))
    )
    applied(recipe({"traces_backup_dir": str(folder)}))
    assert [len(files) for files in found] == [1]
    assert not folder.exists()


def test_with_and_without_a_backup_directory_the_same_bits(tmp_path: Path) -> None:
    plain, _ = applied(recipe())
    saved, _ = applied(recipe({"traces_backup_dir": str(tmp_path / "traces")}))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), saved.parameters()))


@pytest.mark.parametrize(
    ("given", "attribute", "value"),
    [
        ({"init_sparsity": 0, "final_sparsity": 0}, "final_sparsity", 0.0),
        ({"start_epoch": 0, "end_epoch": 2, "update_frequency": 1}, "end_epoch", 2),
        ({"num_grads": 8.0}, "num_grads", 8),
        ({"blocks_in_parallel": -1}, "blocks_in_parallel", None),
        ({"fisher_inv_device": "None"}, "fisher_inv_device", None),
    ],
)
def test_numbers_as_people_write_them(given: dict[str, Any], attribute: str, value: Any) -> None:
    text = recipe(given)
    manager = plan(text)
    assert getattr(next(manager.iter_modifiers()), attribute) == value
    applied(text)
    Training(text).step()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_grads": 8.5}, "num_grads 8.5 is invalid"),
        ({"num_grads": 0}, "num_grads must be"),
        ({"damp": "tiny"}, "damp 'tiny' is invalid"),
        ({"fisher_block_size": 0}, "fisher_block_size must be a positive integer, got 0"),
        ({"relative_damp": "yes please"}, "relative_damp 'yes please' is invalid"),
        ({"mask_type": "3by4"}, "mask_type must be .*'3by4'"),
        ({"gradients": "token"}, "gradients must be one of .*'token'"),
        ({"score": "mean"}, "score must be one of .*'mean'"),
        ({"recomputation_inter_func": "square"}, "recomputation_inter_func must be one of .*'square'"),
        ({"distill_passes": -1}, "distill_passes must be a number, at least 0, got -1"),
        ({"distill_passes": "many"}, "distill_passes 'many' is invalid"),
        ({"final_sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1"),
        ({"final_sparsity": 1}, r"sparsity must lie in \[0, 1\), got 1"),
        ({"params": ["0.wieght"]}, r"'0\.wieght'; the nearest names are 0\.weight"),
        ({"params": ["re:(0|9).weight"]}, "the alternative '9'"),
    ],
)
def test_bad_recipes_say_what_and_leave_the_model_alone(given: dict[str, Any], message: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        plan(recipe(given)).apply(model, grad_sampler=Sampler())
    assert same(before[:6], snapshot(model)[:6])


def test_excluded_layers_stay_dense() -> None:
    model, _ = applied(recipe({"exclude": ["0"]}))
    assert (model[0].weight != 0).all()
    assert (model[2].weight == 0).any()


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(Exception, match="fisher_blocksize"):
        plan(recipe({"fisher_blocksize": 7}))


# The list of sparsities


def test_one_shot_serves_a_list_with_the_recipe_s_parameters() -> None:
    manager = plan(recipe({"score": "cumulative", "grad_sampler_kwargs": {"size": 4}}))
    modifier, model, sampler = next(manager.iter_modifiers()), net(), Sampler()
    before = snapshot(model)
    result = modifier.one_shot(model, [0.5, 0.25, 0.9], sampler)
    assert same(before, snapshot(model))
    assert (sampler.built, sampler.drawn, sampler.arguments) == (1, 8, [{"size": 4}])
    assert result.sparsities == [0.25, 0.5, 0.9]
    assert result.settings["score"] == "cumulative"
    assert (result.settings["num_grads"], result.settings["fisher_block_size"], result.settings["damp"]) == (8, 7, 1e-3)
    result.apply(model, 0.9)
    assert zeros(model) == round(0.9 * WEIGHTS)
    assert not modifier.initialized
    plan(recipe({"score": "cumulative"})).apply(other := net(), grad_sampler=Sampler())
    assert torch.equal(modifier.one_shot(net(), [], Sampler()).level(0.6).weights["0.weight"], other[0].weight)


# What importing does


@pytest.mark.slow
def test_importing_is_quiet(tmp_path: Path) -> None:
    code = "import os, capruner.sparseml; print(os.environ['NM_DISABLE_ANALYTICS'])"
    environment = {k: v for k, v in os.environ.items() if k != "NM_DISABLE_ANALYTICS"}
    run = subprocess.run(
        [sys.executable, "-W", "error::Warning:capruner", "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (run.stdout.strip(), run.stderr.strip()) == ("1", "")
    assert list(tmp_path.iterdir()) == []
