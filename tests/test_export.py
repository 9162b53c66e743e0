"""ONNX files that compute what torch computes, zeros included, and the 2:4 form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_case import KWARGS, MODEL

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
import capruner  # noqa: E402
from capruner import bench, export  # noqa: E402
from capruner.cli.main import main  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT at 75 %."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, **KWARGS)
    capruner.prune(model, None, sparsity=0.75, method="magnitude", progress=False).apply(model)
    path = tmp_path_factory.mktemp("export") / "sparsity_0.75.safetensors"
    save_file(model.state_dict(), path)
    return path


WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "capruner", *map(str, words)], capture_output=True, text=True)


def test_onnx_as_a_user_types_it(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    done = command("export", checkpoint, *WORDS, "--output", file)
    assert done.returncode == 0, done.stderr
    assert "dynamic batch of 3×16×16" in done.stdout
    model = timm.create_model(MODEL, **KWARGS, checkpoint_path=checkpoint).eval()
    x = torch.randn(5, 3, 16, 16)
    found = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})[
        0
    ]
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
    operators = {node.op_type for node in onnx.load(file).graph.node}
    assert "LayerNormalization" not in operators  # DeepSparse 1.8 has it, but several times slower than its parts
    zeros = sum(int((w == 0).sum()) for w in load_file(checkpoint).values() if w.dim() > 1)
    assert f"{zeros:,} zeros" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_lite0"])
def test_other_families(name: str, tmp_path: Path) -> None:
    size = {"img_size": 56} if "swin" in name else {}
    model = timm.create_model(name, num_classes=3, **size)
    found = export.to_onnx(model, tmp_path / "m.onnx", (3, 56, 56))
    assert found["difference"] < 1e-4


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"differ by .* the file was not written"):
        export.to_onnx(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), tmp_path / "m.onnx", (3, 2, 2), tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    assert main(["export", str(checkpoint), *WORDS, "--output", str(tmp_path / "w.safetensors")]) == 0
    timm.create_model(MODEL, **KWARGS, checkpoint_path=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.pth", *WORDS, "--output", "x.onnx"], "no checkpoint at missing.pth"),
        (["CHECKPOINT", "--model", "vit_tinny", "--output", "x.onnx"], "timm has no such model"),
        (["CHECKPOINT", "--model", "resnet18", "--output", "x.onnx"], "does not fit resnet18"),
        (["CHECKPOINT", *WORDS, "--output", "x.tflite"], "the ending says no format"),
        (["CHECKPOINT", *WORDS, "--output", "nowhere/x.onnx"], "there is no folder nowhere"),
    ],
)
def test_mistakes(words: list[str], told: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *(str(checkpoint) if w == "CHECKPOINT" else w for w in words)]) == 2
    shown = capsys.readouterr().err
    assert told in shown
    assert "Traceback" not in shown


def test_without_a_gpu_the_semi_structured_form_is_refused(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["export", str(checkpoint), *WORDS, "--output", str(tmp_path / "x.pt")]) == 2
    assert "there is none; capruner verify --pattern 2:4" in capsys.readouterr().err


def test_two_of_four() -> None:
    weight = torch.tensor([[1.0, 0, 2, 0, 0, 0, 3, 0]])
    assert export.is_two_of_four(weight)
    assert not export.is_two_of_four(torch.tensor([[1.0, 0, 2, 3]]))
    assert not export.is_two_of_four(torch.ones(2, 6))
    with pytest.raises(ValueError, match="no Linear layer of this model has 2:4 weights"):
        export.to_semi_structured(nn.Linear(8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_semi_structured_on_a_gpu() -> None:
    model = nn.Sequential(nn.Linear(128, 128)).half().cuda()
    with torch.no_grad():
        model[0].weight.unflatten(1, (-1, 4))[..., 2:] = 0
    assert export.to_semi_structured(model) == ["0"]


def test_bench_as_a_user_types_it(checkpoint: Path, tmp_path: Path) -> None:
    files = [tmp_path / "dense.onnx", tmp_path / "pruned.onnx"]
    for file in files:
        assert main(["export", str(checkpoint), *WORDS, "--output", str(file)]) == 0
    figures = tmp_path / "figures.json"
    done = command(
        "bench",
        *files,
        "--engines",
        "onnxruntime",
        "deepsparse",
        "--batch-size",
        1,
        2,
        "--rounds",
        2,
        "--seconds",
        0.05,
        "--json",
        figures,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert [
        (Path(row["model"]).name, row["batch_size"]) for row in found["rows"] if row["engine"] == "onnxruntime"
    ] == [*(("dense.onnx", 1), ("pruned.onnx", 1), ("dense.onnx", 2), ("pruned.onnx", 2))]
    assert all(row["low_ms"] <= row["latency_ms"] <= row["high_ms"] for row in found["rows"])
    assert found["rows"][0]["speedup"] == 1
    if "deepsparse" in found["not_measured"]:
        assert "deepsparse is not installed" in done.stdout


def test_bench_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "missing.onnx"]) == 2
    assert "no such file: missing.onnx" in capsys.readouterr().err
    torn = tmp_path / "torn.onnx"
    torn.write_bytes(b"no onnx")
    assert main(["bench", str(torn), "--python", "tvm=/bin/true"]) == 2
    assert "wants ENGINE=PATH" in capsys.readouterr().err
    rows, missing = bench.measure([torn], ["onnxruntime"], [1], 1, 0.01, 1, {})
    assert not rows
    assert "onnxruntime" in missing
