"""``capruner bench``: time dense and pruned models on this machine."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capruner.cli.arguments import UserError, add_model
from capruner.files import replacing
from capruner.text import text_table

if TYPE_CHECKING:
    from capruner.deploy.bench import Subject

HELP = """\
Time models against each other: latency and throughput by engine, in interleaved rounds.

Takes ONNX files of capruner export, or with --model checkpoints, which it exports itself. The others are compared with the first file: give the dense model
first, or --twin. Every pair of engine and file has its own process with the same number of threads, stopped between its turns; pairs take turns in each
round, so that a slow phase of the machine hits all alike. Engines that are not installed are listed; nothing is installed for you.

"times the reference" compares with the first model in the first engine of the table, "times here" with the first model in the same engine.
"""
EXAMPLE = """\
examples:
  capruner bench dense.onnx deit_small_75.onnx deit_small_90.onnx --batch-size 1 16
  capruner bench dense.onnx pruned.onnx --python deepsparse=/path/to/venv/bin/python openvino=/path/to/other/bin/python
  capruner bench sparsity_0.9.safetensors --twin --model deit_small_patch16_224 --engines onnxruntime torch deepsparse
  capruner bench 2of4.safetensors --twin --model vit_base_patch16_224 --engines torch semi_structured --device cuda --dtype bfloat16 --batch-size 64 --compile
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from capruner.deploy.bench import ENGINES

    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="ONNX files, or checkpoints")
    parser.add_argument(
        "--twin", action="store_true", help="compare with a dense twin of the first file: random values for its zeros"
    )
    add_model(parser, used="for checkpoints")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        help="default: onnxruntime mnn openvino deepsparse, for checkpoints torch too; on a GPU torch, in half precision semi_structured too",
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1], help="default 1")
    parser.add_argument("--rounds", type=int, default=7, help="turns per pair (default 7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a turn (default 1)")
    parser.add_argument("--threads", type=int, default=2, help="threads per engine (default 2)")
    parser.add_argument(
        "--python",
        nargs="*",
        default=[],
        metavar="ENGINE=PATH",
        help="interpreter for an engine that is installed in another environment",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for torch (default cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="for torch and openvino"
    )
    parser.add_argument("--compile", action="store_true", help="for torch: torch.compile")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if no engine ran."""
    pythons = _check(args)
    from capruner.deploy.bench import BenchConfig, measure

    asked = {name: getattr(args, name) for name in ("model", "device", "dtype", "compile")}
    with tempfile.TemporaryDirectory(prefix="capruner-bench-") as folder:
        subjects, shape = _checkpoints(args, Path(folder)) if args.model else _graphs(args, Path(folder))
        asked["kwargs"] = args.model_kwargs
        config = BenchConfig(shape, args.threads, args.rounds, args.seconds, pythons, asked)
        found = measure(subjects, args.engines, args.batch_size, config)
    found |= {"rounds": args.rounds, "seconds": args.seconds, "threads": args.threads, "machine": _machine()}
    print(_text(found))
    if args.json:
        with replacing(args.json) as partial:
            partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0 if found["rows"] else 1


def _check(args: argparse.Namespace) -> dict[str, str]:
    """Validate the arguments; the interpreters of ``--python``."""
    from capruner.deploy.bench import ENGINES, TORCH_ENGINES

    for file in args.files:
        if not file.is_file():
            raise UserError(f"no such file: {file}; capruner export writes ONNX")
        if args.model and file.suffix == ".onnx":
            raise UserError(f"{file} is ONNX: leave --model out, or give checkpoints")
        if not args.model and file.suffix != ".onnx":
            raise UserError(f"{file} is a checkpoint: name its timm model, --model NAME")
    if args.engines is None:
        args.engines = _fitting(args)
    for engine in args.engines:
        if engine in TORCH_ENGINES and not args.model:
            raise UserError(f"--engines {engine} reads checkpoints, with --model NAME; ONNX files are for the others")
    if "semi_structured" in args.engines and (args.device != "cuda" or args.dtype == "float32"):
        raise UserError("--engines semi_structured: 2:4 kernels are for GPUs, --device cuda --dtype bfloat16")
    pythons = dict(item.partition("=")[::2] for item in args.python)
    for engine, path in pythons.items():
        if engine not in ENGINES or not shutil.which(path):
            raise UserError(
                f"--python {engine}={path}: expected ENGINE=PATH with an engine of {', '.join(ENGINES)} and an existing interpreter"
            )
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.parent}")
    if min(args.batch_size) < 1 or args.rounds < 1 or args.threads < 1 or args.seconds <= 0:
        raise UserError("--batch-size, --rounds, --threads and --seconds must be positive")
    return pythons


def _fitting(args: argparse.Namespace) -> list[str]:
    """The engines for such files and device; the first installed one is the reference."""
    if args.device == "cuda":
        return ["torch"] if args.dtype == "float32" else ["torch", "semi_structured"]
    return ["onnxruntime", "mnn", "openvino", "deepsparse", *(["torch"] if args.model else [])]


def _graphs(args: argparse.Namespace, folder: Path) -> tuple[list[Subject], tuple[int, ...]]:
    """What to measure, and the shape of an image."""
    from capruner.deploy import bench, graphs

    subjects = [bench.Subject(name, f, sparsity=graphs.sparsity_of(f)) for name, f in zip(_names(args), args.files)]
    if args.twin:
        twin = folder / "twin.onnx"
        graphs.fill_zeros(args.files[0], twin)
        subjects.insert(0, bench.Subject("dense twin", twin, sparsity=graphs.sparsity_of(twin)))
    return subjects, graphs.image_shape(args.files[0])


def _checkpoints(args: argparse.Namespace, folder: Path) -> tuple[list[Subject], tuple[int, ...]]:
    from safetensors.torch import save_file

    from capruner.deploy import bench, export
    from capruner.rows import zero_share

    files = dict(zip(_names(args), args.files))
    if args.twin:
        model, _ = export.load_pruned(args.model, args.model_kwargs, args.files[0])
        export.fill_zeros(model)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "twin.safetensors")
        files = {"dense twin": folder / "twin.safetensors"} | files
    subjects = []
    for number, (name, file) in enumerate(files.items()):
        model, shape = export.load_pruned(args.model, args.model_kwargs, file)
        zeros = zero_share(export.prunable_weights(model).values())
        graph = None
        if set(args.engines) - set(bench.TORCH_ENGINES):
            graph = folder / f"{number}.onnx"
            export.to_onnx(model, graph, shape)
        subjects.append(bench.Subject(name, graph, file, zeros))
    return subjects, shape


def _names(args: argparse.Namespace) -> list[str]:
    """File names, with their folders where two are equal."""
    names = [file.stem for file in args.files]
    return names if len(set(names)) == len(names) else [str(file.with_suffix("")) for file in args.files]


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _text(found: dict[str, Any]) -> str:
    headings = [
        "model",
        "zeros %",
        "engine",
        "batch",
        "latency ms",
        "spread",
        "images/s",
        "times here",
        "times the reference",
    ]
    cells = [
        [
            row["model"],
            f"{100 * row['sparsity']:.1f}",
            row["engine"],
            str(row["batch_size"]),
            f"{row['latency_ms']:.2f}",
            f"{row['low_ms']:.2f}–{row['high_ms']:.2f}",
            f"{row['images_per_second']:.0f}",
            _ratio(row, "speedup_same_engine"),
            _ratio(row, "speedup"),
        ]
        for row in found["rows"]
    ]
    lines = []
    if cells:
        first = found["rows"][0]
        lines = [text_table(headings, cells), ""]
        lines.append(
            f"medians and quartiles of {found['rounds']} rounds, {found['threads']} threads, {found['machine']}; "
            f"reference: {first['model']} in {first['engine']}, here: {first['model']} in the same engine"
        )
    lines += [f"{engine}: {note}" for engine, note in found["versions"].items() if engine not in found["not_measured"]]
    lines += [f"{engine}: not measured, {why}" for engine, why in found["not_measured"].items()]
    return "\n".join(lines)


def _ratio(row: dict[str, Any], name: str) -> str:
    return "–" if row[name] is None else f"{row[name]:.2f} ({row[name + '_low']:.2f}–{row[name + '_high']:.2f})"
