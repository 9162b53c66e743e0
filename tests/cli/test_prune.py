"""``capruner`` and ``capruner prune`` as a user types them: recipes from flags, what a run writes, mistakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_case import KWARG_WORDS, KWARGS, MODEL

import capruner
from capruner.cli.main import COMMANDS, main

timm = pytest.importorskip("timm")

CAPRUNER = [sys.executable, "-m", "capruner"]


def words(place: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "data_dir": place / "data",
        "model": MODEL,
        "model_kwargs": KWARG_WORDS,
        "checkpoint": place / "dense.safetensors",
        "sparsities": [0.5, 0.75],
        "num_grads": 6,
        "damp": 1e-3,
        "fisher_block_size": 16,
        "params": ["re:.*blocks.[0-9]+.mlp.(fc1|fc2).weight$"],
        "experiment": "trial",
        "output": place / "output",
        "gs_batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "overwrite": True,
    } | changes
    line = ["prune"]
    for flag, value in given.items():
        if value is not None:
            values = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{flag}", *map(str, values)]  # with underscores: they are taken for dashes
    return line


def test_a_run_from_flags_writes_recipe_report_and_what_it_measured(place: Path, tmp_path: Path) -> None:
    done = subprocess.run([*CAPRUNER, *words(place, save_model=True)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    folder = place / "output" / "trial"
    recipe = (folder / "recipe.yaml").read_text()
    assert "!CAPruningModifier" in recipe
    assert "fisher_block_size: 16" in recipe
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["arguments"]["sparseml_recipe"] is None
    assert summary["recipe"] == recipe
    stages = [row["stage"] for row in summary["stages"]]
    assert stages == [
        "load model and data",
        "evaluate dense",
        "plan",
        "calibrate and prune",
        "measure divergence",
        "evaluate at 50 %",
        "evaluate at 75 %",
    ]
    assert all(row["seconds"] >= 0 and row["peak_memory_gib"] > 0 for row in summary["stages"])
    assert summary["stages"][3]["parts"].keys() >= {"gradients", "fisher", "eliminate"}

    fixed = summary["macs"]["activations"]
    weights = summary["macs"]["weights"]
    mlp = sum(count for name, count in weights.items() if ".mlp." in name)
    dense, half, quarter = summary["rows"]
    assert dense["macs_left"] == sum(weights.values()) + fixed
    assert dense["macs_left"] - half["macs_left"] == mlp / 2  # every token meets every weight of the MLPs
    assert dense["macs_left"] - quarter["macs_left"] == mlp * 3 / 4
    assert dense["predicted_loss"] is None
    assert 0 < half["predicted_loss"] < quarter["predicted_loss"]
    assert dense["divergence"] is None
    assert 0 < half["divergence"] < quarter["divergence"]
    by_layer = sum(row["predicted_loss"] for row in summary["layers"][0]["layers"])
    assert by_layer == pytest.approx(half["predicted_loss"])

    page = (folder / "report.html").read_text()
    for link in ("checkpoints/sparsity_0.5.safetensors", "checkpoints/sparsity_0.75.safetensors", "summary.json"):
        assert f'href="{link}"' in page
        assert (folder / link).is_file()


def test_recomputations_climb_geometrically(place: Path) -> None:
    flags = {"num_recomputations": 2, "labels": "model", "distill_passes": 2}
    assert main(words(place, experiment="steps", sparsities=[0.75], **flags)) == 0
    folder = place / "output" / "steps"
    assert 'recomputation_inter_func: "geometric"' in (folder / "recipe.yaml").read_text()
    result = capruner.load_result(folder / "result.safetensors")
    assert result.settings["num_recomputations"] == 2
    assert result.settings["recomputation_inter_func"] == "geometric"
    assert result.settings["labels"] == "model"
    (distilled,) = result.settings["distill"]
    assert distilled["after"] < distilled["before"]
    assert json.loads((folder / "summary.json").read_text())["rows"][1]["method"] == "CAP + distillation"
    model = timm.create_model(MODEL, **KWARGS)
    assert set(result.level().others) == set(dict(model.named_parameters())) - set(result.masks())


def test_magnitude_is_distilled_too(place: Path) -> None:
    flags = {"method": "magnitude", "num_grads": None, "damp": None, "fisher_block_size": None, "save_model": True}
    weights = {}
    for passes in (0, 1):
        name = f"magnitude-{passes}"
        assert main(words(place, experiment=name, sparsities=[0.75], distill_passes=passes, **flags)) == 0
        weights[passes] = load_file(place / "output" / name / "checkpoints" / "sparsity_0.75.safetensors")
    changed = [key for key, value in weights[0].items() if not torch.equal(value, weights[1][key])]
    assert "blocks.0.mlp.fc1.weight" in changed
    assert "head.bias" in changed
    assert '"GlobalMagnitude + distillation"' in (place / "output" / "magnitude-1" / "summary.json").read_text()
    for key in changed:
        if ".mlp.fc" in key and "weight" in key:
            assert torch.equal(weights[0][key] == 0, weights[1][key] == 0)


def test_without_a_recipe_sparseml_is_not_imported(place: Path, tmp_path: Path) -> None:
    """Not with a recipe of our own modifiers either; each of the methods works."""
    code = (
        "import sys; sys.modules['sparseml'] = None; from capruner.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*words: str) -> dict[str, Any]:
        line = [sys.executable, "-c", code, *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return json.loads((place / "output" / "bare" / "summary.json").read_text())

    bare = {"experiment": "bare", "overwrite": True, "sparsities": [0.5]}
    found = run(*words(place, **bare))
    assert (found["engine"], "sparseml" in found["versions"]) == ("native", False)
    none = dict.fromkeys(("num_grads", "damp", "fisher_block_size", "params"))
    recipe = place / "output" / "bare" / "recipe.yaml"
    copied = tmp_path / "again.yaml"
    copied.write_text(recipe.read_text())
    again = run(*words(place, **(bare | none | {"sparseml_recipe": copied})))
    assert again["rows"][1]["loss"] == found["rows"][1]["loss"]


def test_modules_and_methods_to_compare_with(place: Path) -> None:
    none = dict.fromkeys(("num_grads", "damp", "fisher_block_size"))
    for method, flags in (("obs", {}), ("magnitude", none)):
        given = {"method": method, "params": ["blocks"], "experiment": method, "overwrite": True}
        assert main(words(place, **given, **flags)) == 0
        summary = json.loads((place / "output" / method / "summary.json").read_text())
        assert [round(row["reached_prunable"], 4) for row in summary["rows"]] == [0, 0.5, 0.75]
        assert all(row["name"].startswith("blocks.") for row in summary["layers"][0]["layers"])


def test_overview_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in shown
    assert main([]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    shown = capsys.readouterr().out
    assert "examples:\n  capruner prune" in shown
    assert "--mask-type" in shown


def test_no_such_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prnue"]) == 2
    assert "did you mean prune?" in capsys.readouterr().err


BAD = {
    "no data": ({"data_dir": None}, "required: --data-dir"),
    "an engine without a recipe": ({"engine": "sparseml"}, "--engine sparseml needs --sparseml-recipe"),
    "percent": ({"sparsities": [50]}, "write 0.9 for 90 %"),
    "recipe and flags": ({"sparseml_recipe": "a.yaml"}, "--params: --sparseml-recipe a.yaml decides this"),
    "no such knob": ({"method": "magnitude"}, "--num-grads, --fisher-block-size, --damp: not supported by --method magnitude"),
    "mask type": ({"mask_type": "4:2"}, "mask_type must be"),
    "no match": ({"params": ["blocks.7"]}, "no parameter or module is called 'blocks.7'"),
    "no steps": ({"num_recomputations": 0}, "num_recomputations must be a whole number, at least 1, got 0"),
    "passes back": ({"distill_passes": -1}, "distill_passes must be a number, at least 0, got -1"),
    "two choices": ({"max_drop": 1}, "--max-drop chooses the sparsity; leave --sparsities out"),
    "a rise": ({"max_drop": -1, "sparsities": None}, "--max-drop -1: points of top-1 accuracy"),
    "all held out": ({"max_drop": 1, "sparsities": None, "held_out": 18}, "--held-out 18: the training split has 18 images"),
    "a state": ({"max_drop": 1, "sparsities": None, "held_out": 6, "state_dir": "state"}, "leave --state-dir (traces_backup_dir) out"),
    "pattern and sparsity": ({"mask_type": "2:4", "sparsities": [0.9]}, "a sparsity of 0.5; got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = BAD[case]
    try:
        status = main(words(place, experiment="bad", **changes))
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_every_method_s_recipe_is_one_that_sparseml_reads(tmp_path: Path) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    from capruner.sparseml.recipe import load_manager, pruning_modifier
    from capruner.vision import one_shot_arguments

    names = {
        ("cap", "unstructured"): "CAPruningModifier",
        ("cap", "2:4"): "CAPruningModifier",
        ("fast_cap", "2:4"): "FastCAPruningModifier",
        ("obs", "unstructured"): "OBSPruningModifier",
        ("magnitude", "unstructured"): "GlobalMagnitudePruningModifier",
        ("magnitude", "2:4"): "MagnitudePruningModifier",
    }
    parser = argparse.ArgumentParser()
    one_shot_arguments.add_arguments(parser)
    for (method, mask_type), name in names.items():
        line = f"--model {MODEL} --data-dir x --pretrained --method {method} --mask-type {mask_type} --params a.weight re:b.*"
        args = one_shot_arguments.checked(parser.parse_args(line.split()))
        path = tmp_path / f"{method}.yaml"
        path.write_text(one_shot_arguments.recipe_text(one_shot_arguments.one_shot(args)))
        manager = load_manager(str(path))
        modifier = pruning_modifier(manager, str(path))
        assert type(modifier).__name__ == name
        assert modifier.params == ["a.weight", "re:b.*"]
        assert modifier.final_sparsity == 0.5
        if hasattr(modifier, "mask_type") and method != "obs":
            assert str(modifier.mask_type) == mask_type


def test_the_largest_sparsity_within_a_drop(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, sparsities=None, max_drop=10, experiment="drop", num_grads=3)) == 0
    folder = place / "output" / "drop"
    summary = json.loads((folder / "summary.json").read_text())
    search, (dense, chosen) = summary["search"], summary["rows"]
    assert search["images"] == 3  # a fifth of the training images
    assert dense["images"] == chosen["images"] == 9  # the validation images
    curve = dict(map(tuple, search["curve"]))
    assert curve[search["sparsity"]] == search["top1"] >= search["dense"] - 10
    assert all(top1 < search["dense"] - 10 for sparsity, top1 in curve.items() if sparsity > search["sparsity"])
    assert chosen["requested"] == search["sparsity"]
    assert "Choice of the sparsity" in (folder / "report.html").read_text()
    assert "at the peak" in capsys.readouterr().out  # the plan
