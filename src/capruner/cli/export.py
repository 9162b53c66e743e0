"""``capruner export``: a checkpoint in the form that a runtime takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from capruner.cli.arguments import KeyValues, UserError

HELP = """\
Write a pruned checkpoint as ONNX, as plain safetensors, or check it as 2:4 on a GPU.

ONNX has a dynamic batch and is held against torch's outputs, through onnxruntime, before the file appears; its zeros are counted.
"""
EXAMPLE = """\
examples:
  capruner export output/EXPERIMENT/checkpoints/sparsity_0.75.safetensors --model deit_small_patch16_224 --output deit_small_75.onnx
  capruner export weights.pth --model resnet50d --model-kwargs num_classes=10 --output weights.safetensors
  capruner export sparsity_0.5.safetensors --model vit_base_patch16_224 --format semi_structured --output vit_base_2of4.pt
"""
FORMATS = {"onnx": ".onnx", "safetensors": ".safetensors", "semi_structured": ".pt"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="weights, .safetensors or .pth")
    parser.add_argument("--model", required=True, help="timm model name")
    parser.add_argument(
        "--model-kwargs",
        nargs="*",
        action=KeyValues,
        default={},
        metavar="KEY=VALUE",
        help="arguments of timm.create_model",
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: from the output's ending; semi_structured: float16 weights compressed for sparse tensor cores (needs such a GPU)",
    )
    parser.add_argument("--img-size", type=int, help="height and width of the input (default: the model's)")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Write the file and say what was checked."""
    import torch
    from safetensors.torch import save_file

    from capruner.export import load_pruned, to_onnx, to_semi_structured

    endings = {ending: name for name, ending in FORMATS.items()}
    kind = args.format or endings.get(args.output.suffix)
    if kind is None:
        raise UserError(
            f"--output {args.output}: the ending says no format; use one of {', '.join(endings)}, or --format"
        )
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    model, size = load_pruned(args.model, args.model_kwargs, args.checkpoint)
    if args.img_size:
        size = (size[0], args.img_size, args.img_size)
    if kind == "onnx":
        found = to_onnx(model, args.output, size)
        print(
            f"{args.output}: {found['bytes'] / 2**20:.1f} MiB, dynamic batch of {'×'.join(map(str, size))}, {found['zeros']:,} zeros"
        )
        print(
            f"onnxruntime against torch, batches of 1 and 3: largest difference {found['difference']:.1e} of the largest output"
        )
    elif kind == "safetensors":
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, args.output)
        print(
            f"{args.output}: {args.output.stat().st_size / 2**20:.1f} MiB, timm.create_model({args.model!r}, checkpoint_path=...) loads it"
        )
    else:
        if not torch.cuda.is_available():
            raise UserError(
                "--format semi_structured compresses on a GPU with sparse tensor cores, and there is none; capruner verify --pattern 2:4 checks without"
            )
        layers = to_semi_structured(model.half().cuda())
        torch.save(model.state_dict(), args.output)
        print(f"{args.output}: {len(layers)} layers compressed, each equal to its dense product")
    return 0
