"""Recipes in the script's hands: staged ones, one target per layer, models that are sparse or broken already, and SparseML's other modifiers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from capruner.cli.arguments import UserError
from capruner.sparseml import recipe
from capruner.sparseml.recipe import finite_cross_entropy

SCHEDULE = "init_sparsity: 0.5\n      start_epoch: 0.0\n      end_epoch: 1.0\n      update_frequency: 1.0"
WEIGHTS = 8 * 12 + 12 * 4


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))


def modifier_text(name: str, *lines: str) -> str:
    return f"  - !{name}\n" + "".join(f"      {line}\n" for line in (*SCHEDULE.split("\n      "), *lines))


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text)
        return str(tmp_path / "recipe.yaml")

    return write


def sampler(loss: Any = finite_cross_entropy) -> dict[str, Any]:
    def batches(kwargs: Any = None, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield [torch.randn(4, 8, generator=generator)], {}, torch.randint(4, (4,), generator=generator)

    return {"data_loader_builder": batches, "loss_function": loss}


def found(path: str) -> tuple[Any, Any]:
    manager = recipe.load_manager(path)
    return manager, recipe.pruning_modifier(manager, path)


OTHERS = {
    "OBSPruningModifier": ("num_grads: 8", "damp: 1e-4", "fisher_block_size: 12"),
    "MFACPruningModifier": ("num_grads: 8", "fisher_block_size: 12", "global_sparsity: True"),
    "GlobalMagnitudePruningModifier": (),
    "MagnitudePruningModifier": (),
}


@pytest.mark.parametrize("name", OTHERS)
def test_sparseml_s_own_modifiers_reach_the_sparsity_of_the_list_and_not_the_recipe_s(
    name, model, written, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = written(
        "modifiers:\n" + modifier_text(name, "final_sparsity: 0.5", "params: __ALL_PRUNABLE__", *OTHERS[name])
    )
    names = set(model.state_dict())
    for sparsity in (0.25, 0.75):
        pruned = copy.deepcopy(model)
        recipe.apply_at(path, pruned, sparsity, sampler())
        zeros = [int((p == 0).sum()) for p in pruned.parameters() if p.dim() == 2]
        assert sum(zeros) == sparsity * WEIGHTS
        assert set(pruned.state_dict()) == names  # no buffer of SparseML's
        assert not any(layer._forward_pre_hooks for layer in pruned.modules())
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]  # no sparse_logs


def test_the_pruning_modifier_of_a_staged_recipe(written, model):
    one = modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__").replace("\n", "\n  ")
    other = "      - !EpochRangeModifier\n          start_epoch: 0.0\n          end_epoch: 2.0\n"
    text = f"first_stage:\n  warm_modifiers:\n{other}second_stage:\n  pruning_modifiers:\n  {one}"
    _manager, modifier = found(written(text.rstrip(" ") + "\n"))
    assert type(modifier).__name__ == "CAPruningModifier"
    assert recipe.selected_names(modifier, model) == ["0.weight", "2.weight"]


def test_two_pruning_modifiers(written):
    one = modifier_text("GlobalMagnitudePruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    with pytest.raises(UserError, match=r"exactly one pruning modifier, this one has GlobalMag.*, GlobalMag"):
        found(written("modifiers:\n" + one + one.replace("0.5", "0.6")))


def test_one_sparsity_per_layer_cannot_be_replaced(written, model):
    lines = ("final_sparsity: {0.25: [0.weight], 0.5: [2.weight]}", "params: []", "global_sparsity: False")
    path = written("modifiers:\n" + modifier_text("CAPruningModifier", *lines))
    _manager, modifier = found(path)
    recipe.check_sparsities(modifier, model, [], path)
    with pytest.raises(UserError, match="--sparsities cannot replace it; leave --sparsities out"):
        recipe.check_sparsities(modifier, model, [0.5], path)


def test_a_sparsity_below_what_is_pruned_already(written, model):
    path = written(
        "modifiers:\n" + modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    )
    _manager, modifier = found(path)
    with torch.no_grad():
        model[0].weight[:6] = 0  # 48 of 144
    recipe.check_sparsities(modifier, model, [48 / 144, 0.5], path)
    with pytest.raises(UserError, match=r"--sparsities 0.1 0.3: 48 of the 144 weights .* are zero already \(0.3333\)"):
        recipe.check_sparsities(modifier, model, [0.1, 0.3, 0.5], path)


def test_a_loss_that_is_not_finite_stops_sparseml_too(written, model):
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    lines = ("final_sparsity: 0.5", "params: __ALL_PRUNABLE__", *OTHERS["OBSPruningModifier"])
    with pytest.raises(ValueError, match="the calibration loss is nan"):
        recipe.apply_at(written("modifiers:\n" + modifier_text("OBSPruningModifier", *lines)), model, 0.5, sampler())


@pytest.mark.parametrize("text", ["just words", "[1, 2]", "modifiers: 3", "modifiers:\n  - !CAPruningModifier\n"])
def test_yaml_that_is_no_recipe(text, written):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        found(written(text))


def test_quantization_is_refused_when_the_recipe_is_loaded(written):
    pruning = modifier_text("GlobalMagnitudePruningModifier", "params: __ALL_PRUNABLE__", "final_sparsity: 0.5")
    path = written("modifiers:\n" + pruning + "  - !QuantizationModifier\n      start_epoch: 1.0\n")
    with pytest.raises(
        UserError, match=r"QuantizationModifier does not work with torch .* quantize the exported model"
    ):
        recipe.load_manager(path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("GWProdPruningModifier", "num_grads: 8", r"there is no GWProdPruningModifier; CAPruningModifier is the nearest"),
        ("ColourPruningModifier", "num_grads: 8", r"there is no ColourPruningModifier; pruning modifiers that exist: "),
        ("MFACPruningModifier", "block_implementation: block", r"MFACPruningModifier has no parameter block_implementation; 'capruner recipes convert"),
        ("GlobalMagnitudePruningModifier", "global_sparsity: True", r"has no parameter global_sparsity; 'capruner recipes convert"),
        ("OBSPruningModifier", "mask_type: '2:4'", r"2:4 mask_type not supported by SparseML's own modifier; --engine native"),
    ],
)  # fmt: skip
def test_what_sparseml_does_not_know_is_said_in_words(name, line, message, written):
    path = written("modifiers:\n" + modifier_text(name, "final_sparsity: 0.5", "params: __ALL_PRUNABLE__", line))
    with pytest.raises(UserError, match=message):
        recipe.load_manager(path)


def test_numbers_behind_a_modifier_s_name_hide_it_from_sparseml(written):
    path = written("modifiers:\n  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 1.0}\n")
    with pytest.raises(UserError, match="EpochRangeModifier: SparseML reads parameters from the lines below"):
        recipe.load_manager(path)


def anchors(count: int) -> str:
    lines = [f"a{index}: &a{index} 0.{index + 1}" for index in range(count)]
    return "\n".join([*lines, *(f"b{index}: *a{index}" for index in range(count))]) + "\n"


@pytest.mark.parametrize("count", [17, 32, 300])
def test_references_to_numbers_are_fine_however_many(count, written):
    one = modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    assert len(found(written(anchors(count) + "modifiers:\n" + one))[0].modifiers) == 1


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [bomb(9), "a: &a [*a]\n", "a: &a {b: {c: *a}}\n"], ids=["nested", "itself", "deeply"])
def test_references_that_explode_are_refused(text, written):
    one = modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    with pytest.raises(UserError, match=r"its references \(\*name\) make it more than 100,000 values"):
        recipe.load_manager(written(text + "modifiers:\n" + one))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("ConstantPruningModifier", ("params: __ALL_PRUNABLE__",)),
        ("ACDCPruningModifier", ("compression_sparsity: 0.5", "params: __ALL_PRUNABLE__", "global_sparsity: True")),
        ("TopKASTPruningModifier", ("forward_sparsity: 0.5", "backward_sparsity: 0.4", "params: __ALL_PRUNABLE__")),
    ],
)
def test_modifiers_without_a_final_sparsity_are_refused_by_name(name, lines, written, model):
    schedule = "start_epoch: 0.0\n      end_epoch: 1.0\n      " + "update_frequency: 1.0\n      " * (name[0] != "C")
    path = written("modifiers:\n" + f"  - !{name}\n      {schedule}" + "\n      ".join(lines) + "\n")
    _manager, modifier = found(path)
    with pytest.raises(UserError, match=f"{name} has no final_sparsity, so it cannot prune in one shot"):
        recipe.check_sparsities(modifier, model, [], path)
    from capruner.cli.lint import lint

    names, problems = lint(Path(path), model)
    assert (list(names), problems) == (["0.weight", "2.weight"], [])


def test_a_recipe_is_utf_8_whatever_the_locale(tmp_path):
    one = modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    (tmp_path / "r.yaml").write_text("# Für später: ×\nmodifiers:\n" + one, encoding="utf-8")
    (tmp_path / "r.md").write_text("---\n# Für später: ×\nmodifiers:\n" + one + "---\nÜber\n", encoding="utf-8")
    code = "import sys; from capruner.sparseml.recipe import load_manager\nfor p in sys.argv[1:]:\n  m = load_manager(p); print(len(m.modifiers))"
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    line = [sys.executable, "-c", code, str(tmp_path / "r.yaml"), str(tmp_path / "r.md")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "1"], done.stderr


@pytest.mark.parametrize("front", ["---\n", "--- # begin\n# ---\n", "# ------\n", ""])
def test_a_document_s_first_line_is_no_front_matter(front, written):
    one = modifier_text("CAPruningModifier", "final_sparsity: 0.5", "params: __ALL_PRUNABLE__")
    assert len(found(written(front + "modifiers:\n" + one + "# --- the end\n"))[0].modifiers) == 1
