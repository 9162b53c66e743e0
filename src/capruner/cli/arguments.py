"""Command lines that teach: dashes or underscores, one clear line for a user's mistake, a traceback only on ``--debug``."""

from __future__ import annotations

import argparse
import ast
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NoReturn

from capruner import startup
from capruner.text import printable


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


def flag(name: str) -> str:
    """``--num-grads`` for ``num_grads``."""
    return "--" + name.replace("_", "-")


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
    parser.add_argument(
        "--model",
        required=required,
        help="timm model name, or hf:NAME of a Hugging Face image classifier on the hub or in a folder"
        + (f", {used}" if used else ""),
    )
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of timm.create_model, such as img_size=32 or num_classes=10",
    )


def add_params(parser: argparse._ActionsContainer) -> None:
    """``--params``, for commands that count what a checkpoint has pruned."""
    parser.add_argument(
        "--params",
        nargs="+",
        default=["__ALL_PRUNABLE__"],
        help="what counts as prunable: names, re:PATTERN (default: the weights of all linear, convolution, attention and recurrent layers)",
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Where the weights come from: ``--pretrained``, ``--checkpoint``, or ``--random-weights``."""
    parser.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    parser.add_argument(
        *("--checkpoint", "--initial-checkpoint", "--checkpoint-path"),
        default="",
        help="weights to start from (.safetensors or .pth)",
    )
    parser.add_argument("--random-weights", action="store_true", help="start from an untrained network")


def check_weights(args: argparse.Namespace) -> None:
    """Raise ``UserError`` where the flags of :func:`add_weights` do not say where the weights come from."""
    if args.model.startswith("hf:") and not (args.checkpoint or args.random_weights):
        args.pretrained = True  # a name on the hub, or a folder, stands for its weights
    if not (args.checkpoint or args.pretrained or args.random_weights):
        raise UserError(
            f"--model {args.model}: where do its weights come from? Give --pretrained, --checkpoint FILE, or --random-weights"
        )


def add_preprocessing(parser: argparse.ArgumentParser) -> None:
    """timm's flags for how images become tensors; what is not given comes from the model's configuration."""
    group = parser.add_argument_group("preprocessing (default: as the model's configuration says)")
    group.add_argument(
        "--img-size", type=int, help="side of the input in pixels (default: model kwarg img_size, or the model's)"
    )
    group.add_argument("--mean", type=float, nargs="+", help="per channel, for example 0.485 0.456 0.406")
    group.add_argument("--std", type=float, nargs="+")
    group.add_argument("--crop-pct", type=float, help="share of the resized image that the centre crop keeps")
    group.add_argument("--interpolation", help="bicubic, bilinear, ...")


def add_data(parser: argparse.ArgumentParser) -> argparse._ActionsContainer:
    """Images to calibrate and to evaluate on; the group, for what a command has besides."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", required=True, help="folder with train/ and val/, or the root of --dataset")
    group.add_argument("--dataset", default="", help=DATASET)
    add_gradient_batch(group)
    group.add_argument("-vb", "--val-batch-size", type=int, default=128, help="default 128")
    group.add_argument("--val-limit", type=int, metavar="N", help="evaluate on N images, the same each time")
    group.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    return group


DATASET = "a data set that timm knows, such as torch/cifar10 (default: image folders)"


def add_gradient_batch(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        *("-gb", "--gs-batch-size", "--grad-sampler-batch-size"),
        type=int,
        default=16,
        help="images per gradient (default 16)",
    )


def add_seed_and_device(group: argparse._ActionsContainer) -> None:
    group.add_argument("--seed", type=int, default=42, help="default 42")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)")


def add_wandb(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--log-wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline needs no account)"
    )


def check_counts(args: argparse.Namespace, *names: str) -> None:
    """Raise ``UserError`` for flags that are given and less than 1."""
    for name in names:
        if (count := getattr(args, name)) is not None and count < 1:
            raise UserError(f"{flag(name)} must be at least 1, got {count}")


def check_sparsities(sparsities: Sequence[float]) -> None:
    """Raise ``UserError`` unless all lie in [0, 1)."""
    if wrong := [s for s in sparsities if not 0 <= s < 1]:
        raise UserError(f"--sparsities {' '.join(map(str, wrong))}: must lie in [0, 1); write 0.9 for 90 %")


def add_engine(parser: argparse._ActionsContainer) -> None:
    """``--engine``: who carries out a recipe."""
    parser.add_argument(
        "--engine",
        choices=("native", "sparseml"),
        help="who carries out a recipe: capruner itself, or SparseML (default: SparseML for recipes with modifiers of its own, where it can be imported)",
    )


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Exit status of ``main``: its own or 0, 2 after one line on stderr for an error, 130 after Ctrl-C, 143 after SIGTERM.

    Output whose reader has left (``| head``, a closed connection) is dropped and the work continues; characters that the output's encoding lacks become "?".
    """
    arguments = sys.argv[1:] if argv is None else argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, startup.stop):
            signal.signal(signal.SIGINT, _interrupt)
    with redirect_stdout(_Output(sys.stdout, clean=True)), redirect_stderr(_Output(sys.stderr)):
        try:
            return main(argv) or 0
        except Exception as error:
            if "--debug" in arguments:
                raise
            print(f"error: {printable(_line(error))}", file=sys.stderr)
            print("(--debug shows where)", file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            if "--debug" in arguments:
                raise
            what, status = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
            print(
                f"{what}; what was saved before is whole, and the same command resumes from it if it can",
                file=sys.stderr,
            )
            return status
        finally:
            sys.stdout.flush()


class _Output:
    """A stream that does not fail: see :func:`run`. ``clean``: without control characters, which names in files may hold."""

    def __init__(self, stream: Any, clean: bool = False) -> None:
        self._stream, self._clean = stream, clean
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(printable(text) if self._clean else text))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def _attempt(self, output: Callable[[], object]) -> None:
        if self._stream is None:  # closed by whoever started this process
            return
        try:
            output()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def describe(error: BaseException) -> str:
    """One line for an error of somebody else's code."""
    text = " ".join(str(error).split())
    text = text[:300] + " ..." * (len(text) > 300)
    if isinstance(error, _CLEAR) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# Errors of these types are written for the user; others were not expected, and their type says what kind they are.
_CLEAR = (UserError, ValueError, RuntimeError, OSError)


def _line(error: BaseException) -> str:
    """What happened, in one line; of the traceback that a loader's worker sends as its message, the error alone."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        lines = text.splitlines()
        return f"{lines[-1].removeprefix(f'{UserError.__module__}.{UserError.__name__}: ')} ({lines[0].rstrip('.')})"
    if isinstance(error, _CLEAR):
        return text or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"internal error, please report it: {describe(error)}{place}"


def _interrupt(number: int, frame: Any) -> NoReturn:
    if os.getpid() == _MAIN:  # a loader's worker is told to end by the main process
        signal.signal(signal.SIGINT, startup.stop)
    raise KeyboardInterrupt


def _terminate(number: int, frame: Any) -> NoReturn:
    if os.getpid() != _MAIN:  # a loader's worker, which has inherited this
        os._exit(143)
    raise Terminated
