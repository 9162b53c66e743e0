"""Recipes as the original repository writes them, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capruner import recipes
from capruner.cli.main import main
from capruner.recipes.convert import convert

SCHEDULE = "init_sparsity: 0.5, final_sparsity: 0.5, start_epoch: 0.0, end_epoch: 1.0, update_frequency: 1.0"
PARAMS = "params: ['re:.*blocks.\\d+.attn.[qkv].weight', 're:.*blocks.\\d+\\.attn\\.[qkv]\\.weight', 're:.*cls_attn_blocks.\\d+.attn.[qkv].weight']"


def written(folder: Path, *modifiers: str) -> Path:
    (folder / "old.yaml").write_text("modifiers:\n" + "".join(f"  - !{modifier}\n" for modifier in modifiers))
    return folder / "old.yaml"


def converted(folder: Path, *modifiers: str) -> tuple[Path, list[str], list[str]]:
    text, changes, problems = convert(written(folder, *modifiers))
    (folder / "new.yaml").write_text(text)
    return folder / "new.yaml", changes, problems


def test_patterns(tmp_path: Path) -> None:
    path, changes, problems = converted(
        tmp_path, f"CAPruningModifier {{{SCHEDULE}, {PARAMS}, num_grads: 64, fisher_inv_device: cpu}}"
    )
    assert not problems
    assert len(changes) == 2
    found = recipes.load(path)
    assert found.params == [
        "re:.*blocks.\\d+.attn.qkv.weight",
        "re:.*blocks.\\d+\\.attn\\.qkv\\.weight",
        "re:.*cls_attn_blocks.\\d+.attn.[qkv].weight",
    ]
    assert (found.knobs["num_grads"], found.knobs["fisher_inv_device"]) == (64, "cpu")


RATE = "LearningRateFunctionModifier {{start_epoch: 0.0, end_epoch: 100.0, init_lr: 5e-4, final_lr: 1e-5, {}}}"
PRUNE = f"CAPruningModifier {{{SCHEDULE}, params: __ALL_PRUNABLE__}}"


@pytest.mark.parametrize(
    ("said", "function", "changes"),
    [
        ("lr_func: linear, cycle_epochs: 20, cycle_mul: 1.0, warmup: 0", "cyclic_linear", 3),
        ("lr_func: linear, cycle_epochs: 100", "linear", 1),
        ("lr_func: cosine, cycle_epochs: 100.0", "cosine", 1),
        ("lr_func: cosine", "cosine", 0),
        ("lr_func: cyclic_linear, cycle_epochs: 20", "cyclic_linear", 0),
    ],
)
def test_learning_rates(tmp_path: Path, said: str, function: str, changes: int) -> None:
    path, told, problems = converted(tmp_path, RATE.format(said), PRUNE)
    assert (len(told), problems) == (changes, [])
    rate: Any = next(a for a in recipes.load_training(path).actions if hasattr(a, "lr_func"))
    assert rate.lr_func == function


def test_parameters_that_change_nothing(tmp_path: Path) -> None:
    obs = f"OBSPruningModifier {{{SCHEDULE}, params: x, blocks_in_parallel: -1, fisher_inv_device: null, recomputation_inter_func: linear}}"
    path, changes, problems = converted(tmp_path, obs)
    assert (len(changes), problems) == (3, [])
    assert recipes.load(path).modifier == "OBSPruningModifier"
    magnitude = f"MagnitudePruningModifier {{{SCHEDULE}, params: x, global_sparsity: True, num_grads: 64}}"
    path, changes, problems = converted(tmp_path, magnitude)
    assert (len(changes), problems) == (3, [])
    assert recipes.load(path).modifier == "GlobalMagnitudePruningModifier"


def test_n_of_m_counts_what_remains(tmp_path: Path) -> None:
    schedule = SCHEDULE.replace("0.5", "0.25")
    path, changes, problems = converted(tmp_path, f"CAPruningModifier {{{schedule}, params: x, mask_type: '1:4'}}")
    assert ("3:4" in changes[0], problems) == (True, [])
    assert str(recipes.load(path).knobs["mask_type"]) == "3:4"


@pytest.mark.parametrize("name", ["OBSPruningModifier", "GlobalMagnitudePruningModifier", "CAPruningModifier"])
def test_n_and_m_where_a_modifier_has_no_such_parameters(name: str, tmp_path: Path) -> None:
    path, changes, problems = converted(tmp_path, f"{name} {{{SCHEDULE}, params: x, mask_type: N:M, n: 2, m: 4}}")
    assert problems == []
    assert bool(changes) == (name != "CAPruningModifier")
    assert str(recipes.load(path).knobs["mask_type"]) == "2:4"


def test_a_modifier_that_sparseml_carries_out(tmp_path: Path) -> None:
    mfac = f"MFACPruningModifier {{{SCHEDULE}, params: __ALL_PRUNABLE__, num_grads: 8, block_implementation: block}}"
    path, changes, (problem,) = converted(tmp_path, mfac)
    assert changes == ["1. MFACPruningModifier: block_implementation: block left out; it changes nothing"]
    assert "OBSPruningModifier with fisher_block_size up to 192" in problem
    assert "SparseML" in problem
    sparseml_recipe = pytest.importorskip("capruner.sparseml.recipe", exc_type=ImportError)
    manager = sparseml_recipe.load_manager(str(path))
    assert manager.modifiers[0].num_grads == 8


def test_what_is_left_to_do_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(
        tmp_path,
        RATE.format("lr_func: cosine, cycle_epochs: 20"),
        f"GWProdPruningModifier {{{SCHEDULE}, params: x}}",
        "QuantizationModifier {start_epoch: 0}",
        PRUNE,
    )
    assert main(["recipes", "convert", str(path)]) == 1
    told = capsys.readouterr()
    assert "!CAPruningModifier" in told.out
    problems = [line for line in told.err.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 3
    assert "cycle_epochs 20 has no effect with lr_func cosine" in problems[0]
    assert "CAPruningModifier is the nearest method" in problems[1]
    assert "quantize the exported model" in problems[2]


def test_a_recipe_that_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "convert", str(written(tmp_path, PRUNE))]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    (tmp_path / "again.yaml").write_text(told.out)
    assert recipes.load(tmp_path / "again.yaml").params == "__ALL_PRUNABLE__"
