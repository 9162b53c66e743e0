"""Recipes, read and carried out without SparseML.

    from capruner import recipes

    recipe = recipes.load("recipe.yaml")                          # one-shot: exactly one pruning modifier
    result = recipe.prune(model, batches, loss_fn, [0.5, 0.75])   # a capruner.PruningResult

    recipe = recipes.load_training("recipe.yaml")                 # any number of modifiers, over epochs
    run = recipe.start(model, optimizer, len(loader), loader, loss_fn)

The files are SparseML's: stages, variables, ``eval(...)`` of arithmetic, YAML in front of Markdown. The modifiers are those of
:data:`capruner.recipes.one_shot.KINDS` and :data:`capruner.recipes.training.ACTIONS`; others are refused by name.
"""

from capruner.recipes.one_shot import KINDS, OneShot, load
from capruner.recipes.text import checked_text, read
from capruner.recipes.training import TrainingRecipe, load_training

__all__ = ["KINDS", "OneShot", "TrainingRecipe", "checked_text", "load", "load_training", "read"]
