"""Recipes carried out in a training loop; and, where SparseML is installed, the same masks and weights as through it."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner import recipes
from capruner.cli.arguments import UserError
from capruner.recipes import catalog, rates
from capruner.recipes.run import RecipeRun
from capruner.vision.training_recipe import open_training

SHIPPED = [path for name, path in catalog.shipped().items() if not name.startswith("one_shot/")]
STEPS, PRUNABLE = 4, 8 * 12 + 12 * 4
RANGE = "  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 4.0}\n"


def cap(name: str = "CAPruningModifier", **changes: Any) -> str:
    values = {
        "init_sparsity": 0.5,
        "final_sparsity": 0.8,
        "start_epoch": 0.0,
        "end_epoch": 2.0,
        "update_frequency": 1.0,
    }
    values |= {"params": "__ALL_PRUNABLE__"}
    if "Magnitude" not in name:
        values |= {"num_grads": 6, "fisher_block_size": 12, "damp": 1e-4}
    values |= changes
    lines = "".join(f"      {key}: {value}\n" for key, value in values.items() if value is not None)
    return f"  - !{name}\n{lines}"


def written(folder: Path, *modifiers: str) -> Path:
    (folder / "recipe.yaml").write_text("modifiers:\n" + "".join(modifiers))
    return folder / "recipe.yaml"


class Batches:
    """The same images and labels each time, as pairs or as SparseML wants them."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (images,), _, labels in self({}):
            yield images, labels

    def __call__(self, kwargs: Any = None) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield [torch.randn(4, 8, generator=generator)], {}, torch.randint(4, (4,), generator=generator)


def pairs(kwargs: Any) -> Batches:
    assert isinstance(kwargs, dict)
    return Batches()


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight.mul_(3)  # layers of unlike sizes: global and uniform differ
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(6, 8, generator=generator), torch.randint(4, (6,), generator=generator)


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x, y = data(step)
    F.cross_entropy(model(x), y).backward()


def train(
    path: Path, epochs: int, look: Callable[[RecipeRun, int], object] = lambda run, step: None
) -> tuple[nn.Module, RecipeRun]:
    model = network()
    optimizer = adamw(model)
    recipe = recipes.load_training(path)
    run = recipe.start(model, optimizer, STEPS, pairs, F.cross_entropy)
    for step in range(epochs * STEPS):
        backward(model, step)
        run.update()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        look(run, step)
    run.finish()
    return model, run


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_updates_come_when_due_and_masks_hold(tmp_path: Path) -> None:
    counts: list[int] = []
    _, run = train(written(tmp_path, cap(), RANGE), 3, lambda run, step: counts.append(zeros(run.model)))
    half, most = round(0.5 * PRUNABLE), round(0.8 * PRUNABLE)
    middle = round((0.5 + 0.3 * (1 - 0.5**3)) * PRUNABLE)
    assert counts == STEPS * [half] + STEPS * [middle] + STEPS * [most]
    assert run.history == [(0, half / PRUNABLE), (STEPS, middle / PRUNABLE), (2 * STEPS, most / PRUNABLE)]
    assert run.sparsity == most / PRUNABLE
    assert run.recipe.epochs == 4
    assert not run.recipe.sets_learning_rate


def test_an_update_that_ends_with_the_training(tmp_path: Path) -> None:
    model, run = train(written(tmp_path, cap()), 2)
    assert zeros(model) == round(0.8 * PRUNABLE)
    assert [step for step, _ in run.history] == [0, STEPS, 2 * STEPS]


def test_chained_modifiers_hand_over(tmp_path: Path) -> None:
    first = cap(init_sparsity=0.4, final_sparsity=0.6, end_epoch=1.0)
    second = cap("MagnitudePruningModifier", init_sparsity=0.6, final_sparsity=0.8, start_epoch=1.0, end_epoch=2.0)
    model, run = train(written(tmp_path, second, first), 3)
    each = [round(0.8 * 96), round(0.8 * 48)]
    assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [max(each[0], 0), each[1]] or zeros(model) >= sum(
        each
    )
    assert [step for step, _ in run.history] == [0, STEPS, STEPS, 2 * STEPS]


