"""``capruner verify``: is a checkpoint what it says it is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from capruner.cli.arguments import add_model, add_params
from capruner.text import text_table

HELP = """\
Check a pruned checkpoint: its sparsity, masks, N:M pattern, and that plain timm loads it.

Prints the sparsity of each layer and in total, over the prunable weights and over all; exit code 1 if a check fails. Opens safetensors files and what torch
reads without running code (weights_only=True), nothing else.
"""
EXAMPLE = """\
examples:
  capruner verify output/EXPERIMENT/checkpoints/sparsity_0.75.safetensors --model deit_small_patch16_224 --masks output/EXPERIMENT/result.safetensors
  capruner verify sparsity_0.5.safetensors --model vit_base_patch16_224 --pattern 2:4
  capruner verify weights.pth --model resnet50d --model-kwargs num_classes=10 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="weights, .safetensors or .pth")
    add_model(parser, required=True)
    add_params(parser)
    parser.add_argument(
        "--masks",
        type=Path,
        help="masks to compare with the zeros: a result.safetensors, or a safetensors file with a mask per parameter name",
    )
    parser.add_argument(
        "--pattern",
        help="2:4 or another N:M: N of each M consecutive inputs (or input channels) stay at most; layers without zeros count as dense",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Print what is found; 1 if a check fails."""
    from capruner.report.verification import verify

    found = verify(args.checkpoint, args.model, args.model_kwargs, args.params, args.masks, args.pattern)
    print(json.dumps(found, indent=1) if args.json else _text(found))
    return 0 if found["ok"] else 1


def _text(found: dict[str, Any]) -> str:
    headings = ["layer", "shape", "weights", "zeros", "%"]
    rows = [
        [
            row["name"],
            "×".join(map(str, row["shape"])),
            f"{row['numel']:,}",
            f"{row['zeros']:,}",
            f"{100 * row['sparsity']:.2f}",
        ]
        for row in found["layers"]
    ]
    if found["pattern"]:
        headings.append(found["pattern"])
        for cells, row in zip(rows, found["layers"]):
            cells.append(row["pattern"])
    total = found["sparsity"]
    lines = [text_table(headings, rows), ""]
    for key, name in (("prunable", "prunable weights"), ("all", "parameters")):
        lines.append(
            f"{total['zeros_' + key]:,} of {total['count_' + key]:,} {name} are zero: {100 * total[key]:.3f} %"
        )
    lines.append("")
    lines += [f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}: {check['detail']}" for check in found["checks"]]
    return "\n".join(lines)
