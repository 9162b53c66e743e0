"""``capruner shrink``: a smaller dense model out of a timm model."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capruner.cli.arguments import UserError, add_model, add_preprocessing, add_weights, check_weights

if TYPE_CHECKING:
    from torch import nn

HELP = """\
Make a timm model smaller and faster in every runtime: remove neurons, heads and channels.

Calibrates on the training images of a folder (DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg) or of a data set that timm knows, removes whole units, re-fits
the weights that remain, and measures accuracy before and after. The result is a dense model with smaller layers, no zeros and no special runtime.

Writes OUTPUT (safetensors) and OUTPUT's name with .json: what was removed and what it cost. capruner.load_shrunk(OUTPUT, timm.create_model(MODEL)) loads it,
and 'capruner export OUTPUT --model MODEL --output small.onnx' writes ONNX.
"""
EXAMPLE = """\
examples:
  capruner shrink --data-dir DATA --model deit_small_patch16_224 --pretrained --macs 0.7 --output deit_small_70.safetensors
  capruner shrink --data-dir DATA --model deit_small_patch16_224 --pretrained --latency 0.5 --distill-passes 2 --output fast.safetensors
  capruner shrink --data-dir DATA --model resnet50 --pretrained --macs 0.6 --units channels --recalibrate-bn 32 --output resnet50_60.safetensors
A first try: --macs 0.7. Lower it until accuracy falls, then add --distill-passes 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    what = parser.add_argument_group("what to shrink")
    add_model(what, required=True)
    add_weights(what)
    how = parser.add_argument_group("how")
    target = how.add_mutually_exclusive_group(required=True)
    target.add_argument("--macs", type=float, help="share of the multiply-adds that may remain, 0.5 for example")
    target.add_argument(
        "--latency",
        type=float,
        help="share of the time of one image that may remain, measured in torch on this machine, on an otherwise idle device",
    )
    how.add_argument(
        "--units",
        nargs="+",
        default=["neurons", "heads", "channels"],
        help="neurons of MLPs, heads of timm's attention, channels of convolutions (these need torch-pruning); default: all. What cannot be removed is "
        "listed with the reason",
    )
    how.add_argument("--exclude", nargs="+", default=[], help="modules, or re:PATTERN, whose units all remain")
    how.add_argument("--num-grads", type=int, default=512, help="gradients to calibrate from (default 512)")
    how.add_argument("--damp", type=float, default=0.01, help="on the diagonal of the Fisher matrices (default 0.01)")
    how.add_argument(
        "--recalibrate-bn",
        type=int,
        default=0,
        metavar="N",
        help="afterwards re-estimate BatchNorm statistics from N batches; reported apart (default 0)",
    )
    how.add_argument(
        "--distill-passes",
        type=float,
        default=0.0,
        metavar="N",
        help="afterwards train towards the dense network's outputs, for N passes over 4,096 of the calibration images, without labels; reported apart "
        "(default 0)",
    )
    how.add_argument("--seed", type=int, default=42)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)")
    source = parser.add_argument_group("data")
    source.add_argument("--data-dir", required=True, help="folder with train/ and val/, or the root of --dataset")
    source.add_argument(
        "--dataset", default="", help="a data set that timm knows, such as torch/cifar10 (default: folders)"
    )
    source.add_argument("-gb", "--gs-batch-size", type=int, default=16, help="images per gradient (default 16)")
    source.add_argument("-vb", "--val-batch-size", type=int, default=128, help="default 128")
    source.add_argument("--val-limit", type=int, help="evaluate on N images only, the same each time")
    source.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    add_preprocessing(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output", required=True, type=Path, help="file to write, FOLDER/NAME.safetensors")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Shrink, print the report, write the files; 0."""
    _check(args)
    import torch

    import capruner
    from capruner.vision import data as images
    from capruner.vision import evaluate, modeling, output

    device = modeling.pick_device(args.device)
    modeling.seed_everything(args.seed)
    model = modeling.build_model(args.model, args.model_kwargs, args.checkpoint, args.pretrained).to(device)
    train, val = images.open_splits(args.data_dir, args.dataset, model)
    config = images.preprocessing(args, model)
    modeling.check_forward(model, config["input_size"], args.model)

    def batches(size: int) -> Any:
        generator = torch.Generator().manual_seed(args.seed)
        return images.loader(train, config, size, args.workers, shuffle=True, generator=generator)

    def top1(network: nn.Module, what: str) -> float:
        split = images.loader(val, config, args.val_batch_size, args.workers, limit=args.val_limit)
        return evaluate.evaluate(network, split, device, what)["top1"]

    accuracy = {"dense": top1(model, "dense")}
    small = capruner.shrink(
        model,
        batches(args.gs_batch_size),
        example_inputs=torch.zeros(1, *config["input_size"], device=device),
        macs=args.macs,
        latency=args.latency,
        units=args.units,
        exclude=args.exclude,
        num_grads=args.num_grads,
        damp=args.damp,
    )
    accuracy["shrunk"] = top1(small.model, "shrunk")
    if args.recalibrate_bn and capruner.recalibrate_bn(small.model, batches(args.val_batch_size), args.recalibrate_bn):
        accuracy["BatchNorm re-estimated"] = top1(small.model, "BatchNorm re-estimated")
    if args.distill_passes:
        capruner.distill(small.model, model, batches(args.val_batch_size), passes=args.distill_passes)
        accuracy["distilled"] = top1(small.model, "distilled")
    small.save(args.output)
    summary = {
        "arguments": vars(args),
        "top1": accuracy,
        "costs": small.costs,
        "units": small.rows,
        "left_alone": [asdict(item) for item in small.left_alone],
    }
    output.write_json(args.output.with_suffix(".json"), json.loads(json.dumps(summary, default=str)))
    print(small.report())
    print("\ntop-1 %     " + ", ".join(f"{what} {value:.2f}" for what, value in accuracy.items()))
    print(
        f"\nwritten to {args.output}; capruner.load_shrunk({str(args.output)!r}, timm.create_model({args.model!r}, ...)) loads it"
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise :class:`UserError` for what can be seen before any work."""
    check_weights(args)
    for flag, share in (("--macs", args.macs), ("--latency", args.latency)):
        if share is not None and not 0 < share < 1:
            raise UserError(f"{flag} {share:g}: must be the share that remains, between 0 and 1; write 0.5 for half")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: the name of such a file ends in .safetensors")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    if not 0 <= args.distill_passes < math.inf:
        raise UserError(f"--distill-passes {args.distill_passes:g}: must be at least 0")
    for flag, count in (("--val-limit", args.val_limit), ("--gs-batch-size", args.gs_batch_size)):
        if count is not None and count < 1:
            raise UserError(f"{flag} {count}: must be at least 1")
