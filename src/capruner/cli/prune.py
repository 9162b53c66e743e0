"""``capruner prune``."""

from __future__ import annotations

import argparse

HELP = """\
Prune a timm model in one shot, at a whole list of sparsities, and say what each costs.

Calibrates on the training images of a folder (DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg) or of a data set that timm knows, prunes, and measures
accuracy at each sparsity. A recipe of CAP or FastCAP is carried out by capruner, which serves the whole list from one calibration. SparseML's own pruning
modifiers (OBSPruningModifier, MFACPruningModifier, GlobalMagnitudePruningModifier, ...) are applied at each sparsity again by SparseML where it can be
imported; without it, or with --engine native, those that capruner has a method for are carried out by that.

Writes to OUTPUT/EXPERIMENT: report.html, summary.json and summary.csv, accuracy_vs_sparsity.png, layer_sparsity.png, the recipe, result.safetensors (where
capruner has pruned), and with --save-model checkpoints/sparsity_0.75.safetensors, ... which timm.create_model(..., checkpoint_path=...) loads.
"""
EXAMPLE = """\
examples:
  capruner prune --data-dir DATA --model deit_small_patch16_224 --pretrained --sparsities 0.5 0.75 0.9 --num-grads 1024 --save-model
  capruner prune --data-dir DATA --model vit_base_patch16_224 --pretrained --mask-type 2:4 --params 're:blocks.[0-9]+.(attn|mlp).*weight$'
  capruner prune --data-dir DATA --model resnet50d --pretrained --sparseml-recipe one_shot/cap/resnet50d
research/one_shot_pruning.py is the same command.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from capruner.vision import one_shot_arguments

    one_shot_arguments.add_arguments(parser)
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Prune; 0."""
    from capruner.vision import one_shot_arguments, one_shot_pruning

    one_shot_pruning.prune(one_shot_arguments.checked(args))
    return 0
