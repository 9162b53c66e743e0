"""What the tests of gradual training share: a tiny model, recipes, and how to read what a run has written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the package `research`
MODEL = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
KWARG_WORDS = [f"{key}={value}" for key, value in KWARGS.items()]
SMALLER: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 8,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 2,
}
PRUNABLE = 2 * 12 * 16 * 16  # attention and MLP of both blocks
Line = Callable[..., list[str]]
SPARSEML = any(found.name == "sparseml" for found in metadata.distributions())

PRUNE = """
      params: ['re:.*blocks.[0-9]+.attn.(qkv|proj).weight$', 're:.*blocks.[0-9]+.mlp.(fc1|fc2).weight$']
      init_sparsity: {first}
      final_sparsity: {last}
      start_epoch: {start}
      end_epoch: {end}
      update_frequency: {every}
"""
CAP = "  - !CAPruningModifier" + PRUNE + "      num_grads: 6\n      damp: 1e-4\n      fisher_block_size: 16\n"
GMP = "  - !GlobalMagnitudePruningModifier" + PRUNE
RATE = "  - !LearningRateFunctionModifier\n      lr_func: linear\n      init_lr: 1e-3\n      final_lr: 1e-5\n      start_epoch: 0.0\n      end_epoch: 4.0\n"
RECIPES = {
    "cap": CAP.format(first=0.5, last=0.8, start=1.0, end=3.0, every=0.5),
    "gmp": GMP.format(first=0.5, last=0.8, start=1.0, end=3.0, every=0.5),
    "rate": RATE + CAP.format(first=0.5, last=0.8, start=0.0, end=2.0, every=1.0),
    "chain": CAP.format(first=0.4, last=0.6, start=0.0, end=1.0, every=1.0)
    + CAP.format(first=0.6, last=0.8, start=1.0, end=2.0, every=0.5),
    "thirds": CAP.format(first=0.5, last=0.8, start=0.0, end=1.0, every=1 / 3),
    "oneshot": CAP.format(first=0.75, last=0.75, start=0.0, end=2.0, every=2.0),
    "rate_only": RATE,
    "state": CAP.format(first=0.5, last=0.8, start=1.0, end=3.0, every=0.5) + "      traces_backup_dir: traces\n",
}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def updates(folder: Path) -> list[tuple[float, float]]:
    return [(u["epoch"], u["sparsity"]) for u in json.loads((folder / "layer_sparsity.json").read_text())]


def same_weights(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
