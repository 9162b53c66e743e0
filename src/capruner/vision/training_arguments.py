"""The command line of ``sparse_training.py``: timm's flags where it has them, and those of gradual pruning."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from capruner.cli import arguments as cli
from capruner.recipes.catalog import locate
from capruner.vision import original_flags, output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags, in groups."""
    parser.add_argument("data_positional", nargs="?", metavar="DIR", help="the data, as --data-dir")
    parser.add_argument(
        "-c", "--config", help="YAML with any of these flags as keys; flags of the command line take precedence"
    )
    for add in (_pruning, _data, _model, _training, _schedule, _augmentation, _device, _output):
        add(parser)
    cli.add_preprocessing(parser)
    original_flags.add_idle(parser, original_flags.TRAINING)
    original_flags.add_idle(parser, original_flags.GONE, original_flags.Gone)


def _pruning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--sparseml-recipe",
        help="YAML file of modifiers that says what is pruned, how far and when, or a name that 'capruner recipes list gradual' prints. Its end is the number "
        "of epochs; where it sets learning rates, --lr and --sched are not used",
    )
    cli.add_engine(group)
    group.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        metavar="S",
        help="a ladder such as 0.4 0.6 0.75 0.9: the recipe's first update goes to the first of them, and so on, instead of the recipe's interpolation; "
        "updates after the last one change nothing",
    )
    cli.add_gradient_batch(group)
    group.add_argument(
        "--gs-aug",
        action="store_true",
        help="draw gradient samples from augmented images (default: evaluation transforms)",
    )