def test_resuming_is_bit_identical(tmp_path: Path) -> None:
    rate = "  - !LearningRateFunctionModifier {lr_func: cosine, init_lr: 0.01, final_lr: 0.0, start_epoch: 0, end_epoch: 4}\n"
    path = written(tmp_path, cap(init_sparsity="__FROM_PARAM__", end_epoch=3.0), RANGE, rate)
    saved: dict[int, Any] = {}

    def save(run: RecipeRun, step: int) -> None:
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "run": run.state_dict()}
        saved[step + 1] = copy.deepcopy(state)

    expected, _ = train(path, 4, save)
    for start in (STEPS - 1, STEPS, 2 * STEPS + 2):
        torch.save(saved[start], tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        model = network()
        optimizer = adamw(model)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        run = recipes.load_training(path).start(model, optimizer, STEPS, pairs, F.cross_entropy)
        run.load_state_dict(state["run"])
        assert zeros(model) == sum(int((~mask).sum()) for mask in run.masks.values())
        for step in range(start, 4 * STEPS):
            backward(model, step)
            run.update()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        run.finish()
        assert same(model, expected)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    _, run = train(written(tmp_path, cap()), 1)
    state = run.state_dict()
    other = recipes.load_training(written(tmp_path, cap(damp=1e-3)))
    model = network()
    with pytest.raises(ValueError, match="saved with another recipe"):
        other.start(model, adamw(model), STEPS, pairs).load_state_dict(state)
    with pytest.raises(ValueError, match="4 steps in an epoch, here are 5"):
        run.recipe.start(model, adamw(model), 5, pairs).load_state_dict(state)
    smaller = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 4))
    with pytest.raises(ValueError, match=r"other parameters: 1\.weight, 2\.weight"):
        run.recipe.start(smaller, adamw(smaller), STEPS, pairs).load_state_dict(state)
    with pytest.raises(ValueError, match="not a state of a recipe"):
        run.load_state_dict({})
    with pytest.raises(ValueError, match="newer capruner"):
        run.load_state_dict(state | {"version": 9})


def test_masks_that_are_let_go(tmp_path: Path) -> None:
    """The sparsity is that of the weights, also after the masks were let go."""
    path = written(tmp_path, cap("MagnitudePruningModifier", leave_enabled=False, end_epoch=1.0), RANGE)
    most = [round(0.8 * 96), round(0.8 * 48)]
    model, run = train(path, 1)
    assert run.sparsity == sum(most) / PRUNABLE
    model, run = train(path, 2)
    assert zeros(model) < sum(most)
    assert run.sparsity == zeros(model) / PRUNABLE


def test_constant_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = network

    def sparse() -> nn.Module:
        model = original()
        with torch.no_grad():
            model[0].weight[:, ::2] = 0
        return model

    monkeypatch.setitem(globals(), "network", sparse)
    constant = "  - !ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 0.0, end_epoch: 2.0}\n"
    counts: list[int] = []
    _, run = train(written(tmp_path, constant), 2, lambda run, step: counts.append(zeros(run.model)))
    assert set(counts) == {48}
    assert run.sparsity == 48 / PRUNABLE
    model, _ = train(written(tmp_path, constant, RANGE), 3)
    assert zeros(model) == 0


def test_a_target_for_each_layer(tmp_path: Path) -> None:
    final = "{0.25: [0.weight], 0.75: [2.weight]}"
    for name, globally in (("CAPruningModifier", False), ("MagnitudePruningModifier", None)):
        modifier = cap(name, params="[]", final_sparsity=final, init_sparsity=0.1, global_sparsity=globally)
        model, _ = train(written(tmp_path, modifier), 2)
        assert [int((model[i].weight == 0).sum()) for i in (0, 2)] == [24, 36]


def test_hyperparameters_and_frozen_parameters(tmp_path: Path) -> None:
    more = (
        "  - !SetLearningRateModifier {learning_rate: 0.5, start_epoch: 1.0, constant_logging: true}\n"
        "  - !SetWeightDecayModifier {weight_decay: 0.0, start_epoch: 2.0, param_groups: [0]}\n"
        "  - !TrainableParamsModifier {params: ['re:.*bias$'], trainable: false, start_epoch: 1.0, end_epoch: 2.0}\n"
        "  - !TrainableParamsModifier {params: [no.such], trainable: false, params_strict: false}\n"
    )
    seen: list[tuple[float, float, bool]] = []

    def look(run: RecipeRun, step: int) -> None:
        group = run.optimizer.param_groups[0]
        seen.append((group["lr"], group["weight_decay"], run.model[0].bias.requires_grad))

    _, run = train(written(tmp_path, cap(), RANGE, more), 3, look)
    assert seen == STEPS * [(0.01, 0.1, True)] + STEPS * [(0.5, 0.1, False)] + STEPS * [(0.5, 0.0, True)]
    assert run.recipe.sets_learning_rate
    with pytest.raises(ValueError, match="the optimizer has 1 parameter groups, there is no 3"):
        train(written(tmp_path, cap(), more.replace("[0]", "[3]")), 3)


