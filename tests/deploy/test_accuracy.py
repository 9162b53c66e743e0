"""Accuracy of exported files, preprocessing in their metadata, and int8."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_case import KWARGS, MODEL

pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
import capruner  # noqa: E402
from capruner.cli import export as command  # noqa: E402
from capruner.cli.main import main  # noqa: E402
from capruner.deploy import accuracy, export, graphs, quantize  # noqa: E402

WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]

try:
    import onnxruntime.quantization

    OLD = ""
except (ImportError, AttributeError) as error:
    OLD = f"onnxruntime's quantisation does not run with onnx {onnx.__version__} (SparseML pins it): {error}"
needs_quantisation = pytest.mark.skipif(bool(OLD), reason=OLD)


def test_accuracy_of_the_file(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["export", str(trained), *WORDS, "--output", str(tmp_path / "m.onnx"), "--data-dir", str(images)]
    assert main(line) == 0
    told = re.search(
        r"same 18 validation images: torch (\S+) %, onnxruntime (\S+) %; equal .* on (\S+) %", capsys.readouterr().out
    )
    assert told is not None
    assert told[1] == told[2]
    assert float(told[1]) > 60
    assert told[3] == "100.00"
    assert main([*line, "--val-limit", "5"]) == 0
    assert "on the same 5 validation images" in capsys.readouterr().out


def test_metadata_says_how_to_use_the_file(trained: Path, images: Path, tmp_path: Path) -> None:
    line = ["export", str(trained), *WORDS, "--output", str(tmp_path / "m.onnx"), "--data-dir", str(images)]
    assert main([*line, "--mean", "0.1", "0.2", "0.3", "--interpolation", "bilinear"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told["model"] == MODEL
    assert json.loads(told["input_size"]) == [3, 16, 16]
    assert json.loads(told["mean"]) == [0.1, 0.2, 0.3]
    assert told["interpolation"] == "bilinear"
    assert json.loads(told["class_names"]) == ["blue", "green", "red"]
    assert {"std", "crop_pct"} <= told.keys()


def test_a_less_accurate_file_fails(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = accuracy.outputs
    monkeypatch.setattr(
        accuracy, "outputs", lambda form: (lambda x: -outputs(form)(x)) if isinstance(form, Path) else outputs(form)
    )
    line = ["export", str(trained), *WORDS, "--output", str(tmp_path / "m.onnx"), "--data-dir", str(images)]
    assert main(line) == 1
    assert "points less accurate than torch" in capsys.readouterr().out


def test_measure_counts_every_image_once() -> None:
    def first(images: np.ndarray) -> np.ndarray:
        return np.eye(4)[images.astype(int)]

    def second(images: np.ndarray) -> np.ndarray:
        return np.eye(4)[np.minimum(images.astype(int), 1)]

    batches = [(torch.tensor([0.0, 1, 2]), torch.tensor([0, 1, 2])), (torch.tensor([3.0]), torch.tensor([0]))]
    measured = accuracy.measure({"first": first, "second": second}, batches)
    assert measured == accuracy.Accuracy(4, {"first": 75, "second": 50}, {"first": 100, "second": 50})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--output", "x.safetensors", "--data-dir", "D"], "--data-dir is for --format onnx or mnn, not safetensors"),
        (["--output", "x.mnn", "--int8", "D"], "--int8 is for --format onnx, not mnn"),
        (["--output", "x.onnx", "--int8", "D", "--data-dir", "D"], "not allowed with"),
        (["--output", "x.onnx", "--data-dir", "nowhere"], "nowhere is not a folder"),
        (["--output", "x.onnx", "--val-limit", "0"], "must be positive"),
    ],
)
def test_mistakes(words: list[str], told: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["export", str(trained), *WORDS, *words])
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    assert status == 2
    assert told in capsys.readouterr().err


@pytest.mark.skipif(not OLD, reason="onnxruntime's quantisation runs here")
def test_int8_without_a_recent_onnx_is_explained(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(trained), *WORDS, "--output", str(tmp_path / "m.onnx"), "--int8", str(images)]
    assert main(line) == 2
    assert "it needs onnx 1.16 or later" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_quantisation
def test_int8(trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "int8.onnx"
    assert main(["export", str(trained), *WORDS, "--output", str(file), "--int8", str(images)]) == 0
    told = capsys.readouterr().out
    found = re.search(r"same 18 validation images: float32 (\S+) %, int8 (\S+) %", told)
    assert found is not None
    assert abs(float(found[1]) - float(found[2])) <= 12  # two of 18 images
    graph = graphs.read(file)
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.graph.node}
    assert json.loads({item.key: item.value for item in graph.metadata_props}["class_names"]) == [
        "blue",
        "green",
        "red",
    ]
    small = [item for item, _ in graphs.weights(graph) if item.data_type == onnx.TensorProto.INT8]
    assert len(small) == len(graphs.weights(graph))
    assert graphs.sparsity_of(file) > 0.7
    twin = tmp_path / "twin.onnx"
    graphs.fill_zeros(file, twin)
    assert graphs.sparsity_of(twin) == 0


@needs_quantisation
def test_int8_of_a_convolutional_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).eval()
    capruner.prune(model, None, sparsity=0.8, method="magnitude", progress=False).apply(model)
    export.to_onnx(model, tmp_path / "m.onnx", (3, 8, 8))
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8)) for _ in range(4)]
    zeros = quantize.to_int8(tmp_path / "m.onnx", tmp_path / "int8.onnx", batches)
    assert zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    x = batches[0][0]
    exact = model(x).detach().numpy()
    found = accuracy.outputs(tmp_path / "int8.onnx")(x.numpy())
    assert 0 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


@needs_quantisation
def test_a_pruned_weight_that_is_not_zero_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
    export.to_onnx(model, tmp_path / "m.onnx", (3, 2, 2))
    read = graphs.read

    def careless(path: Path) -> object:
        graph = read(path)
        for item, _ in graphs.weights(graph):
            if item.data_type == onnx.TensorProto.INT8:
                item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) + np.int8(1), item.name))
        return graph

    monkeypatch.setattr(quantize, "read", careless)
    with pytest.raises(RuntimeError, match=r"changed pruned weights of .*; the file was not written"):
        quantize.to_int8(tmp_path / "m.onnx", tmp_path / "int8.onnx", [(torch.randn(4, 3, 2, 2), torch.zeros(4))])
    assert not (tmp_path / "int8.onnx").exists()


def test_the_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--data-dir", "--int8", "--half", "--val-limit", *command.FORMATS))
