"""MNN files that compute what torch computes, made without MNN's Python tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("MNN", reason="needs MNN: pip install 'capruner[mnn]'")
import capruner
from capruner.deploy import bench, export, mnn

# Ends a process that opens a connection, runs another program than Python, or imports MNN.tools. A path hook would come too late:
# importing MNN.tools.mnnconvert installs a package and uploads data.
GUARD = """
import os, sys
def guard(event, args):
    network = event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
    if network or event == "os.system" or (event == "import" and str(args[0]).startswith("MNN.tools")):
        sys.__stderr__.write(f"guard: {event} {args[0]}\\n")
        sys.__stderr__.flush()
        os._exit(97)
sys.addaudithook(guard)
"""


def guarded(folder: Path, code: str, *words: object) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(GUARD)
    paths = os.pathsep.join([str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 64)).eval()
    capruner.prune(model, None, sparsity=0.9, method="magnitude", progress=False).apply(model)
    return model


def test_outputs_are_torchs_and_the_file_is_sparse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = pruned()
    exported = export.to_mnn(model, tmp_path / "m.mnn", (3, 8, 8))
    assert exported.difference < 1e-4
    assert exported.zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    dense = sum(4 * p.numel() for p in model.parameters())
    assert (tmp_path / "m.mnn").stat().st_size == exported.bytes < 0.5 * dense
    assert [path.name for path in tmp_path.iterdir()] == ["m.mnn"]
    assert capfd.readouterr().out == ""  # MNN's own messages are dropped


def test_a_difference_is_an_error_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = pruned()
    with torch.no_grad():
        wrong[0].weight.mul_(1.01)
    convert = mnn.convert

    def other(source: Path, target: Path) -> Path:
        export.to_onnx(wrong, source, (3, 8, 8))
        return convert(source, target)

    monkeypatch.setattr(mnn, "convert", other)
    with pytest.raises(RuntimeError, match=r"MNN and torch differ by .* the file was not written"):
        export.to_mnn(pruned(), tmp_path / "m.mnn", (3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(b"no onnx")
    with pytest.raises(RuntimeError, match=r"MNN cannot convert torn\.onnx"):
        mnn.convert(tmp_path / "torn.onnx", tmp_path / "torn.mnn")


def test_the_guard_stops_mnns_tools(tmp_path: Path) -> None:
    done = guarded(tmp_path, "import MNN.tools.mnnconvert")
    assert done.returncode == 97
    assert "guard: import MNN.tools" in done.stderr


def test_nothing_is_installed_or_uploaded(tmp_path: Path) -> None:
    export.to_onnx(pruned(), tmp_path / "m.onnx", (3, 8, 8))
    code = (
        "import sys, numpy; from pathlib import Path; from capruner.deploy import mnn; source, target = map(Path, sys.argv[1:]); "
        "mnn.load(mnn.convert(source, target))(numpy.zeros((2, 3, 8, 8), 'float32')); print('done')"
    )
    done = guarded(tmp_path, code, tmp_path / "m.onnx", tmp_path / "m.mnn")
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout.splitlines()  # MNN may print what the device supports


def test_bench_runs_mnn_or_says_that_it_is_missing(tmp_path: Path) -> None:
    export.to_onnx(pruned(), tmp_path / "m.onnx", (3, 8, 8))
    subject = bench.Subject("m", tmp_path / "m.onnx")
    measured = bench.measure([subject], ["mnn"], [1, 2], bench.BenchConfig((3, 8, 8), 1, 1, 0.01))
    assert [(row["engine"], row["batch_size"]) for row in measured["rows"]] == [("mnn", 1), ("mnn", 2)]
    assert measured["versions"]["mnn"].startswith("MNN 3.")
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    config = bench.BenchConfig((3, 8, 8), 1, 1, 0.01, pythons={"mnn": str(bare)})
    measured = bench.measure([subject], ["mnn"], [1], config)
    assert "MNN is not installed" in measured["not_measured"]["mnn"]
