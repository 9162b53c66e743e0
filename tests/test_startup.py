"""Commands that are interrupted early, twice, or started without standard streams; and names from outside."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from capruner.text import printable

TWICE = """
import os, signal, sys, time
sys.argv = ["capruner"]
from capruner.cli.arguments import run
def main(argv):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # while the first is cleaned up
        time.sleep(10)
sys.exit(run(main, []))
"""
EARLY = """
import os, signal, sys
sys.argv = ["/somewhere/bin/capruner"]
class Finder:  # in the midst of importing torch
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
import capruner.cli.main
"""


def python(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program that Ctrl-C reaches, also where these tests run in the background, which ignores it."""

    def reachable() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = [sys.executable, "-c", program]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, preexec_fn=reachable)


@pytest.mark.promise("Scripts", "Ctrl-C and SIGTERM end a run with one line; a second Ctrl-C ends it at once")
@pytest.mark.parametrize("program", [TWICE, EARLY])
def test_interrupted_early_or_twice_is_a_line(program: str) -> None:
    done = python(program)
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


def test_a_program_that_imports_us_keeps_its_handler() -> None:
    program = "import signal, capruner; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = python(program)
    assert done.stdout == "True\n"


@pytest.mark.promise("Scripts", "With closed standard streams the work is done")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str) -> None:
    words = f"{sys.executable} -m capruner recipes list {closed}"
    assert subprocess.run(["sh", "-c", words], capture_output=True, timeout=120).returncode == 0


@pytest.mark.promise("Hostile input", "Control characters in names from files are escaped before they are printed")
def test_names_with_control_characters_are_escaped(tmp_path: Path) -> None:
    assert printable("a\x1b[2Jb\x07 × ü\n\t\u202e") == "a\\x1b[2Jb\\x07 × ü\n\t\\u202e"
    folder = tmp_path / "\x1b]0;owned\x07"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "capruner", "report", str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stderr + done.stdout
    assert "\\x1b]0;owned\\x07" in done.stderr