def test_learning_rates() -> None:
    assert [rates.linear(1.0, 0.0, epoch, 4) for epoch in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [rates.cosine(1.0, 0.5, epoch, 2) for epoch in range(3)] == pytest.approx([1, 0.75, 0.5])
    assert [rates.cosine(0.0, 1.0, epoch, 2) for epoch in range(3)] == pytest.approx([0, 0.5, 1])
    cyclic = [rates.cyclic_linear(1.0, 0.0, step / 3, 3, 1, 3) for step in range(9)]
    assert cyclic == pytest.approx([1, 0.5, 0] * 3)
    rest = [rates.cyclic_linear(1.0, 0.0, step / 4, 1.5, 1, 4) for step in range(6)]
    assert rest[:4] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert all(0 <= rate <= 1 for rate in rest)
    for cycle in (0.1, 0.3, 0.7):  # rounding must not let a cycle run past its end
        assert all(-1e-9 <= rates.cyclic_linear(1.0, 0.0, s / 10, 7, cycle, 10) <= 1 + 1e-9 for s in range(70))


@pytest.mark.parametrize("name", rates.NAMES)
def test_the_rate_stays_after_its_end(name: str, tmp_path: Path) -> None:
    text = f"  - !LearningRateFunctionModifier {{lr_func: {name}, init_lr: 0.1, final_lr: 0.01, start_epoch: 0, end_epoch: 1.1}}\n"
    seen: list[float] = []
    magnitude = cap("MagnitudePruningModifier")
    train(
        written(tmp_path, magnitude, RANGE, text),
        3,
        lambda run, step: seen.append(run.optimizer.param_groups[0]["lr"]),
    )
    assert seen[0] == 0.1
    assert seen[5:] == pytest.approx([0.01] * 7)


def test_a_ladder_of_sparsities(tmp_path: Path) -> None:
    recipe = recipes.load_training(written(tmp_path, cap()))
    recipe.climb([0.3, 0.6])
    model = network()
    run = recipe.start(model, adamw(model), 1, pairs, F.cross_entropy)
    for step in range(3):
        backward(model, step)
        run.update()
        run.optimizer.step()
    assert [s for _, s in run.history] == pytest.approx([0.3, 0.6, 0.6], abs=1 / PRUNABLE)
    with pytest.raises(UserError, match=r"has 4 steps, but .* updates 3 times"):
        recipe.climb([0.1, 0.2, 0.3, 0.4])


STEP = "  - !LearningRateFunctionModifier {lr_func: step, init_lr: 1, final_lr: 0, start_epoch: 0, end_epoch: 1}\n"
BAD = {
    "distillation": ("  - !DistillationModifier {hardness: 0.5}\n", "DistillationModifier has no effect here"),
    "quantization": ("  - !QuantizationModifier {start_epoch: 0}\n", "quantize the exported model"),
    "another rate": ("  - !LearningRateModifier {lr_class: StepLR}\n", "is not carried out here; use LearningRateFunctionModifier"),
    "another pruner": (cap("MFACPruningModifier"), r"MFACPruningModifier is none of .*--engine sparseml"),
    "something": ("  - !SetParamModifier {params: [x]}\n", "SetParamModifier is not carried out here; there are EpochRange"),
    "no start": (cap(start_epoch=None), "CAPruningModifier has no start_epoch"),
    "backwards": (cap(start_epoch=3.0), "CAPruningModifier: end_epoch must not be before start_epoch, got 2 and 3"),
    "each step": (cap(update_frequency=-1), "update_frequency -1 makes an update, with a calibration, at every step"),
    "never": (cap(end_epoch=".inf"), "end_epoch inf is invalid: expected a finite number"),
    "too many": (cap(update_frequency=1e-5), "more than 10,000 updates"),
    "unknown": ("  - !EpochRangeModifier {start_epoch: 0, end_epoch: 1, colour: 3}\n", "no parameter colour; it has start_epoch, .*capruner recipes convert"),
    "missing": ("  - !LearningRateFunctionModifier {lr_func: linear}\n", "has no init_lr and no final_lr"),
    "function": (STEP, "lr_func 'step' is invalid: must be one of linear, cosine, cyclic_linear"),
    "rate": ("  - !SetLearningRateModifier {learning_rate: -1}\n", "learning_rate -1 is invalid: expected a finite number, at least 0"),
    "nothing": (RANGE, "has no pruning modifier"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_by_name(case: str, tmp_path: Path) -> None:
    text, message = BAD[case]
    with pytest.raises(UserError, match=message):
        recipes.load_training(written(tmp_path, text if case in ("nothing",) else cap() + text))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-3:]))
