"""``capruner COMMAND``: looks the command up and hands over. Only the chosen command's module is imported."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from capruner.cli.arguments import Parser, UserError
from capruner.cli.arguments import run as run_reporting_mistakes

COMMANDS = ("prune", "shrink", "train", "report", "export", "bench", "verify", "recipes")
EXTRAS = {
    **dict.fromkeys(("timm", "torchvision", "PIL", "matplotlib"), "vision"),
    **dict.fromkeys(("onnx", "onnxruntime"), "export"),
    "torch_pruning": "shrink",
    "MNN": "mnn",
    "wandb": "wandb",
}
"""``{package: extra of ours that installs it}``."""
EXAMPLE = """\
examples:
  capruner prune --data-dir DATA --model deit_small_patch16_224 --pretrained --sparsities 0.5 0.75 --num-grads 1024 --save-model
  capruner verify output/EXPERIMENT/checkpoints/sparsity_0.75.safetensors --model deit_small_patch16_224
  capruner COMMAND --help
"""


def _module(command: str) -> Any:
    return importlib.import_module(f"capruner.cli.{command}")


def overview() -> str:
    """The commands, a line each."""
    lines = ["usage: capruner COMMAND ...", "", "Prune vision models, look at what came out, and ship it.", ""]
    for command in COMMANDS:
        lines.append(f"  {command:<9}{_module(command).HELP.strip().splitlines()[0]}")
    return "\n".join(
        [*lines, "", "options: --help, --version; after a command also --debug (traceback of an error)", "", EXAMPLE]
    )


def _dispatch(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    while arguments and arguments[0] == "--debug":
        arguments.append(arguments.pop(0))
        if set(arguments) == {"--debug"}:
            arguments = []
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"capruner {importlib.import_module('capruner').__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise UserError(
            f"capruner has no command {command!r}; {f'did you mean {near[0]}? ' if near else ''}there are {', '.join(COMMANDS)}"
        )
    try:
        module = _module(command)
        parser = Parser(prog=f"capruner {command}", description=module.HELP.strip())
        module.add_arguments(parser)
        args = module.parse(parser, rest) if hasattr(module, "parse") else parser.parse_args(rest)
        return int(module.run(args))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package:  # one of our own messages, which says what to install
            raise UserError(str(error)) from error
        if package not in EXTRAS:
            raise
        raise UserError(
            f"capruner {command} needs the package {package}, which is not installed: pip install 'capruner[{EXTRAS[package]}]'"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of a command line: 0, 1 where a check failed, 2 for a mistake of the user's."""
    return run_reporting_mistakes(_dispatch, argv)
