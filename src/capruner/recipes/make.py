"""A recipe made for a model: the weights of its blocks, by patterns that match these and no others."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from capruner.methods import MethodName
from capruner.models.selection import select_parameters
from capruner.models.wrappers import all_parameters
from capruner.presets import BLOCKS

MODIFIERS: dict[MethodName, tuple[str, str]] = {
    "cap": ("CAPruningModifier", "CAP"),
    "fast_cap": ("FastCAPruningModifier", "FastCAP"),
    "obs": ("OBSPruningModifier", "OBS (WoodFisher)"),
    "magnitude": ("GlobalMagnitudePruningModifier", "Global magnitude pruning"),
}
"""Modifier and title of each method."""
_KNOBS: dict[MethodName, dict[str, object]] = {
    "cap": {"global_sparsity": True},
    "fast_cap": {},
    "obs": {"global_sparsity": True, "num_grads": 4096, "damp": "1.0e-6", "fisher_block_size": 192},
    "magnitude": {},
}
GRADUAL = 0.8
"""Share of the epochs of a training in which a made recipe prunes."""


def make(
    model: nn.Module, name: str, method: MethodName = "cap", sparsity: float = 0.5, epochs: int | None = None
) -> str:
    """The text of a recipe for ``model``: one-shot, or over ``epochs``.

    Args:
        name: what the model is called, for the comment.

    Raises:
        SelectionError: the model has no blocks to prune.
    """
    chosen = select_parameters(model, BLOCKS, trainable=False)
    prunable = select_parameters(model, "__ALL_PRUNABLE__", trainable=False)
    dense = [other for other in prunable if other not in chosen]
    weights, total = sum(p.numel() for p in chosen.values()), sum(p.numel() for p in model.parameters())
    modifier, title = MODIFIERS[method]
    when = f"over {epochs} epochs" if epochs else "in one shot"
    command = "train" if epochs else "prune"
    more = "" if epochs else " --sparsities 0.5 0.75 0.9"
    lines = [
        f"# {title} {when} on {name}: {len(chosen)} weights of its blocks, {100 * weights / total:.1f} % of all parameters.",
        f"# Left dense: {', '.join(dense) or 'no other prunable weight'}; norms, biases, embeddings.",
        f"#   capruner {command} --data-dir DIR --model {name} --pretrained --sparseml-recipe THIS.yaml{more}",
        "modifiers:",
    ]
    if epochs:
        lines += ["  - !EpochRangeModifier", "      start_epoch: 0.0", f"      end_epoch: {float(epochs)}"]
    lines += [f"  - !{modifier}", "      params:"]
    lines += [f"        - {entry}" for entry in patterns(list(chosen), list(all_parameters(model)))]
    end = GRADUAL * epochs if epochs else 1.0
    values: dict[str, object] = {
        "init_sparsity": round(sparsity / 2, 4) if epochs else sparsity,
        "final_sparsity": sparsity,
        "start_epoch": 0.0,
        "end_epoch": round(end, 4),
        "update_frequency": round(epochs / 10, 4) if epochs else 1.0,
    }
    return "\n".join([*lines, *(f"      {key}: {value}" for key, value in (values | _KNOBS[method]).items()), ""])


def patterns(chosen: Sequence[str], names: Collection[str]) -> list[str]:
    """Entries of ``params`` that stand for ``chosen`` and for nothing else among ``names``, as few as numbers in the names allow."""
    wanted = set(chosen)
    found: dict[str, None] = {}
    for name in chosen:
        for number in (r"\d+", r"(?<=\.)\d+(?=\.)|^\d+(?=\.)"):
            pattern = re.sub(number, "[0-9]+", name) + "$"
            if pattern != f"{name}$" and {n for n in names if re.match(pattern, n)} <= wanted:
                found[f"re:{pattern}"] = None
                break
        else:
            found[name] = None
    return list(found)
