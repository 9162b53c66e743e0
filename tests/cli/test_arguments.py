"""How a command line ends: output that nobody reads, encodings without "×", errors of every kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from capruner.cli.arguments import UserError, describe, run

SCRIPT = """
import sys
from pathlib import Path
from capruner.cli.arguments import run
def main(argv):
    for index in range(3000):
        print(index, "16\\xd716", flush=index % 10 == 0)
        print("progress", file=sys.stderr)
    Path("written").write_text("all")
    return {status}
sys.exit(run(main))
"""


def start(tmp_path: Path, status: int = 0, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(status=status)], cwd=tmp_path, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.promise("Scripts", "When the reader of the output ends (`head`, a closed connection), the run continues")
@pytest.mark.parametrize("status", [0, 1])
def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path, status: int) -> None:
    process = start(tmp_path, status, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == status
    assert (tmp_path / "written").read_text() == "all"


def test_closed_output_does_not_end_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, preexec_fn=lambda: os.close(1), stderr=subprocess.DEVNULL)
    assert process.wait() == 0
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}])
def test_an_encoding_without_the_character(tmp_path: Path, environment: dict[str, str]) -> None:
    plain = os.environ | {"PYTHONCOERCECLOCALE": "0"} | environment
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=plain)
    assert process.communicate()[0].startswith(b"0 16?16\n")
    assert process.returncode == 0


def fail(error: Exception) -> NoReturn:
    raise error


@pytest.mark.promise("Scripts", "A mistake in a command is one line; `--debug` shows the traceback")
@pytest.mark.parametrize("error", [UserError("wrong flag"), ValueError("wrong flag"), OSError("wrong flag")])
def test_errors_of_the_user_are_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(lambda argv: fail(error), []) == 2
    assert capsys.readouterr().err == "error: wrong flag\n(--debug shows where)\n"
    with pytest.raises(type(error)):
        run(lambda argv: fail(error), ["--debug"])


@pytest.mark.promise(
    "Scripts", "An unexpected error is one line with its type and place; `--debug` shows the traceback"
)
@pytest.mark.parametrize(
    "error", [KeyError("lr"), AssertionError(), TypeError("no"), AttributeError("x"), IndexError()]
)
def test_other_errors_are_called_internal_with_type_and_place(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda argv: fail(error), []) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: internal error, please report it: {type(error).__name__}")
    assert f"at {__file__}:" in told
    assert "in fail\n" in told


def test_descriptions_of_foreign_errors() -> None:
    assert describe(ValueError("two\n lines")) == "two lines"
    assert describe(KeyError("lr")) == "KeyError: 'lr'"
    assert describe(AssertionError()) == "AssertionError"
    assert len(describe(ValueError("x" * 1000))) < 320
