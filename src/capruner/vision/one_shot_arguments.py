"""Flags of one-shot pruning, and the recipe or :class:`capruner.PruneConfig` that they describe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from capruner.cli import arguments as cli
from capruner.cli.arguments import flag
from capruner.cli.knobs import add_knobs, given
from capruner.config import PruneConfig, knobs
from capruner.core.patterns import parse_mask_type
from capruner.methods import MethodName
from capruner.recipes.catalog import locate
from capruner.recipes.make import MODIFIERS
from capruner.recipes.one_shot import KINDS, OneShot
from capruner.vision import original_flags, output

PUBLISHED: dict[str, dict[str, Any]] = {"obs": {"damp": 1e-6, "fisher_block_size": 192}}
"""Published constants of WoodFisher, a baseline; they replace the defaults of the knobs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of one-shot pruning."""
    what = parser.add_argument_group("what to prune")
    cli.add_model(what, required=True)
    cli.add_weights(what)
    what.add_argument(
        "--params",
        nargs="+",
        help="parameters or modules to prune, re:PATTERN, or __BLOCKS__: all but stem and head (default __ALL_PRUNABLE__: the weights of all linear, "
        "convolution, attention and recurrent layers)",
    )
    _add_how(parser.add_argument_group("how"))
    group = parser.add_argument_group("knobs of capruner.prune; beside a recipe they take precedence over its values")
    add_knobs(group, [knob for name, knob in knobs().items() if name != "costs"])
    cli.add_data(parser).add_argument(
        "--gs-aug", action="store_true", help="calibrate on augmented images (default: evaluation transforms)"
    )
    cli.add_preprocessing(parser)
    _add_output(parser.add_argument_group("output"))
    original_flags.add_idle(parser, original_flags.ONE_SHOT)


def _add_how(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--sparseml-recipe",
        help="YAML file with one pruning modifier, or a name that 'capruner recipes list one_shot' prints (default: the flags below)",
    )
    cli.add_engine(group)
    group.add_argument(
        "--sparsities",
        type=float,
        nargs="*",
        default=[],
        help="fractions of weights to prune, for example 0.5 0.9 (default: the recipe's; without one 0.5, or that of the mask type)",
    )
    group.add_argument(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help="instead of --sparsities: find the largest sparsity at which top-1 falls by at most POINTS, by bisection over one calibration. Decided on "
        "training images that the calibration does not see (--held-out); the validation images are looked at once, for the sparsity found",
    )
    group.add_argument(
        "--held-out",
        type=int,
        metavar="N",
        help="with --max-drop: training images to decide on (default: 2000, but at most a fifth of them)",
    )
    group.add_argument(
        "--recalibrate-bn",
        type=int,
        default=0,
        metavar="N",
        help="also report accuracy after re-estimating BatchNorm statistics from N batches",
    )
    group.add_argument(
        "--state-dir",
        metavar="FOLDER",
        help="save the calibration here every two minutes; after an interruption the same command resumes with the same result. Takes up to twice the "
        "memory of the Fisher blocks; deleted at the end (default: the recipe's traces_backup_dir, or none)",
    )
    group.add_argument(
        "--allocate-by",
        choices=("weights", "macs"),
        default="weights",
        help="cap, obs: prune by predicted loss, or (macs) by predicted loss per multiply-add saved, which gives convolutional networks fewer "
        "multiply-adds at the same accuracy, at a lower sparsity (default weights)",
    )
    cli.add_seed_and_device(group)


def _add_output(group: argparse._ActionsContainer) -> None:
    group.add_argument("--output", "--output-dir", default="output", help="parent folder (default ./output)")
    group.add_argument("--experiment", default="", help="name of the folder in it (default: model and recipe)")
    group.add_argument("--overwrite", action="store_true", help="replace the finished run in that folder")
    group.add_argument(
        "--save-model",
        nargs="?",
        const="dense",
        choices=("dense", "sparse"),
        help="write a checkpoint per sparsity; sparse: with one bit per zero, for capruner.load_sparse and all capruner commands",
    )
    cli.add_wandb(group)


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Validate ``args`` and fill in the experiment's name; raise ``UserError`` for invalid values, or flags that exclude each other."""
    cli.check_sparsities(args.sparsities)
    if args.max_drop is not None:
        if args.sparsities:
            raise cli.UserError("--max-drop chooses the sparsity; leave --sparsities out")
        if not 0 <= args.max_drop < 100:
            raise cli.UserError(f"--max-drop {args.max_drop:g}: points of top-1 accuracy, from 0 to 100")
        cli.check_counts(args, "held_out")
        if args.engine == "sparseml":
            raise cli.UserError("--max-drop is not supported by --engine sparseml; leave one of them out")
    cli.check_counts(args, "val_limit")
    cli.check_weights(args)
    if args.sparseml_recipe:
        said = [flag(key) for key in ("method", "params") if getattr(args, key) is not None]
        if said:
            raise cli.UserError(
                f"{', '.join(said)}: --sparseml-recipe {args.sparseml_recipe} decides this; leave one of them out"
            )
        args.sparseml_recipe = locate(args.sparseml_recipe)
        name = f"{Path(args.sparseml_recipe).parent.name}-{Path(args.sparseml_recipe).stem}"
    else:
        if args.engine == "sparseml":
            raise cli.UserError("--engine sparseml needs --sparseml-recipe; leave it out, or give a recipe")
        name = args.method = args.method or PruneConfig.method
    args.experiment = args.experiment or f"{output.model_label(args.model)}-{name}"
    return args


def one_shot(args: argparse.Namespace) -> OneShot:
    """The pruning that the flags describe without a recipe.

    Raises:
        UserError: a knob that the method does not read.
        ValueError: knobs that exclude each other.
    """
    method: MethodName = args.method
    said = {name: value for name, value in given(args).items() if name != "method"}
    idle = [flag(name) for name in said if method not in knobs()[name].methods]
    if idle:
        raise cli.UserError(f"{', '.join(idle)}: not supported by --method {method}; leave it out")
    values = PUBLISHED.get(method, {}) | said
    if values.get("num_recomputations", 1) > 1:
        values = {"recomputation_inter_func": "geometric"} | values
    config = PruneConfig(method=method, **values)
    pattern = config.pattern
    sparsity = args.sparsities[-1] if args.sparsities else 0.5 if pattern.sparsity is None else pattern.sparsity
    # N:M, and groups of magnitudes, are decided in each layer.
    together = pattern.group == 1 if method == "magnitude" else pattern.n_m is None
    globally = values.pop("global_sparsity", together)
    modifier = MODIFIERS[method][0] if globally or method != "magnitude" else "MagnitudePruningModifier"
    params = "__ALL_PRUNABLE__" if args.params is None else args.params
    read = {name: getattr(config, name) for name in {**KINDS[modifier].knobs, **values}}
    return OneShot(modifier, params, sparsity, globally, read)


def recipe_text(recipe: OneShot) -> str:
    """``recipe`` as YAML, with all parameters of its modifier."""
    kind = recipe.kind
    values = {name: value for name, value in recipe.knobs.items() if name in kind.knobs}
    values["mask_type"] = str(parse_mask_type(values["mask_type"]))
    values |= {"global_sparsity": recipe.global_sparsity} if kind.says_globally else {}
    values |= {"params": recipe.params, "init_sparsity": recipe.final_sparsity, "final_sparsity": recipe.final_sparsity}
    values |= {"start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0}
    lines = [f"      {key}: {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(
        ["# Made from the flags of the command line.", "modifiers:", f"  - !{recipe.modifier}", *lines, ""]
    )