def test_every_shipped_recipe_is_read(path: Path) -> None:
    recipe = recipes.load_training(path)
    said = re.search(r"(\d+)ep", path.stem)
    assert said
    assert recipe.epochs == int(said[1])
    assert recipe.sets_learning_rate


# Beside SparseML


def tiny(path: Path, folder: Path) -> tuple[Path, int]:
    """A shipped recipe for the tiny model, with few gradients, and a tenth or a twentieth as long."""
    text = re.sub(r"params:( &\w+)?\n(?: +- .*\n)+", "params: __ALL_PRUNABLE__\n", path.read_text())
    text = re.sub(r"params: \*\w+", "params: __ALL_PRUNABLE__", text)
    for key, value in (("num_grads", 6), ("fisher_block_size", 12), ("damp", "1.0e-3")):
        text = re.sub(rf"{key}: .*", f"{key}: {value}", text)
    if "final_sparsity: 0.98" in text:  # of 144 weights: a layer without any would have no gradient
        text = text.replace("0.98", "0.8").replace("init_sparsity: 0.75", "init_sparsity: 0.5")
    longest = recipes.load_training(path).epochs
    factor = {300: 20, 100: 20, 50: 10, 20: 10, 10: 2, 4: 1}[longest]

    def shorter(match: re.Match[str]) -> str:
        return f"{match[1]}: {float(match[2]) / factor}"

    text = re.sub(r"(start_epoch|end_epoch|update_frequency|cycle_epochs): (\S+)", shorter, text)
    (folder / "tiny.yaml").write_text(text)
    return folder / "tiny.yaml", longest // factor


def by_sparseml(path: Path, epochs: int) -> nn.Module:
    """The same loop around SparseML's manager."""
    from sparseml.pytorch.optim import ScheduledModifierManager
    from sparseml.pytorch.utils import LoggerManager

    import capruner.sparseml  # noqa: F401

    manager = ScheduledModifierManager.from_yaml(f"\n{path.read_text()}\n")
    model = network()
    optimizer = adamw(model)
    sampler = {"data_loader_builder": Batches(), "loss_function": F.cross_entropy}
    manager.modify(model, optimizer, STEPS, epoch=0.0, loggers=LoggerManager([]), grad_sampler=sampler)
    for step in range(epochs * STEPS):
        backward(model, step)
        kept = [p.grad for p in model.parameters()]
        manager.update(model, optimizer, step / STEPS, STEPS)
        for p, gradient in zip(model.parameters(), kept):
            p.grad = gradient
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        manager.optimizer_post_step(model, optimizer, step / STEPS, STEPS)
    for modifier in manager.iter_modifiers():
        if modifier.end_pending(epochs, STEPS):
            modifier.scheduled_update(model, optimizer, float(epochs), STEPS)
    return model


@pytest.mark.parametrize("cycle", [2, 4])
def test_both_engines_accept_one_cycle_and_refuse_several(cycle: int, tmp_path: Path) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    values = {
        "lr_func": "cosine",
        "init_lr": 0.1,
        "final_lr": 0.01,
        "start_epoch": 0.0,
        "end_epoch": 4.0,
        "cycle_epochs": cycle,
    }
    rate = "  - !LearningRateFunctionModifier\n" + "".join(f"      {key}: {value}\n" for key, value in values.items())
    path = written(tmp_path, rate, cap())
    for engine in ("native", "sparseml"):
        if cycle == 4:
            assert open_training(str(path), engine, tmp_path, None).end == 4
            continue
        with pytest.raises(UserError, match="cycle_epochs 2 has no effect with lr_func cosine"):
            open_training(str(path), engine, tmp_path, None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-3:]))
def test_the_same_weights_as_through_sparseml(path: Path, tmp_path: Path) -> None:
    """Of SparseML's own OBS only the number of zeros is the same."""
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    short, epochs = tiny(path, tmp_path)
    expected = by_sparseml(short, epochs)
    found, run = train(short, epochs)
    assert zeros(found) == zeros(expected) > 0.45 * PRUNABLE
    assert math.isclose(run.sparsity, zeros(found) / PRUNABLE)
    if path.parent.name != "obs":
        assert same(found, expected)
