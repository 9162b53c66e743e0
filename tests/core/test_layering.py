"""``capruner.core`` is pure: it imports nothing of ours outside itself."""

from __future__ import annotations

import ast
from pathlib import Path

import capruner


def test_core_imports_only_itself() -> None:
    modules = sorted((Path(capruner.__file__).parent / "core").rglob("*.py"))
    assert len(modules) > 10
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "capruner":
                assert node.module.startswith("capruner.core"), f"{module.name} imports {node.module}"
