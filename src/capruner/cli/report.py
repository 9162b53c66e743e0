"""``capruner report``: the page about an experiment or a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from capruner.cli.arguments import UserError, add_model, add_params

HELP = """\
Write report.html about an experiment's folder or a sparse checkpoint: one file, no network.

Accuracy against sparsity, sparsity by layer and depth, predicted and measured loss, multiply-adds that are left, time and memory, what was run. A checkpoint
by itself knows its zeros only, and --model says what they are zeros of.
"""
EXAMPLE = """\
examples:
  capruner report output/deit_small_patch16_224-cap-vit
  capruner report sparsity_0.75.safetensors --model deit_small_patch16_224 --html page.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="EXPERIMENT_OR_CHECKPOINT",
        type=Path,
        help="a folder that a script has written to, or weights (.safetensors, .pth)",
    )
    add_model(parser, used="for a checkpoint")
    add_params(parser)
    parser.add_argument(
        "--html",
        type=Path,
        help="where to write a checkpoint's page (default: beside the checkpoint, ending in .report.html)",
    )
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Write the page and say where; 0."""
    from capruner.report.checkpoint import is_result
    from capruner.report.experiment import checkpoint_contents, write_page, write_report

    if not args.path.exists():
        raise UserError(f"there is nothing at {args.path}; give the folder of an experiment, or a checkpoint")
    if args.path.is_dir():
        if args.model or args.html:
            raise UserError(
                f"{args.path} is the folder of an experiment, which knows its model and its place; leave --model and --html out"
            )
        written = write_report(args.path)
    else:
        if is_result(args.path):
            raise UserError(
                f"{args.path} is a pruning result, not a checkpoint; give the folder of its experiment, or a checkpoint with --model"
            )
        if not args.model:
            raise UserError(
                f"{args.path} is a checkpoint: say which architecture its weights are of, --model deit_small_patch16_224 for instance"
            )
        target = args.html or args.path.with_name(f"{args.path.stem}.report.html")
        if not target.parent.is_dir():
            raise UserError(f"--html {target}: there is no folder {target.parent}")
        written = write_page(
            checkpoint_contents(args.path, args.model, args.model_kwargs, args.params, target.parent), target
        )
    print(f"written to {written}")
    return 0
