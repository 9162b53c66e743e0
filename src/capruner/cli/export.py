"""``capruner export``: a checkpoint in the form that a runtime takes."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import TYPE_CHECKING

from capruner.cli.arguments import UserError, add_model
from capruner.files import replacing

if TYPE_CHECKING:
    from torch import nn

HELP = """\
Write a pruned checkpoint as ONNX, as plain safetensors, or check it as 2:4 on a GPU.

ONNX has a dynamic batch and is held against torch's outputs, through onnxruntime, before the file appears; its zeros are counted.
"""
EXAMPLE = """\
examples:
  capruner export output/EXPERIMENT/checkpoints/sparsity_0.75.safetensors --model deit_small_patch16_224 --output deit_small_75.onnx
  capruner export weights.pth --model resnet50d --model-kwargs num_classes=10 --output weights.safetensors
  capruner export sparsity_0.5.safetensors --model vit_base_patch16_224 --format semi_structured --output vit_base_2of4.safetensors
"""
FORMATS = ("onnx", "safetensors", "semi_structured")
ENDINGS = {".onnx": "onnx", ".safetensors": "safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="weights, .safetensors or .pth")
    add_model(parser, required=True)
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: from the output's ending; semi_structured: float16 weights, tried as 2:4 on this machine's GPU, which is needed",
    )
    parser.add_argument("--img-size", type=int, help="height and width of the input (default: the model's)")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Write the file and say what was checked."""
    kind = args.format or ENDINGS.get(args.output.suffix)
    if kind is None:
        raise UserError(
            f"--output {args.output}: the ending says no format; use one of {', '.join(ENDINGS)}, or --format"
        )
    wanted = ".onnx" if kind == "onnx" else ".safetensors"
    if args.output.suffix != wanted:
        raise UserError(f"--output {args.output}: the name of such a file ends in {wanted}")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    from capruner.export import load_pruned, to_onnx

    model, size = load_pruned(args.model, args.model_kwargs, args.checkpoint)
    if kind == "semi_structured":
        return _semi_structured(model, args.output)
    if kind == "safetensors":
        _save(model, args.output)
        print(f"{_size(args.output)}, timm.create_model({args.model!r}, checkpoint_path=...) loads it")
        return 0
    if args.img_size:
        size = (size[0], args.img_size, args.img_size)
    found = to_onnx(model, args.output, size)
    print(f"{_size(args.output)}, dynamic batch of {'×'.join(map(str, size))}, {found['zeros']:,} zeros")
    print(
        f"onnxruntime against torch, batches of 1 and 3: largest difference {found['difference']:.1e} of the largest output"
    )
    return 0


def _semi_structured(model: nn.Module, output: Path) -> int:
    """Plain float16 weights: the compressed form belongs to one kind of GPU and one torch, and torch reads it back only by running a pickle's code."""
    import torch

    from capruner.export import to_semi_structured, two_of_four

    fit, unfit = two_of_four(model)
    if fit and not torch.cuda.is_available():
        raise UserError(
            f"--format semi_structured tries 2:4 weights on a GPU with sparse tensor cores, and torch sees none here; {len(fit)} layers are 2:4. "
            "Run it where the GPU is, or use --format safetensors and there capruner.export.to_semi_structured(model.half().cuda())"
        )
    model.half()
    layers = to_semi_structured(copy.deepcopy(model).cuda() if fit else model)
    _save(model, output)
    print(
        f"{_size(output)}, float16; {len(layers)} layers ran as 2:4 on this GPU, each product compared with the dense"
    )
    for name, why in unfit.items():
        print(f"stays dense: {name}, {why}")
    print("after loading: capruner.export.to_semi_structured(model.half().cuda())")
    return 0


def _save(model: nn.Module, output: Path) -> None:
    """All of the file or none of it."""
    from safetensors.torch import save_file

    with replacing(output) as partial:
        save_file({name: value.contiguous().clone() for name, value in model.state_dict().items()}, partial)


def _size(output: Path) -> str:
    return f"{output}: {output.stat().st_size / 2**20:.1f} MiB"