def _data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", help="folder with train/<class>/* and val/<class>/*, or the root of --dataset")
    group.add_argument("--dataset", default="", help=cli.DATASET)
    group.add_argument(
        "-b", "--batch-size", type=int, default=128, help="training images per process and step (default 128)"
    )
    group.add_argument("-vb", "--val-batch-size", "--validation-batch-size", type=int, help="default: as --batch-size")
    group.add_argument("--val-limit", type=int, help="evaluate on this many images only, the same each time")
    group.add_argument("-j", "--workers", type=int, default=4, help="loader processes per process (default 4)")
    group.add_argument(
        "--pin-mem", action="store_true", help="pinned memory: faster copies to the GPU without the prefetcher"
    )
    group.add_argument("--no-prefetcher", action="store_true", help="normalise images on the CPU")


def _model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    cli.add_model(group)
    cli.add_weights(group)
    group.add_argument("--num-classes", type=int, help="outputs of the model")
    group.add_argument("--drop", type=float, help="dropout rate")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group.add_argument(
        "--grad-checkpointing", action="store_true", help="less memory for more time: recompute activations"
    )
    group.add_argument("--channels-last", action="store_true", help="NHWC memory layout")
    group.add_argument("--model-ema", action="store_true", help="keep an average of the weights, and evaluate it too")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="default 0.9998")
    group.add_argument("--model-ema-warmup", action="store_true", help="let the decay grow to its value")


def _training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument("--opt", default="sgd", help="any optimizer of timm (default sgd)")
    group.add_argument("--opt-eps", type=float)
    group.add_argument("--opt-betas", type=float, nargs="+")
    group.add_argument("--opt-args", "--opt-kwargs", nargs="*", action=cli.KeyValues, default={}, metavar="KEY=VALUE")
    group.add_argument("--momentum", type=float, default=0.9, help="default 0.9")
    group.add_argument("--weight-decay", type=float, default=2e-5, help="default 2e-5")
    group.add_argument("--layer-decay", type=float, help="learning rate decay from layer to layer")
    group.add_argument("--clip-grad", type=float, help="default: gradients are not clipped")
    group.add_argument("--clip-mode", default="norm", choices=["norm", "value", "agc"])
    group.add_argument(
        "--grad-accum-steps",
        type=int,
        default=1,
        help="batches per optimizer step; the recipe counts steps, not batches",
    )


def _schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("length and learning rate")
    group.add_argument("--epochs", type=int, help="default: until the recipe ends")
    group.add_argument(
        "--sched",
        default="cosine",
        help="timm's scheduler (default cosine); off where the recipe sets the learning rate",
    )
    group.add_argument(
        "--sched-on-updates", action="store_true", help="change the learning rate at each step, not epoch"
    )
    group.add_argument("--lr", type=float, help="default: --lr-base scaled to the batch size")
    group.add_argument("--lr-base", type=float, default=0.1, help="for a batch of --lr-base-size (default 0.1)")
    group.add_argument("--lr-base-size", type=int, default=256, help="default 256")
    group.add_argument(
        "--lr-base-scale",
        default="",
        choices=["", "linear", "sqrt"],
        help="default: sqrt for adaptive optimizers, else linear",
    )
    group.add_argument("--lr-noise", type=float, nargs="+")
    group.add_argument("--lr-noise-pct", type=float, default=0.67)
    group.add_argument("--lr-noise-std", type=float, default=1.0)
    group.add_argument("--lr-cycle-mul", type=float, default=1.0)
    group.add_argument("--lr-cycle-decay", type=float, default=0.5)
    group.add_argument("--lr-cycle-limit", type=int, default=1)
    group.add_argument("--lr-k-decay", type=float, default=1.0)
    group.add_argument("--lr-decay-fn", help="decay of wsd and rsqrt (default: timm's)")
    group.add_argument("--lr-stable-timescale", type=float, help="epochs, of rsqrt (default: --warmup-epochs)")
    group.add_argument("--warmup-lr", type=float, default=1e-5)
    group.add_argument("--min-lr", type=float, default=0.0)
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[90, 180, 270])
    group.add_argument(
        "--decay-epochs",
        type=float,
        help="interval of step, length of the decay of wsd and rsqrt (default: timm's, 90 epochs for step, a fifth of the run for the others)",
    )
    group.add_argument("--warmup-epochs", type=int, default=0, help="default 0: pruning starts from trained weights")
    group.add_argument("--warmup-prefix", action="store_true")
    group.add_argument("--cooldown-epochs", type=int, default=0)
    group.add_argument("--patience-epochs", type=int, default=10)
    group.add_argument("--decay-rate", "--dr", type=float, default=0.1)


def _augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation and loss")
    group.add_argument("--no-aug", action="store_true", help="evaluation transforms for training too")
    group.add_argument("--train-crop-mode", help="rrc, rkrc or rkrr")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="random crop area (default 0.08 1.0)")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="random crop aspect")
    group.add_argument("--hflip", type=float, default=0.5)
    group.add_argument("--vflip", type=float, default=0.0)
    group.add_argument("--color-jitter", type=float, default=0.4)
    group.add_argument("--color-jitter-prob", type=float)
    group.add_argument("--grayscale-prob", type=float, default=0.0)
    group.add_argument("--gaussian-blur-prob", type=float, default=0.0)
    group.add_argument("--aa", help="AutoAugment policy, for example rand-m9-mstd0.5-inc1")
    group.add_argument("--train-interpolation", default="random", help="bilinear, bicubic or random (default)")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing")
    group.add_argument("--remode", default="pixel")
    group.add_argument("--recount", type=int, default=1)
    group.add_argument(
        "--aug-repeats", type=int, default=0, help="repeated augmentation over several processes; off with one"
    )
    group.add_argument("--mixup", type=float, default=0.0)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--cutmix-minmax", type=float, nargs=2)
    group.add_argument("--mixup-prob", type=float, default=1.0)
    group.add_argument("--mixup-switch-prob", type=float, default=0.5)
    group.add_argument("--mixup-mode", default="batch", choices=["batch", "pair", "elem"])
    group.add_argument("--mixup-off-epoch", type=int, default=0, help="no mixup from this epoch on (default: never)")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing (default 0.1)")
    group.add_argument("--bce-loss", action="store_true", help="binary cross entropy")
    group.add_argument("--bce-target-thresh", type=float)


def _device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "device and processes",
        "Several processes: torchrun --nproc-per-node=N --no-python capruner train ...",
    )
    cli.add_seed_and_device(group)
    group.add_argument(
        "--amp", "--native-amp", action="store_true", help="mixed precision (gradient samples stay in full precision)"
    )
    group.add_argument(
        "--amp-dtype",
        default="",
        choices=["", "float16", "bfloat16"],
        help="default: float16 on a GPU, bfloat16 on a CPU",
    )
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm statistics over all processes")
    group.add_argument(
        "--dist-bn",
        default="reduce",
        choices=["", "broadcast", "reduce"],
        help="make BatchNorm statistics equal after each epoch (default reduce)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        help="seconds until a process that waits for another gives up (default 1800)",
    )
    group.add_argument(
        "--local-rank", type=int, help="given by old launchers; the environment variable LOCAL_RANK counts"
    )


def _output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--output", default="output", help="parent folder (default ./output)")
    group.add_argument("--experiment", default="", help="name of the folder in it (default: model and recipe)")
    group.add_argument(
        "--resume",
        nargs="?",
        const="last",
        help="continue a stopped run: 'last' (the experiment's own last.pt; a fresh start where there is none yet) or a file",
    )
    group.add_argument(
        "--checkpoint-freq",
        type=int,
        default=-1,
        metavar="N",
        help="keep the weights of each Nth epoch (default: only the best per sparsity)",
    )
    group.add_argument("--save-last", action="store_true", help="also write the final weights, last.safetensors")
    group.add_argument("--log-sparsity", action="store_true", help="print the sparsity of each layer at each update")
    group.add_argument(
        "--log-param-histogram", action="store_true", help="histograms of the remaining weights, to Weights & Biases"
    )
    cli.add_wandb(group)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """:func:`parse_with` a new parser."""
    parser = cli.Parser()
    add_arguments(parser)
    return parse_with(parser, argv)


def parse_with(parser: cli.Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``argv``; values of ``--config`` apply where the command line sets none.

    Raises:
        UserError: a missing flag, an unknown key of the configuration, an invalid value.
    """
    first = parser.parse_args(argv)
    args = first
    if first.config:
        args = parser.parse_args(argv, parser.parse_args(_config_flags(parser, first.config)))
    args.data_dir = args.data_dir or args.data_positional
    del args.data_positional
    for name in ("data_dir", "model", "sparseml_recipe"):
        if not getattr(args, name):
            raise cli.UserError(f"{cli.flag(name)} is missing; --help shows all flags")
    _check(args)
    args.sparseml_recipe = locate(args.sparseml_recipe)
    if args.num_classes is not None:
        args.model_kwargs = args.model_kwargs | {"num_classes": args.num_classes}
    for flag, name in (("drop", "drop_rate"), ("drop_path", "drop_path_rate")):
        if getattr(args, flag) is not None:
            args.model_kwargs = args.model_kwargs | {name: getattr(args, flag)}
    args.val_batch_size = args.val_batch_size or args.batch_size
    if not args.experiment:
        recipe = Path(args.sparseml_recipe)
        args.experiment = f"{output.model_label(args.model)}-{recipe.parent.name}-{recipe.stem}"
    return args


def _check(args: argparse.Namespace) -> None:
    cli.check_sparsities(args.sparsities or [])
    if args.sparsities and sorted(args.sparsities) != args.sparsities:
        raise cli.UserError(
            f"--sparsities {' '.join(map(str, args.sparsities))}: must ascend; pruned weights do not come back"
        )
    cli.check_counts(args, "batch_size", "gs_batch_size", "grad_accum_steps", "epochs")
    if args.timeout <= 0:
        raise cli.UserError(f"--timeout must be more than 0 seconds, got {args.timeout:g}")
    if args.log_param_histogram and not args.log_wandb:
        raise cli.UserError("--log-param-histogram draws in Weights & Biases; add --log-wandb")
    if uses_mixup(args) and args.batch_size % 2:
        raise cli.UserError(
            f"--mixup and --cutmix mix images in pairs; --batch-size must be even, got {args.batch_size}"
        )


def uses_mixup(args: argparse.Namespace) -> bool:
    """Whether images are mixed."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def _config_flags(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The keys of a configuration file as flags, so that they are checked like those."""
    shipped = Path(str(files("capruner.vision") / "configs" / f"{path}.yaml"))
    if not Path(path).is_file() and shipped.is_file():
        path = str(shipped)
    if not Path(path).is_file():
        names = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.yaml")))
        raise cli.UserError(f"--config {path}: no such file; shipped ones are {names}")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {}
    except yaml.YAMLError as error:
        raise cli.UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise cli.UserError(f"{path} must hold 'key: value' lines, it holds a {type(content).__name__}")
    known = {
        flag[2:].replace("-", "_"): a for a in parser._actions for flag in a.option_strings if flag.startswith("--")
    }
    for unwanted in ("help", "config", "debug"):
        del known[unwanted]
    flags: list[str] = []
    for key, value in content.items():
        action = known.get(str(key).replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(str(key), known, n=3)
            raise cli.UserError(
                f"{path}: unknown key {key!r}{f'; near: {chr(44).join(near)}' if near else '; --help shows all flags'}"
            )
        flag = max(action.option_strings, key=len)
        if (value == "" and action.default in (None, "")) or original_flags.asks_for_nothing(action, value):
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise cli.UserError(f"{path}: {key} must be true or false, got {value!r}")
            flags += [flag] if value else []
        elif isinstance(value, dict):
            flags += [flag, *(f"{k}={v!r}" for k, v in value.items())]
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [f"{flag}={value}"]
    return flags
