"""The first moments of a command, before torch is imported: Ctrl-C, and standard streams that are closed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

COMMANDS = ("capruner", "one_shot_pruning.py", "sparse_training.py")


def prepare() -> None:
    """Where this process was started as one of our commands: end quietly on Ctrl-C until the command takes over. Programs that import us are left alone."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    ours = name in COMMANDS or (name == "-m" and "capruner" in sys.orig_argv)
    if not ours or multiprocessing.parent_process() is not None:
        return
    open_streams()
    quieten_progress()
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, stop)


def quieten_progress() -> None:
    """One process shows progress, and a log file gets a line of it now and then. Read when tqdm is imported."""
    if os.environ.get("RANK", "0") != "0":
        os.environ["TQDM_DISABLE"] = "1"
    elif sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")


def open_streams() -> None:
    """Open closed standard streams (``>&-``) on nothing: the next file to be opened would take their number, and what is printed."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def stop(number: int, frame: Any) -> NoReturn:
    """End at once: nothing has begun, or a first Ctrl-C is at work already."""
    os.write(2, b"interrupted\n")
    os._exit(130)


prepare()
