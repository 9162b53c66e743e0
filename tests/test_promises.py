"""docs/reliability.md has the promises that tests are marked with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("promises", ROOT / "docs" / "promises.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(generator: ModuleType) -> None:
    page = generator.PAGE.read_text(encoding="utf-8")
    assert generator.page(page, generator.promises()) == page, "run: python docs/promises.py"


def test_a_promise_appears_with_every_test_that_holds_it(generator: ModuleType, tmp_path: Path) -> None:
    tests = tmp_path / "tests"
    tests.mkdir()
    mark = '@pytest.mark.promise("Data", "No batch is lost")\n'
    (tests / "test_a.py").write_text(f"{mark}def test_one(): ...\ndef test_none(): ...\n{mark}def test_two(): ...\n")
    found = generator.promises(tests)
    assert found == {"Data": {"No batch is lost": ["tests/test_a.py::test_one", "tests/test_a.py::test_two"]}}
    page = generator.page("<!-- promises: Data -->\nold\n<!-- end -->", found)
    assert "| No batch is lost | `tests/test_a.py::test_one`<br>`tests/test_a.py::test_two` |" in page
    assert "old" not in page
    with pytest.raises(ValueError, match="Memory"):
        generator.page("<!-- promises: Memory -->\n<!-- end -->", found)
