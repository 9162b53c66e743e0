"""Turns, ratios and twins of ``capruner bench``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_case import KWARGS, MODEL

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import capruner  # noqa: E402
from capruner.cli import bench as command  # noqa: E402
from capruner.cli.main import main  # noqa: E402
from capruner.deploy import bench, export, graphs  # noqa: E402

WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
QUICK = ["--rounds", "2", "--seconds", "0.02", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT at 75 %, as checkpoint and ONNX, and a dense one."""
    folder = tmp_path_factory.mktemp("bench")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, **KWARGS)
    export.to_onnx(model, folder / "dense.onnx", (3, 16, 16))
    capruner.prune(model, None, sparsity=0.75, method="magnitude", progress=False).apply(model)
    save_file(model.state_dict(), folder / "pruned.safetensors")
    export.to_onnx(model, folder / "pruned.onnx", (3, 16, 16))
    return folder


def test_onnx_files_as_a_user_types_it(folder: Path, tmp_path: Path) -> None:
    line = ["dense.onnx", "pruned.onnx", "--engines", "onnxruntime", "deepsparse", "--batch-size", "1", "2", *QUICK]
    line += ["--python", f"deepsparse={sys.executable}", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, "-m", "capruner", "bench", *line], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    rows = [row for row in found["rows"] if row["engine"] == "onnxruntime"]
    assert [(row["model"], row["batch_size"]) for row in rows] == [
        ("dense", 1),
        ("pruned", 1),
        ("dense", 2),
        ("pruned", 2),
    ]
    assert all(row["low_ms"] <= row["latency_ms"] <= row["high_ms"] for row in rows)
    assert rows[0]["speedup"] == rows[2]["speedup_same_engine"] == 1
    assert [round(row["sparsity"], 2) for row in rows] == [0, 0.75, 0, 0.75]
    assert "reference: dense in onnxruntime" in done.stdout
    if "deepsparse" in found["not_measured"]:
        assert "deepsparse: not measured, deepsparse is not installed" in done.stdout


def test_a_checkpoint_in_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder / "pruned.safetensors"), *WORDS, "--engines", "torch", *QUICK]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[2].split()[:4] == ["pruned", "75.0", "torch", "1"]
    assert f"torch: torch {torch.__version__}, float32, CPU" in shown


def test_a_checkpoint_and_its_twin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [str(folder / "pruned.safetensors"), "--twin", *WORDS, "--engines", "onnxruntime", *QUICK]
    assert main(["bench", *line]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[:4] for row in rows] == [
        ["dense", "twin", "0.0", "onnxruntime"],
        ["pruned", "75.0", "onnxruntime", "1"],
    ]


@pytest.mark.parametrize(
    ("words", "engines"),
    [
        (["a.onnx"], ["onnxruntime", "mnn", "openvino", "deepsparse"]),
        (["a.pth", "--model", "x"], ["onnxruntime", "mnn", "openvino", "deepsparse", "torch"]),
        (["a.pth", "--model", "x", "--device", "cuda"], ["torch"]),
        (["a.pth", "--model", "x", "--device", "cuda", "--dtype", "bfloat16"], ["torch", "semi_structured"]),
    ],
)
def test_all_engines_that_fit_are_tried(
    words: list[str], engines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(words[0]).touch()
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(words)
    command._check(args)
    assert args.engines == engines


def test_twins_have_no_zeros_and_else_the_same_values(folder: Path, tmp_path: Path) -> None:
    assert graphs.sparsity_of(folder / "pruned.onnx") == pytest.approx(0.75, abs=1e-3)
    graphs.fill_zeros(folder / "pruned.onnx", tmp_path / "twin.onnx")
    assert graphs.sparsity_of(tmp_path / "twin.onnx") == 0
    assert graphs.image_shape(tmp_path / "twin.onnx") == (3, 16, 16)
    layer = nn.Sequential(nn.Linear(40, 50))
    with torch.no_grad():
        layer[0].weight[:, ::2] = 0
    before = layer[0].weight.detach().clone()
    export.fill_zeros(layer)
    after = layer[0].weight.detach()
    assert torch.equal(after[:, 1::2], before[:, 1::2])
    assert bool((after != 0).all())
    assert float(after[:, ::2].std()) == pytest.approx(float(before[:, 1::2].std()), rel=0.1)


def test_ratios_are_taken_within_rounds() -> None:
    dense, pruned = bench.Subject("dense", None), bench.Subject("pruned", None)
    times = {
        ("onnxruntime", dense): [1.0, 4.0, 2.0],
        ("onnxruntime", pruned): [1.0, 4.0, 2.0],
        ("deepsparse", dense): [2.0, 8.0, 1.0],
        ("deepsparse", pruned): [0.5, 2.0, 0.1],
    }
    rows: dict[Any, dict[str, Any]] = {key: bench._row(key, 4, times, dense) for key in times}
    row = rows["deepsparse", pruned]
    assert row["speedup"] == 2  # of 2, 2 and 20; the ratio of medians would be 4
    assert row["speedup_same_engine"] == 4
    assert (row["latency_ms"], row["images_per_second"]) == (500, 8)
    assert rows["onnxruntime", dense]["speedup"] == 1


def test_quartiles() -> None:
    assert bench.quartiles([3.0]) == (3, 3, 3)
    assert bench.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


def test_an_engine_that_fails_is_named_and_no_process_is_left(tmp_path: Path) -> None:
    torn = bench.Subject("torn", tmp_path / "torn.onnx")
    assert torn.onnx is not None
    torn.onnx.write_bytes(b"no onnx")
    found = bench.measure([torn], ["onnxruntime", "torch"], [1], bench.BenchConfig((3, 4, 4), 1, 1, 0.01))
    assert found["rows"] == []
    assert "INVALID_PROTOBUF" in found["not_measured"]["onnxruntime"].upper()
    assert "needs checkpoints" in found["not_measured"]["torch"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.onnx"], "no such file: missing.onnx"),
        (["torn.onnx"], "torn.onnx is not an ONNX file, or is damaged"),
        (["torn.onnx", "--python", "tvm=/bin/true"], "expected ENGINE=PATH"),
        (["torn.onnx", "--rounds", "0"], "must be positive"),
        (["torn.onnx", "--engines", "torch"], "reads checkpoints, with --model"),
        (["torn.onnx", *WORDS], "leave --model out"),
        (["torn.onnx", "--json", "nowhere/figures.json"], "there is no folder nowhere"),
        (["torn.pth"], "name its timm model"),
        (["torn.pth", *WORDS, "--engines", "semi_structured"], "--device cuda"),
        (["torn.pth", *WORDS], "torn.pth is damaged"),
    ],
)
def test_mistakes(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("torn.onnx", "torn.pth"):
        Path(name).write_bytes(b"no weights")
    assert main(["bench", *words]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown
