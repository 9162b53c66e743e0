"""Each command in a process of its own, with a mistake: exit status 2, one line that says what to do, no traceback, nothing on stdout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")

LINES = {
    "prune": (["--data-dir", ".", "--model", "vit_tiny_patch16_224", "--sparsities", "50"], "write 0.9 for 90 %"),
    "shrink": (
        [
            "--data-dir",
            ".",
            "--model",
            "vit_tiny_patch16_224",
            "--random-weights",
            "--macs",
            "50",
            "--output",
            "s.safetensors",
        ],
        "write 0.5 for half",
    ),
    "report": (["nowhere"], "there is nothing at nowhere; give the folder of an experiment, or a checkpoint"),
    "export": (
        ["w.pth", "--model", "vit_tiny_patch16_224", "--output", "w.tflite"],
        "use one of .onnx, .mnn, .safetensors",
    ),
    "bench": (["w.onnx"], "no such file: w.onnx; capruner export writes ONNX"),
    "verify": (["w.pth", "--model", "vit_tiny"], "timm has no such model; near: vit_tiny_patch16_224"),
    "train": (["--model", "vit_tiny_patch16_224"], "--data-dir is missing"),
    "recipes": (["show", "vitt"], "see 'capruner recipes list'"),
}


@pytest.mark.parametrize("command", LINES)
def test_a_mistake_is_one_line(command: str, tmp_path: Path) -> None:
    words, told = LINES[command]
    line = [sys.executable, "-m", "capruner", command, *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert told in error
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_covered() -> None:
    from capruner.cli.main import COMMANDS

    assert set(LINES) == set(COMMANDS)
