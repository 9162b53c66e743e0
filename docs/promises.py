#!/usr/bin/env python
"""Write the tables of docs/reliability.md from the tests: python docs/promises.py

A test that holds a promise is marked ``@pytest.mark.promise(section, text)``. The tables stand between ``<!-- promises: SECTION -->`` and ``<!-- end -->``.
Tests are parsed, not imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TABLE = re.compile(r"<!-- promises: (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def promises(tests: Path = ROOT / "tests") -> dict[str, dict[str, list[str]]]:
    """``{section: {text: [file::test]}}``, in the order of files and lines."""
    sections: dict[str, dict[str, list[str]]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for section, text in _marks(node):
                test = f"{path.relative_to(tests.parent).as_posix()}::{node.name}"  # type: ignore[attr-defined]
                sections.setdefault(section, {}).setdefault(text, []).append(test)
    return sections


def page(text: str, sections: dict[str, dict[str, list[str]]]) -> str:
    """The page with its tables as the tests have them now.

    Raises:
        ValueError: the page has no table for a section, or the tests no promise for a table.
    """
    tables = TABLE.findall(text)
    if differing := set(tables) ^ set(sections):
        raise ValueError(f"docs/reliability.md and the tests have different sections: {sorted(differing)}")
    return TABLE.sub(lambda match: _table(match[1], sections[match[1]]), text)


def _marks(node: ast.stmt) -> list[tuple[str, str]]:
    """Section and text of each promise marker of a test."""
    if not isinstance(node, ast.FunctionDef):
        return []
    calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
    marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.promise"]
    return [tuple(ast.literal_eval(argument) for argument in mark.args) for mark in marks]  # type: ignore[misc]


def _table(section: str, rows: dict[str, list[str]]) -> str:
    lines = [f"<!-- promises: {section} -->", "", "| promise | test |", "|---|---|"]
    lines += [f"| {text} | {'<br>'.join(f'`{test}`' for test in tests)} |" for text, tests in rows.items()]
    return "\n".join([*lines, "", "<!-- end -->"])


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), promises()), encoding="utf-8")


if __name__ == "__main__":
    main()
