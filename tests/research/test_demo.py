"""The demo: its data, its model as shipped, and the whole of it at one sparsity."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
pytest.importorskip("timm")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm

from capruner.sparseml import recipe
from research.demo import run_demo
from research.demo.digits import MODEL, MODEL_KWARGS, WEIGHTS, write_folders


def test_the_split_is_fixed_and_in_proportion(tmp_path):
    write_folders(tmp_path)
    counts = {
        split: [len(list((tmp_path / split / str(d)).iterdir())) for d in range(10)] for split in ("train", "val")
    }
    assert (sum(counts["train"]), sum(counts["val"])) == (1198, 599)
    assert all(abs(a - 2 * b) <= 2 for a, b in zip(counts["train"], counts["val"]))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len({path.name for path in before}) == 1797  # no image in both
    write_folders(tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png")) == before
    with Image.open(tmp_path / before[0]) as image:
        assert image.size == (8, 8)


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size < 1_000_000


@pytest.mark.parametrize("method", run_demo.METHODS)
def test_its_recipes_prune_attention_and_mlp(method):
    path = str(run_demo.RECIPES / method / "digits_vit.yaml")
    manager = recipe.load_manager(path)
    names = recipe.selected_names(recipe.pruning_modifier(manager, path), timm.create_model(MODEL, **MODEL_KWARGS))
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == [f"blocks.{block}.{layer}.weight" for block in range(4) for layer in layers]


def test_cap_and_obs_differ_in_nothing_but_damping():
    found = []
    for method in ("cap", "obs"):
        path = str(run_demo.RECIPES / method / "digits_vit.yaml")
        manager = recipe.load_manager(path)
        modifier = recipe.pruning_modifier(manager, path)
        shared = ("num_grads", "fisher_block_size", "global_sparsity", "mask_type", "num_recomputations")
        found.append([getattr(modifier, name) for name in shared])
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        run_demo.main(["--output", str(tmp_path / "out"), "--sparsities", "0.9"])
    finally:
        torch.set_num_threads(threads)
    folder = tmp_path / "out" / "demo"
    rows = {method: json.loads((folder / method / "summary.json").read_text())["rows"] for method in run_demo.METHODS}
    assert all(r[0]["top1"] >= 97.5 for r in rows.values())
    for cap, obs, magnitude in list(zip(rows["cap"], rows["obs"], rows["gm"]))[1:]:
        assert cap["top1"] > obs["top1"] + 30
        assert cap["top1"] > magnitude["top1"] + 30
        assert cap["top1"] > 94
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("accuracy_vs_sparsity", "layer_sparsity"))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["sparsity", *" ".join(run_demo.METHODS.values()).split()] for line in lines)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]  # no sparse_logs
