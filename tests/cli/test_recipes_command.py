"""``capruner recipes``: list, show, lint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training_case import KWARGS, MODEL, PRUNE, ROOT

from capruner.cli.main import main

pytest.importorskip("timm")

RECIPES = ROOT / "research" / "recipes"
CAPRUNER = [sys.executable, "-m", "capruner", "recipes"]
WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
HEAD, TO_90 = (
    "modifiers:\n  - !CAPruningModifier" + PRUNE.format(first=0.5, last=last, start=0.0, end=1.0, every=1.0)
    for last in (0.5, 0.9)
)


def test_list_names_every_recipe_with_a_line(tmp_path: Path) -> None:
    done = subprocess.run([*CAPRUNER, "list"], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    assert all(len(text.strip()) > 15 for text in lines.values())


def test_list_by_words_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "list", "one_shot/cap", "2:4"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["one_shot/cap/resnet50d_2of4", "one_shot/cap/vit_2of4"]
    assert main(["recipes", "show", "one_shot/cap/vit.yaml"]) == 0
    assert capsys.readouterr().out == (RECIPES / "one_shot/cap/vit.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "one_shot/cap/bert"], "there is no recipe 'one_shot/cap/bert'"),
        (["show", str(ROOT / "Makefile")], "Makefile is no recipe: SparseML reads .yaml"),
        (["show", "vit_2of4"], "near: one_shot/cap/vit_2of4"),
        (["show"], "takes one recipe, got 0"),
        (["list", "gpt"], "no recipe has 'gpt'"),
        (["lint", "one_shot/cap/vit"], "needs --model"),
        (["lint", "one_shot/cap/vit", "--model", "vit_tinny_patch16_224"], "near: vit_tiny_patch16_224"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *words]) == 2
    assert message in capsys.readouterr().err


def test_lint_prints_what_a_recipe_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "lint", "one_shot/cap/vit_2of4", *WORDS]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert sum(line.startswith("blocks.") for line in lines) == 8
    assert any(line.split() == ["blocks.1.mlp.fc2.weight", "16×64", "1,024"] for line in lines)
    assert "8 layers, 6,144 weights:" in shown
    assert lines[-1] == "vit_2of4.yaml: fits"


PROBLEMS = {
    "no match": (HEAD.replace("(fc1|fc2)", "(fc1|fc3)"), "the alternative 'fc3'"),
    "pattern": (HEAD + "      mask_type: 3:5\n", "8 layers cannot hold mask_type 3:5"),
    "other sparsity": (TO_90 + "      mask_type: 2:4\n", "mask_type 2:4 is a sparsity of 0.5, the recipe says 0.9"),
    "block": (HEAD + "      mask_type: block4\n      fisher_block_size: 30\n", "fisher_block_size must be a multiple of 4"),
    "no gradients": (HEAD + "      num_grads: 0\n", "num_grads must be a whole number, at least 1, got 0"),
    "each step": (HEAD.replace("update_frequency: 1.0", "update_frequency: -1").replace("init_sparsity: 0.5", "init_sparsity: 0.3"), "at every step"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_lint_finds(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = PROBLEMS[case]
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["recipes", "lint", str(tmp_path / "mine.yaml"), *WORDS]) == 1
    shown = capsys.readouterr().out
    assert any(line.startswith("problem: ") and message in line for line in shown.splitlines()), shown


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("labels", "x", "labels must be one of ['data', 'model'], got 'x'"),
        ("gradients", "x", "gradients must be one of ['batch', 'sample'], got 'x'"),
        ("on_bad_batch", "x", "on_bad_batch must be one of ['raise', 'skip'], got 'x'"),
        ("score", "x", "score must be one of"),
        (
            "recomputation_inter_func",
            "x",
            "recomputation_inter_func must be one of ['cubic', 'geometric', 'inverse_cubic', 'linear'], got 'x'",
        ),
        ("damp", "0", "damp must be a positive number, got 0"),
        ("damp", ".nan", "damp must be a positive number, got nan"),
        ("end_epoch", ".inf", "end_epoch must be a finite number, got inf"),
        ("update_frequency", ".inf", "update_frequency must be more than 0"),
        ("update_frequency", "0.00001", "makes more than 10,000 updates"),
        ("memory_budget", "much", "memory_budget must be bytes or a size"),
        ("fisher_inv_device", "nowhere", "fisher_inv_device must be a device of this machine"),
        ("grad_sampler_kwargs", "{batch_size: 0}", "batch_size must be a whole number, at least 1, got 0"),
    ],
)
def test_lint_finds_values_that_cannot_be(
    key: str, value: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"params": "__ALL_PRUNABLE__", "init_sparsity": "0.1", "final_sparsity": "0.5", "start_epoch": "0.0"}
    values |= {"end_epoch": "10.0", "update_frequency": "1.0", "num_grads": "8"} | {key: value}
    lines = "".join(f"      {name}: {text}\n" for name, text in values.items())
    (tmp_path / "mine.yaml").write_text("modifiers:\n  - !CAPruningModifier\n" + lines)
    assert main(["recipes", "lint", str(tmp_path / "mine.yaml"), *WORDS]) == 1
    assert problem in capsys.readouterr().out


def test_lint_looks_at_other_modifiers_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (RECIPES / "one_shot/cap/vit.yaml").read_text()
    extra = "  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: .inf\n"
    (tmp_path / "mine.yaml").write_text(text.rstrip("\n") + "\n" + extra)
    assert main(["recipes", "lint", str(tmp_path / "mine.yaml"), *WORDS]) == 1
    assert "EpochRangeModifier: end_epoch inf is invalid: expected a finite number" in capsys.readouterr().out


def test_lint_of_a_training_without_sparseml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name.startswith(("sparseml", "capruner.sparseml", "capruner.sparseml.recipe"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sparseml", None)
    name = "gradual_pruning/cap/vit_4ep_small"
    assert main(["recipes", "lint", name, *WORDS]) == 0
    assert "8 layers, 6,144 weights:" in capsys.readouterr().out
    text = (RECIPES / f"{name}.yaml").read_text().replace("update_frequency: 0.5", "update_frequency: 0.0")
    (tmp_path / "mine.yaml").write_text(text.replace("end_epoch: 4.0", "end_epoch: .inf"))
    assert main(["recipes", "lint", str(tmp_path / "mine.yaml"), *WORDS]) == 1
    shown = capsys.readouterr().out
    assert "CAPruningModifier: update_frequency must be more than 0" in shown
    assert "EpochRangeModifier: end_epoch inf is invalid: expected a finite number" in shown
    (tmp_path / "other.yaml").write_text(HEAD.replace("CAPruning", "MFACPruning"))
    assert main(["recipes", "lint", str(tmp_path / "other.yaml"), *WORDS]) == 2
    assert "MFACPruningModifier is none of the pruning modifiers" in capsys.readouterr().err
