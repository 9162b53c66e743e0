"""The examples run as they are, in a folder of their own, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytest.importorskip("sklearn")


def run(source: str, folder: Path) -> str:
    """What Python prints for ``source``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONWARNINGS": "error:::capruner"}
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_shot(tmp_path: Path) -> None:
    lines = run((EXAMPLES / "one_shot.py").read_text(encoding="utf-8"), tmp_path).splitlines()
    dense = float(lines[-5].split()[1])
    cap, magnitude = (float(lines[-2].split()[position]) for position in (6, 9))
    assert lines[-2].startswith(" 90% ")
    assert magnitude < cap
    assert dense - cap < 3


def test_two_to_four(tmp_path: Path) -> None:
    lines = run((EXAMPLES / "two_to_four.py").read_text(encoding="utf-8"), tmp_path).splitlines()
    assert lines[:2] == [
        "2.weight: 1152 groups of four, 2 weights remain in each",
        "5.weight: 1280 groups of four, 2 weights remain in each",
    ]
    assert lines[2].startswith("0.weight is dense: ")


@pytest.mark.parametrize(
    ("name", "libraries"),
    [("gradual_lightning", ["lightning"]), ("gradual_trainer", ["transformers", "accelerate"])],
)
def test_gradual(name: str, libraries: list[str], tmp_path: Path) -> None:
    for library in libraries:
        pytest.importorskip(library, exc_type=ImportError)
    output = run((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), tmp_path)
    sparsity, accuracy = (float(word[:-1]) for word in output.replace(",", " ").split() if word.endswith("%"))
    assert sparsity == 90
    assert accuracy > 85


def test_shrink_and_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    lines = run((EXAMPLES / "shrink_and_export.py").read_text(encoding="utf-8"), tmp_path).splitlines()
    dense, small = (float(word) for word in lines[-2].split() if word[0].isdigit())
    assert dense - small < 5
    assert float(lines[-1].split()[-1]) < 1e-4


def test_notebook(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    notebook = json.loads((EXAMPLES / "digits.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before committing"
    lines = run("\n".join(cells), tmp_path).splitlines()
    removed, accuracy = (float(number) for number in re.findall(r"[\d.]+(?= ?%)", lines[-1]))
    assert removed > 50
    assert accuracy > 80


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert all(f"[{name}]({name})" in listed for name in names)
