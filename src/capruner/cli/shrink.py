"""``capruner shrink``: a smaller dense model out of one of timm or Hugging Face."""

from __future__ import annotations

import argparse
import inspect
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capruner.cli import arguments
from capruner.cli.arguments import UserError

if TYPE_CHECKING:
    from torch import nn

    from capruner.config import Knob
    from capruner.shrinking.result import Shrunk

HELP = """\
Make a timm or Hugging Face model smaller and faster in every runtime: remove neurons, heads and channels.

Calibrates on the training images of a folder (DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg) or of a data set that timm knows, removes whole units, re-fits
the weights that remain, and measures accuracy before and after. The result is a dense model with smaller layers, no zeros and no special runtime.

Writes OUTPUT (safetensors; by default in the folder ./output), and beside it, ending in .json and .report.html, what was removed, what that saves and what it
costs in accuracy. capruner.load_shrunk(OUTPUT, timm.create_model(MODEL)) loads it, and 'capruner export OUTPUT --model MODEL --output small.onnx' writes ONNX.
"""
EXAMPLE = """\
examples:
  capruner shrink --data-dir DATA --model deit_small_patch16_224 --pretrained --macs 0.7
  capruner shrink --data-dir DATA --model deit_small_patch16_224 --pretrained --latency 0.5 --distill-passes 2 --output fast.safetensors
  capruner shrink --data-dir DATA --model resnet50 --pretrained --macs 0.6 --units channels --recalibrate-bn 32 --output resnet50_60.safetensors
A first try: --macs 0.7. Lower it until accuracy falls, then add --distill-passes 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from capruner.cli.knobs import add_knobs

    what = parser.add_argument_group("what to shrink")
    arguments.add_model(what, required=True)
    arguments.add_weights(what)
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
        help="neurons of MLPs, heads of attention, channels of convolutions (these need torch-pruning); default: all. What cannot be removed is "
        "listed with the reason",
    )
    how.add_argument(
        "--multiple-of",
        type=int,
        default=_default("multiple_of"),
        metavar="N",
        help="remove N channels at a time where their number is a multiple of N: other numbers are slow in onnxruntime (default %(default)s)",
    )
    add_knobs(how, _knobs(), defaults=True)
    how.add_argument(
        "--recalibrate-bn",
        type=int,
        default=0,
        metavar="N",
        help="afterwards re-estimate BatchNorm statistics from N batches; reported apart (default 0)",
    )
    arguments.add_seed_and_device(how)
    arguments.add_data(parser)
    arguments.add_preprocessing(parser)
    out = parser.add_argument_group("output")
    out.add_argument(
        "--output",
        type=Path,
        help="file to write, FOLDER/NAME.safetensors (default: output/MODEL-macs-0.7.safetensors, for example)",
    )
    parser.epilog = EXAMPLE


def _default(name: str) -> Any:
    """The default of an argument of ``capruner.shrink``."""
    from capruner import shrink

    return inspect.signature(shrink).parameters[name].default


def _knobs() -> list[Knob]:
    """The knobs that shrinking shares with pruning, with its own defaults and words."""
    from capruner import shrink
    from capruner.config import knobs
    from capruner.kinds import COUNT

    own = inspect.signature(shrink).parameters
    chosen = []
    for name, words in _WORDS.items():
        knob = replace(knobs()[name], help=words)
        if name in own:
            knob = replace(knob, default=own[name].default)
        if name == "num_grads":  # never "auto"
            knob = replace(knob, kind=COUNT)
        chosen.append(knob)
    return chosen


_WORDS = {
    "exclude": "modules, or re:PATTERN, whose units all remain",
    "num_grads": "gradients to calibrate from",
    "damp": "on the diagonal of the Fisher matrices, relative to its mean",
    "distill_passes": "afterwards train towards the dense network's outputs, for N passes over 4,096 of the calibration images, without labels; reported "
    "apart",
}


def run(args: argparse.Namespace) -> int:
    """Shrink, print the report, write the files; 0."""
    _check(args)
    import torch

    import capruner
    from capruner.vision import data as images
    from capruner.vision import evaluate, huggingface, modeling

    device = modeling.pick_device(args.device)
    modeling.seed_everything(args.seed)
    model = modeling.build_model(args.model, args.model_kwargs, args.checkpoint, args.pretrained).to(device)
    train, val = images.open_splits(args.data_dir, args.dataset, model)
    config = images.preprocessing(args, model)
    modeling.check_forward(model, config["input_size"], args.model)
    args.output.parent.mkdir(exist_ok=True)  # of the default

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
        multiple_of=args.multiple_of,
        num_grads=args.num_grads,
        damp=args.damp,
    )
    accuracy["shrunk"] = top1(small.model, "shrunk")
    if args.recalibrate_bn and capruner.recalibrate_bn(small.model, batches(args.val_batch_size), args.recalibrate_bn):
        accuracy["BatchNorm re-estimated"] = top1(small.model, "BatchNorm re-estimated")
    if args.distill_passes:
        capruner.distill(small.model, model, batches(args.val_batch_size), passes=args.distill_passes)
        accuracy["distilled"] = top1(small.model, "distilled")
    _write(args, small, accuracy)
    print(small.report())
    print("\ntop-1 %     " + ", ".join(f"{what} {value:.2f}" for what, value in accuracy.items()))
    dense = f"timm.create_model({args.model!r}, ...)"
    if huggingface.is_huggingface(args.model):
        dense = f"AutoModelForImageClassification.from_pretrained({args.model.removeprefix(huggingface.PREFIX)!r})"
    print(f"\nwritten to {args.output}; capruner.load_shrunk({str(args.output)!r}, {dense}) loads it")
    print(f"pictures in {_page(args)}")
    return 0


def _write(args: argparse.Namespace, small: Shrunk, accuracy: dict[str, float]) -> None:
    from capruner.files import replacing
    from capruner.report.shrunk import shrunk_page
    from capruner.text import printable
    from capruner.vision.output import write_json

    small.save(args.output)
    summary = {
        "arguments": vars(args),
        "top1": accuracy,
        "costs": small.costs,
        "units": small.rows,
        "left_alone": [asdict(item) for item in small.left_alone],
    }
    summary = json.loads(json.dumps(summary, default=str))
    write_json(args.output.with_suffix(".json"), summary)
    with replacing(_page(args)) as partial:
        partial.write_text(printable(shrunk_page(summary)), encoding="utf-8")


def _page(args: argparse.Namespace) -> Path:
    return args.output.with_suffix(".report.html")


def _check(args: argparse.Namespace) -> None:
    """Choose the default of ``--output``, and raise :class:`UserError` for what can be seen before any work."""
    arguments.check_weights(args)
    for flag, share in (("--macs", args.macs), ("--latency", args.latency)):
        if share is not None and not 0 < share < 1:
            raise UserError(f"{flag} {share:g}: must be the share that remains, between 0 and 1; write 0.5 for half")
    arguments.check_counts(args, "val_limit", "gs_batch_size", "multiple_of")
    if args.output is None:
        args.output = _default_output(args)
    elif args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output}: the name of such a file ends in .safetensors")
    elif not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")


def _default_output(args: argparse.Namespace) -> Path:
    from capruner.vision.output import model_label

    target = f"latency-{args.latency:g}" if args.macs is None else f"macs-{args.macs:g}"
    path = Path("output") / f"{model_label(args.model)}-{target}.safetensors"
    if path.exists():
        raise UserError(f"{path} exists already; name another file with --output, or this one to replace it")
    return path
