"""What is said to those who install in other ways, and what the source distribution takes along."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import capruner

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_setup_py_with_an_old_setuptools_says_what_is_needed(version: str, tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text(f"__version__ = {version!r}\ndef setup(): print('installed')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "setup.py"), "install"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Python 3.11 or newer and setuptools 77 or newer" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_source_distribution_takes_folders_that_exist() -> None:
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    folders = {line.split()[1] for line in lines if line.startswith("graft ")}
    assert {"tests", "qa", "examples", "docs"} <= folders
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_metadata_agrees() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == capruner.__version__
    assert f"version: {capruner.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {capruner.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_extra_is_in_the_guide() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (ROOT / "docs/guide/install.md").read_text(encoding="utf-8")
    assert [name for name in extras if f"| `{name}` |" not in page] == []
