"""Recipes for one-shot pruning, read and carried out without SparseML.

    from capruner import recipes

    recipe = recipes.load("recipe.yaml")                      # with one !CAPruningModifier in it, say
    result = recipe.prune(model, batches, loss_fn, [0.5, 0.75])   # a capruner.PruningResult

The files are SparseML's: stages, variables, ``eval(...)`` of arithmetic, YAML in front of Markdown. Modifiers that are read here are those of
:data:`capruner.recipes.one_shot.KINDS`.
"""

from capruner.recipes.one_shot import KINDS, OneShot, load
from capruner.recipes.text import checked_text, read

__all__ = ["KINDS", "OneShot", "checked_text", "load", "read"]
