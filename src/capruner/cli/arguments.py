"""Command lines that teach: dashes or underscores, one clear line for a user's mistake, a traceback only on ``--debug``."""

from __future__ import annotations

import argparse
import ast
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user can mend; the message says what and how."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is: what has to be put back is put back."""


_MAIN = os.getpid()


class Parser(argparse.ArgumentParser):
    """Accepts ``--data_dir`` for ``--data-dir``; its help keeps the description's line breaks; a mistake is one line, not the whole usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_known_args([_dashed(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains the flags)\n")


def _dashed(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


class KeyValues(argparse.Action):
    """``--model-kwargs img_size=32 qkv_bias=False``: Python literals, or strings."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for item in values:
            key, equals, text = item.partition("=")
            if not equals:
                parser.error(f"{option_string} wants KEY=VALUE, got {item!r}")
            try:
                found[key] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[key] = text
        setattr(namespace, self.dest, found)


def add_model(parser: argparse._ActionsContainer, required: bool = False, used: str = "") -> None:
    """``--model`` and ``--model-kwargs``, as every command takes them; ``used`` says for what where a command can do without."""
    parser.add_argument("--model", required=required, help="timm model name" + (f", {used}" if used else ""))
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of timm.create_model, img_size=32 or num_classes=10 say",
    )


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Exit status of ``main``: its own or 0, 2 after one line on stderr for a mistake of the user's, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        status = main(argv) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, head say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, ValueError, RuntimeError, OSError) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {_line(error)}", file=sys.stderr)
        print("(--debug shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if "--debug" in arguments:
            raise
        what, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(
            f"{what}; what was saved before is whole, and the same command goes on from there where it can",
            file=sys.stderr,
        )
        return status


def _line(error: BaseException) -> str:
    """What happened; of the traceback that a loader's worker sends as its message, the error alone."""
    text = str(error).strip() or type(error).__name__
    if "Traceback (most recent call last)" in text:
        text = f"{text.splitlines()[-1]} ({text.splitlines()[0].rstrip('.')})"
    if "consecutive samples" in text:  # timm's loader, which names them only in its log
        text += ": the lines above name the images; is their folder still there, and are they images?"
    return text


def _terminate(number: int, frame: Any) -> NoReturn:
    if os.getpid() != _MAIN:  # a loader's worker, which has inherited this
        os._exit(143)
    raise Terminated
