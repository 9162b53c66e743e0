"""``capruner prune``: the door to ``research/one_shot_pruning.py``."""

from __future__ import annotations

import argparse

HELP = """\
Prune a timm model in one shot, at a whole list of sparsities, and say what each costs.

Calibrates on the training images of a folder (DATA/train/<class>/*.jpg, DATA/val/<class>/*.jpg) or of a data set that timm knows, prunes, and measures
accuracy at each sparsity. Writes report.html, summary.json, the recipe, masks, and with --save-model checkpoints that timm loads.
"""
EXAMPLE = """\
examples:
  capruner prune --data-dir DATA --model deit_small_patch16_224 --pretrained --sparsities 0.5 0.75 0.9 --num-grads 1024 --save-model
  capruner prune --data-dir DATA --model vit_base_patch16_224 --pretrained --mask-type 2:4 --params 're:blocks.[0-9]+.(attn|mlp).*weight$'
  capruner prune --data-dir DATA --model resnet50d --pretrained --sparseml-recipe research/recipes/one_shot/cap/resnet50d.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the script."""
    from research.utils import one_shot_arguments

    one_shot_arguments.add_arguments(parser)
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Prune; 0."""
    from research import one_shot_pruning
    from research.utils import one_shot_arguments

    one_shot_pruning.prune(one_shot_arguments.checked(args))
    return 0
