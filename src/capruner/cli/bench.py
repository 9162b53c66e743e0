"""``capruner bench``: dense against pruned on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from capruner.cli.arguments import UserError
from capruner.cli.tables import text_table

HELP = """\
Time ONNX models against each other: latency and throughput by engine, in interleaved rounds.

The first file is what the others are compared with, so give the dense model first. Every pair of engine and file runs in a process of its own with the same
number of threads; rounds take turns, so that a machine that slows down slows all.
"""
EXAMPLE = """\
examples:
  capruner bench dense.onnx deit_small_75.onnx deit_small_90.onnx --engines onnxruntime deepsparse --batch-size 1 16
  capruner bench dense.onnx pruned.onnx --engines onnxruntime deepsparse --python deepsparse=/path/to/other/venv/bin/python
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    from capruner.bench import ENGINES

    parser.add_argument(
        "models", metavar="MODEL.onnx", type=Path, nargs="+", help="from capruner export; the first is the reference"
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=["onnxruntime", "deepsparse"],
        help="default: onnxruntime deepsparse",
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1], help="default 1")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each pair gets (default 7)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of a turn, after half as long to warm up (default 1)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter for an engine that lives in another environment",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Print a table."""
    from capruner.bench import ENGINES, measure

    for model in args.models:
        if not model.is_file():
            raise UserError(f"no such file: {model}; capruner export writes ONNX")
    pythons = dict(item.partition("=")[::2] for item in args.python)
    for engine, path in pythons.items():
        if engine not in ENGINES or not Path(path).exists():
            raise UserError(
                f"--python {engine}={path}: wants ENGINE=PATH with an engine of {', '.join(ENGINES)} and an interpreter that exists"
            )
    if min(args.batch_size) < 1 or args.rounds < 1 or args.threads < 1 or args.seconds <= 0:
        raise UserError("--batch-size, --rounds, --threads and --seconds must be positive")
    rows, missing = measure(
        args.models, args.engines, args.batch_size, args.rounds, args.seconds, args.threads, pythons
    )
    for engine, why in missing.items():
        print(f"{engine}: not measured, {why}")
    if rows:
        headings = ["model", "engine", "batch", "latency ms", "spread", "images/s", "times the reference"]
        cells = [
            [
                Path(row["model"]).name,
                row["engine"],
                str(row["batch_size"]),
                f"{row['latency_ms']:.2f}",
                f"{row['low_ms']:.2f}–{row['high_ms']:.2f}",
                f"{row['images_per_second']:.0f}",
                f"{row['speedup']:.2f}",
            ]
            for row in rows
        ]
        print(text_table(headings, cells))
        print(
            f"\nmedians and quartiles of {args.rounds} rounds, {args.threads} threads; reference: {args.models[0].name} in {rows[0]['engine']}"
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "not_measured": missing}, indent=1))
    return 0 if rows else 1
