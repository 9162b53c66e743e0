"""The flags of one-shot pruning, for the script and for ``capruner prune``; a recipe from a few of them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from capruner.cli import arguments as cli
from capruner.config import PruneConfig
from capruner.methods import METHODS
from capruner.patterns import parse_mask_type
from capruner.recipes import one_shot as recipes
from capruner.recipes.catalog import locate
from capruner.recipes.document import Modifier
from capruner.recipes.one_shot import OneShot
from capruner.vision import output

ENGINES = ("native", "sparseml")
MODIFIERS = {
    "cap": "CAPruningModifier",
    "fast_cap": "FastCAPruningModifier",
    "obs": "OBSPruningModifier",
    "magnitude": "GlobalMagnitudePruningModifier",
}
# What stands in for a recipe, and each flag's default by method; absent: the method has no such knob.
DEFAULTS: dict[str, dict[str, Any]] = {
    "num_grads": dict.fromkeys(("cap", "fast_cap", "obs"), PruneConfig.num_grads),
    "damp": {"cap": None, "fast_cap": METHODS["fast_cap"].default_damp, "obs": 1e-6},
    "fisher_block_size": {"cap": None, "fast_cap": None, "obs": 192},
    "mask_type": dict.fromkeys(MODIFIERS, "unstructured"),
    "params": dict.fromkeys(MODIFIERS, "__ALL_PRUNABLE__"),
    "num_recomputations": {"cap": 1, "fast_cap": 1},
    "skip_unsupported": {"cap": False, "fast_cap": False},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of one-shot pruning."""
    what = parser.add_argument_group("what to prune")
    cli.add_model(what, required=True)
    what.add_argument("--checkpoint", default="", help="weights to start from (.safetensors or .pth)")
    what.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--sparseml-recipe",
        help="YAML file with one pruning modifier, or a name that 'capruner recipes list one_shot' prints (default: the flags below)",
    )
    how.add_argument(
        "--engine",
        choices=ENGINES,
        help="who carries out a recipe: capruner itself, or SparseML (default: SparseML for recipes with modifiers of its own, where it can be imported)",
    )
    how.add_argument(
        "--sparsities",
        type=float,
        nargs="*",
        default=[],
        help="shares of weights to remove, 0.5 0.9 say (default: the recipe's; without one 0.5, or what the mask type means)",
    )
    how.add_argument(
        "--recalibrate-bn",
        type=int,
        default=0,
        metavar="N",
        help="also report accuracy after re-estimating BatchNorm statistics from N batches",
    )
    how.add_argument(
        "--gradients",
        choices=("batch", "sample"),
        help="CAP, FastCAP: one gradient from each batch or from each image (default: the recipe's)",
    )
    how.add_argument(
        "--labels",
        choices=("data", "model"),
        help="CAP, FastCAP: calibrate with the data's labels, or draw labels from the model itself (default: the recipe's)",
    )
    how.add_argument(
        "--distill-passes",
        type=float,
        metavar="N",
        help="after pruning train towards the dense network's outputs, for N passes over 4,096 of the calibration images, without labels; pruned weights stay "
        "zero (default: the recipe's, or none)",
    )
    how.add_argument(
        "--on-bad-batch",
        choices=("raise", "skip"),
        help="CAP, FastCAP: stop at a batch with NaN or Inf, or leave it out and count it (default: the recipe's)",
    )
    how.add_argument(
        "--state-dir",
        metavar="FOLDER",
        help="CAP, FastCAP: save the calibration here every two minutes or so; killed and started again with the same arguments, the script goes on "
        "from there to the same result. Takes up to twice the memory of the Fisher blocks; deleted at the end (default: the recipe's "
        "traces_backup_dir, or none)",
    )
    how.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="CAP: memory for Fisher blocks and gradients, 8GiB say; layers are calibrated in groups that fit, with two passes over the calibration "
        "images for each (default: the recipe's, or no limit)",
    )
    how.add_argument(
        "--allocate-by",
        choices=("weights", "macs"),
        default="weights",
        help="CAP: remove what costs the least loss, or (macs) the least loss per multiply-add saved: convolutional networks then need fewer multiply-adds "
        "at the same accuracy, at a lower sparsity (default weights)",
    )
    how.add_argument("--seed", type=int, default=42)
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: the GPU if there is one)")
    _recipe_arguments(parser)
    source = parser.add_argument_group("data")
    source.add_argument("--data-dir", required=True, help="folder with train/ and val/, or the root of --dataset")
    source.add_argument(
        "--dataset", default="", help="a data set that timm knows, torch/cifar10 say (default: image folders)"
    )
    source.add_argument("-gb", "--gs-batch-size", type=int, default=16, help="images per gradient (default 16)")
    source.add_argument(
        "--gs-aug", action="store_true", help="calibrate on augmented images (default: evaluation transforms)"
    )
    source.add_argument("-vb", "--val-batch-size", type=int, default=128, help="default 128")
    source.add_argument("--val-limit", type=int, help="evaluate on so many images only, the same each time")
    source.add_argument("--workers", type=int, default=2, help="loader processes (default 2)")
    cli.add_preprocessing(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--output", default="output", help="parent folder (default ./output)")
    out.add_argument("--experiment", default="", help="name of the folder in it (default: model and recipe)")
    out.add_argument("--overwrite", action="store_true", help="replace the finished run that the folder holds")
    out.add_argument("--save-model", action="store_true", help="write a checkpoint per sparsity")
    out.add_argument(
        "--log-wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline needs no account)"
    )


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("instead of a recipe (what they make is written to the output as recipe.yaml)")
    group.add_argument(
        "--method",
        choices=MODIFIERS,
        help="cap: correlation-aware, the most accurate; fast_cap: one Fisher matrix per layer, quicker; to compare with: "
        "obs (WoodFisher), magnitude (default cap)",
    )
    group.add_argument("--num-grads", type=int, help=f"gradients to calibrate from (default {PruneConfig.num_grads})")
    group.add_argument(
        "--damp",
        type=float,
        help="on the diagonal of the Fisher matrix (default: 0.01 of each block's mean diagonal; fast_cap 0.5 of the layer's; obs 1e-6)",
    )
    group.add_argument(
        "--fisher-block-size",
        type=int,
        help="weights per Fisher block (default: the largest that cuts a layer's rows evenly, up to 192, or 512 as long as 4 GiB hold all; obs 192)",
    )
    group.add_argument(
        "--num-recomputations",
        type=int,
        metavar="N",
        help="CAP, FastCAP: climb to each sparsity in N steps, the same share of what is left leaving at each, with a fresh calibration of --num-grads "
        "gradients for every step: better above 95 %%, N times the work (default 1)",
    )
    group.add_argument("--mask-type", help="unstructured (default), 2:4 or another N:M, block4")
    group.add_argument(
        "--params",
        nargs="+",
        help="parameters or modules to prune, or re:PATTERN (default __ALL_PRUNABLE__: the weights of all linear layers)",
    )
    group.add_argument(
        "--skip-unsupported",
        action="store_true",
        default=None,
        help="leave layers dense that cannot hold the mask type, an image's three input channels for 2:4 say",
    )


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """``args`` when they make sense together, with the experiment's name filled in.

    Raises:
        UserError: they do not.
    """
    wrong = [s for s in args.sparsities if not 0 <= s < 1]
    if wrong:
        raise cli.UserError(f"--sparsities {' '.join(map(str, wrong))}: must lie in [0, 1); write 0.9 for 90 %")
    if args.val_limit is not None and args.val_limit < 1:
        raise cli.UserError(f"--val-limit {args.val_limit}: must be at least 1")
    if args.distill_passes is not None and not 0 <= args.distill_passes < math.inf:
        raise cli.UserError(f"--distill-passes {args.distill_passes:g}: must be at least 0")
    given = [key for key in ("method", *DEFAULTS) if getattr(args, key) is not None]
    if args.sparseml_recipe and given:
        flags = ", ".join(_flag(key) for key in given)
        raise cli.UserError(f"{flags} and --sparseml-recipe: a recipe says these things itself; leave one of them out")
    if args.engine == "sparseml" and not args.sparseml_recipe:
        raise cli.UserError("--engine sparseml is about recipes: give --sparseml-recipe, or leave it out")
    if args.sparseml_recipe:
        args.sparseml_recipe = locate(args.sparseml_recipe)
        name = f"{Path(args.sparseml_recipe).parent.name}-{Path(args.sparseml_recipe).stem}"
    else:
        name = args.method = args.method or "cap"
    args.experiment = args.experiment or f"{output.model_label(args.model)}-{name}"
    return args


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def one_shot(args: argparse.Namespace) -> OneShot:
    """What the flags that stand in for a recipe ask for.

    Raises:
        UserError: a flag that the method does not know.
        ValueError: no such mask type; another value that cannot be.
    """
    return recipes.one_shot(Modifier(*_modifier(args)))


def recipe_text(args: argparse.Namespace) -> str:
    """The same as a recipe."""
    name, values = _modifier(args)
    lines = [f"      {key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(["# Made from the flags of the command line.", "modifiers:", f"  - !{name}", *lines, ""])


def _modifier(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    idle = [_flag(key) for key in DEFAULTS if getattr(args, key) is not None and args.method not in DEFAULTS[key]]
    if idle:
        raise cli.UserError(f"{', '.join(idle)} means nothing to --method {args.method}; leave it out")
    values = {
        key: default[args.method] if getattr(args, key) is None else getattr(args, key)
        for key, default in DEFAULTS.items()
        if args.method in default
    }
    pattern = parse_mask_type(values["mask_type"])
    sparsity = args.sparsities[-1] if args.sparsities else 0.5 if pattern.sparsity is None else pattern.sparsity
    name, globally = MODIFIERS[args.method], pattern.n_m is None
    if args.method == "magnitude":
        # A pattern is decided in each layer.
        name = name if pattern.group == 1 else "MagnitudePruningModifier"
        if pattern.group == 1:
            del values["mask_type"]
    elif args.method != "fast_cap":  # which prunes each layer alike, as published
        values["global_sparsity"] = globally
    if values.get("num_recomputations", 1) != 1:
        values["recomputation_inter_func"] = "geometric"
    values |= {"init_sparsity": sparsity, "final_sparsity": sparsity}
    return name, values | {"start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
