"""``capruner export``: convert a checkpoint for a runtime."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capruner.cli.arguments import UserError, add_model, add_preprocessing
from capruner.files import replacing

if TYPE_CHECKING:
    from torch import nn

    from capruner.deploy.accuracy import Accuracy

HELP = """\
Export a pruned checkpoint: ONNX, MNN, safetensors, sparse safetensors, or 2:4 for a GPU.

ONNX and MNN files have a dynamic batch. Their outputs are compared with torch's before the file appears, and their zeros are counted; with --data-dir their
accuracy, too. ONNX files carry the preprocessing (input_size, mean, std, interpolation, crop_pct) as metadata, with --data-dir or --int8 the class names, too.
"""
EXAMPLE = """\
examples:
  capruner export output/EXPERIMENT/checkpoints/sparsity_0.75.safetensors --model deit_small_patch16_224 --output deit_small_75.onnx
  capruner export sparsity_0.9.safetensors --model deit_small_patch16_224 --output deit_small_90.mnn
  capruner export sparsity_0.9.safetensors --model deit_small_patch16_224 --format sparse --half --output deit_small_90.safetensors
  capruner export sparsity_0.75.safetensors --model deit_small_patch16_224 --int8 DATA --output deit_small_75_int8.onnx
  capruner export weights.pth --model resnet50d --model-kwargs num_classes=10 --output weights.safetensors
  capruner export sparsity_0.5.safetensors --model vit_base_patch16_224 --format semi_structured --output vit_base_2of4.safetensors
"""
ENDINGS = {".onnx": "onnx", ".mnn": "mnn", ".safetensors": "safetensors"}
LOSS = 0.5
"""Points of top-1 accuracy that a float32 file may lose: ties and near ties are rounded differently."""
FORMATS = {
    "onnx": ".onnx",
    "mnn": ".mnn",
    "safetensors": ".safetensors",
    "sparse": ".safetensors",
    "semi_structured": ".safetensors",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="weights, .safetensors or .pth")
    add_model(parser, required=True)
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: from the output's ending; sparse: safetensors with one bit per zero, read by capruner.load_sparse and all capruner commands; "
        "semi_structured: float16 safetensors, run as 2:4 on this machine's GPU, which is needed",
    )
    parser.add_argument("--half", action="store_true", help="--format sparse: store values in float16")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--data-dir",
        metavar="DATA",
        help="measure the accuracy of the ONNX or MNN file beside torch's on the images in DATA/val/<class>/; exit code 1 if it is lower",
    )
    data.add_argument(
        "--int8",
        metavar="DATA",
        help="quantise the ONNX file to int8 with images of DATA/train/<class>/; measure its accuracy beside float32 on those of DATA/val/<class>/",
    )
    parser.add_argument("--val-limit", type=int, default=1000, help="validation images to measure on (default 1000)")
    parser.add_argument(
        "--calibration-images", type=int, default=128, help="--int8: training images to measure ranges on (default 128)"
    )
    add_preprocessing(parser)
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Write the file and print what was checked; 1 if a float32 file is less accurate than torch."""
    kind = _format(args)
    from capruner.deploy.export import load_pruned

    model, _ = load_pruned(args.model, args.model_kwargs, args.checkpoint)
    if kind == "semi_structured":
        return _semi_structured(model, args.output)
    if kind == "sparse":
        return _sparse(model, args.output, args.half)
    if kind == "safetensors":
        _save(model, args.output)
        print(f"{_size(args.output)}; timm.create_model({args.model!r}, checkpoint_path=...) loads it")
        return 0
    return _graph(args, kind, model)


def _graph(args: argparse.Namespace, kind: str, model: nn.Module) -> int:
    """Write ONNX or MNN."""
    from capruner.deploy.export import to_mnn, to_onnx
    from capruner.vision import data as images

    folder = args.data_dir or args.int8
    train, val = images.open_splits(folder, "", model) if folder else (None, None)
    config = images.preprocessing(args, model)
    size = config["input_size"]
    properties = _properties(args.model, config, val)
    if args.int8:
        return _int8(args, model, config, properties, train, val)
    exported = to_mnn(model, args.output, size) if kind == "mnn" else to_onnx(model, args.output, size, properties)
    engine = "MNN" if kind == "mnn" else "onnxruntime"
    print(f"{_size(args.output)}, dynamic batch of {'×'.join(map(str, size))}, {exported.zeros:,} zeros")
    print(
        f"{engine} against torch, batches of 1 and 3: largest difference {exported.difference:.1e} of the largest output"
    )
    if not args.data_dir:
        return 0
    accuracy = _accuracy(args, config, val, {"torch": model, engine: args.output})
    lost = accuracy.top1["torch"] - accuracy.top1[engine]
    if lost > LOSS:
        print(f"FAIL: the file is {lost:.2f} points less accurate than torch")
    return int(lost > LOSS)


