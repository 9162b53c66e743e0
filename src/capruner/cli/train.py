"""``capruner train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from capruner.cli.arguments import Parser

HELP = """\
Train a timm model while a recipe prunes it.

DATA holds train/<class>/*.jpg and val/<class>/*.jpg. One-shot pruning with finetuning is the same command with a recipe of one_shot+finetune.

Writes to OUTPUT/EXPERIMENT: summary.csv (a row per epoch), training.png, layer_sparsity.json (each layer at each update), recipe.yaml, arguments.yaml,
last.pt (for --resume), and checkpoints/best_sparsity_0.7500.safetensors, ...: the best weights at each sparsity that was reached (those of the moving average
with --model-ema), which timm.create_model(..., checkpoint_path=...) loads.
"""
EXAMPLE = """\
examples:
  capruner train DATA --model deit_small_patch16_224 --pretrained --config deit \\
      --sparseml-recipe gradual_pruning/cap/vit_300ep_0.40_0.60_0.75_0.90 --experiment deit_small
  torchrun --nproc-per-node=8 --no-python capruner train ...       on 8 GPUs
  capruner train ... --experiment deit_small --resume              after an interruption
research/sparse_training.py is the same command.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from capruner.vision import training_arguments

    training_arguments.add_arguments(parser)
    parser.epilog = EXAMPLE


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the values of ``--config`` below those of the command line."""
    from capruner.vision import training_arguments

    return training_arguments.parse_with(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Train; 0."""
    from capruner.vision import sparse_training

    sparse_training.train(args)
    return 0
