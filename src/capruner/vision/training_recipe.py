"""Recipes in a training run: how long it takes, who sets the learning rate, which weights are pruned.

Two engines, capruner itself (:class:`Native`) and SparseML (:class:`capruner.sparseml.training.BySparseML`), have the same interface: ``end``,
``sets_learning_rate``, ``check(model)``, ``attach(...)``, ``step()``, ``updates()``, ``masks()``, ``close(epoch)``, ``remove_states()``,
``state_dict()`` and ``load_state_dict(state)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner import recipes
from capruner.cli.arguments import UserError
from capruner.recipes.one_shot import OURS
from capruner.recipes.run import RecipeRun
from capruner.recipes.training import ACTIONS
from capruner.vision.data import PlainBatches
from capruner.vision.engines import by_engine, cross_entropy
from capruner.vision.output import folder_inside


class Native:
    """A recipe carried out by capruner; see :mod:`capruner.recipes.run`. Raises ``UserError`` if it or ``--sparsities`` are invalid."""

    name = "native"

    def __init__(self, path: str, folder: Path, sparsities: Sequence[float] | None) -> None:
        self._recipe = recipes.load_training(path)
        self._folder = folder
        for pruning in self._recipe.pruning:
            if pruning.one_shot.traces_backup_dir:
                folder_inside(folder, pruning.one_shot.traces_backup_dir)
        if sparsities:
            self._recipe.climb(sparsities)
        self.end, self.sets_learning_rate = self._recipe.epochs, self._recipe.sets_learning_rate

    def check(self, model: nn.Module) -> None:
        """Do nothing: :meth:`attach` checks everything."""

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stepper: Any,
        steps_per_epoch: int,
        epoch: int,
        samples: Any,
    ) -> None:
        """Begin, or resume with :meth:`load_state_dict`. Each :meth:`step` then takes one of ``stepper``."""

        def batches(kwargs: dict[str, Any]) -> PlainBatches:
            return PlainBatches(lambda said: samples(said)(), kwargs)

        self._stepper = stepper
        self._run: RecipeRun = self._recipe.start(
            model, optimizer, steps_per_epoch, batches, cross_entropy, folder=self._folder
        )

    def step(self) -> None:
        """Apply the recipe at this step, then take the optimizer's."""
        self._run.update()
        self._stepper.step()

    def updates(self) -> int:
        """A value that every update changes."""
        return len(self._run.history)

    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask, True = keep}``, of all modifiers combined."""
        return self._run.masks

    def close(self, epoch: float) -> None:
        """Prune once more if an update is due exactly at the end of training."""
        self._run.finish()

    def remove_states(self) -> None:
        """Delete the checkpoints of interrupted calibrations, once training has ended and its weights are written."""
        self._run.remove_states()

    def state_dict(self) -> dict[str, Any]:
        """Masks and step."""
        return self._run.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after :meth:`attach`."""
        self._run.load_state_dict(state)


def open_training(path: str, engine: str | None, folder: Path, sparsities: Sequence[float] | None) -> Any:
    """A training recipe, carried out by :class:`Native` or :class:`capruner.sparseml.training.BySparseML`; see :func:`capruner.vision.engines.by_engine`."""
    ours = OURS | ACTIONS.keys()
    native = partial(Native, path, folder, sparsities)
    return by_engine(path, engine, ours, native, "capruner.sparseml.training", folder, sparsities)


def epochs(recipe: Any, args: argparse.Namespace) -> int:
    """``--epochs``, or the recipe's end; raise ``UserError`` if there is neither."""
    if args.epochs is None and recipe.end < 1:
        raise UserError(f"{args.sparseml_recipe} has no end; pass --epochs, or add an EpochRangeModifier")
    return int(args.epochs or recipe.end)


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the pruned weights of a model that the recipe does not know (the moving average)."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def check_zeros(model: nn.Module, masks: dict[str, Tensor], what: str) -> None:
    """Raise ``RuntimeError`` unless every pruned weight is exactly zero."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        alive = int((parameters[name].detach()[~mask.to(parameters[name].device)] != 0).sum())
        if alive:
            raise RuntimeError(
                f"{alive} pruned weights of {name} are not zero in {what}, which was not written; please report this"
            )