def _int8(
    args: argparse.Namespace, model: nn.Module, config: dict[str, Any], properties: dict[str, str], train: Any, val: Any
) -> int:
    from capruner.deploy.export import to_onnx
    from capruner.deploy.graphs import write_metadata
    from capruner.deploy.quantize import to_int8
    from capruner.vision.data import loader

    with tempfile.TemporaryDirectory(prefix="capruner-int8-") as folder:
        dense, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        to_onnx(model, dense, config["input_size"])
        zeros = to_int8(dense, small, loader(train, config, 8, 0, limit=args.calibration_images))
        write_metadata(small, properties)
        with replacing(args.output) as partial:
            shutil.copyfile(small, partial)
        print(
            f"{_size(args.output)}, {dense.stat().st_size / args.output.stat().st_size:.1f} times smaller than float32"
        )
        print(f"all {zeros:,} pruned weights are zero in int8, too")
        _accuracy(args, config, val, {"float32": dense, "int8": args.output})
    return 0


def _accuracy(
    args: argparse.Namespace, config: dict[str, Any], val: Any, forms: Mapping[str, nn.Module | Path]
) -> Accuracy:
    """Measure each form of the model on the same validation images, and print the result."""
    from capruner.deploy.accuracy import measure, outputs
    from capruner.vision.data import loader

    accuracy = measure(
        {name: outputs(form) for name, form in forms.items()}, loader(val, config, 16, 0, limit=args.val_limit)
    )
    parts = [f"{name} {top1:.2f} %" for name, top1 in accuracy.top1.items()]
    last = list(forms)[-1]
    print(
        f"top-1 on the same {accuracy.images:,} validation images: {', '.join(parts)}; equal predictions on {accuracy.agreement[last]:.2f} %"
    )
    return accuracy


def _properties(model: str, config: Mapping[str, Any], val: Any) -> dict[str, str]:
    """Metadata of an ONNX file: what a program needs to turn images into inputs, and outputs into names."""
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    values = {"model": model} | {key: config[key] for key in keys if key in config}
    classes = getattr(getattr(val, "reader", None), "class_to_idx", None)
    if classes:
        values["class_names"] = sorted(classes, key=classes.__getitem__)
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _format(args: argparse.Namespace) -> str:
    """The format to write, from ``--format`` or the ending of ``--output``."""
    kind: str | None = args.format or ENDINGS.get(args.output.suffix)
    if kind is None:
        raise UserError(f"--output {args.output}: unknown ending; use one of {', '.join(ENDINGS)}, or --format")
    if args.output.suffix != FORMATS[kind]:
        raise UserError(f"--output {args.output}: files of --format {kind} end in {FORMATS[kind]}")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    for flag, used, kinds in (
        ("--half", args.half, ("sparse",)),
        ("--data-dir", args.data_dir, ("onnx", "mnn")),
        ("--int8", args.int8, ("onnx",)),
    ):
        if used and kind not in kinds:
            raise UserError(f"{flag} is for --format {' or '.join(kinds)}, not {kind}")
    if args.val_limit < 1 or args.calibration_images < 1:
        raise UserError("--val-limit and --calibration-images must be positive")
    return kind


def _sparse(model: nn.Module, output: Path, half: bool) -> int:
    from capruner.deploy.sparse_file import save_sparse

    size = save_sparse(model, output, half)
    dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(f"{_size(output)}, {dense / size:.1f} times smaller than dense ({dense / 2**20:.1f} MiB)")
    print("capruner.load_sparse(path) expands it to a state dict; all capruner commands read it")
    return 0


def _semi_structured(model: nn.Module, output: Path) -> int:
    """Write plain float16 weights: the compressed form is specific to a GPU and a torch version, and only unpickling reads it back."""
    import torch

    from capruner.deploy.semi_structured import to_semi_structured, two_of_four

    fit, unfit = two_of_four(model)
    if fit and not torch.cuda.is_available():
        raise UserError(
            f"--format semi_structured runs 2:4 weights on a GPU with sparse tensor cores, and torch finds none here; {len(fit)} layers are 2:4. "
            "Run it on the machine with the GPU, or use --format safetensors and there "
            "capruner.deploy.semi_structured.to_semi_structured(model.half().cuda())"
        )
    model.half()
    layers = to_semi_structured(copy.deepcopy(model).cuda() if fit else model)
    _save(model, output)
    print(
        f"{_size(output)}, float16; {len(layers)} layers ran as 2:4 on this GPU, each product compared with the dense"
    )
    for name, why in unfit.items():
        print(f"stays dense: {name}, {why}")
    print("after loading: capruner.deploy.semi_structured.to_semi_structured(model.half().cuda())")
    return 0


def _save(model: nn.Module, output: Path) -> None:
    from safetensors.torch import save_file

    with replacing(output) as partial:
        save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, partial)


def _size(output: Path) -> str:
    return f"{output}: {output.stat().st_size / 2**20:.1f} MiB"
