"""What a recipe means for a training run: how long, who sets the learning rate, which weights are pruned, and how far they are.

Two engines carry recipes out, capruner itself (:class:`Native`) and SparseML (:class:`capruner.sparseml.training.BySparseML`), and offer the same:
``end``, ``sets_learning_rate``, ``check(model)``, ``attach(...)``, ``step()``, ``updates()``, ``masks()``, ``close(epoch)``, ``remove_states()``,
``state_dict()`` and ``load_state_dict(state)``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner import recipes
from capruner.cli.arguments import UserError
from capruner.recipes.one_shot import OURS
from capruner.recipes.run import RecipeRun
from capruner.recipes.text import modifier_names
from capruner.recipes.training import ACTIONS
from capruner.vision.data import PlainBatches
from capruner.vision.engines import cross_entropy
from capruner.vision.output import folder_inside


class Native:
    """A recipe carried out by capruner itself; see :mod:`capruner.recipes.run`.

    Raises:
        UserError: the recipe cannot be carried out; ``--sparsities`` do not fit it.
    """

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
        """Nothing: :meth:`attach` checks all."""

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        stepper: Any,
        steps_per_epoch: int,
        epoch: int,
        samples: Any,
    ) -> None:
        """Begin, or resume with :meth:`load_state_dict`; each :meth:`step` then takes one of ``stepper``."""

        def batches(kwargs: dict[str, Any]) -> PlainBatches:
            return PlainBatches(lambda said: samples(said)(), kwargs)

        self._stepper = stepper
        self._run: RecipeRun = self._recipe.start(
            model, optimizer, steps_per_epoch, batches, cross_entropy, folder=self._folder
        )

    def step(self) -> None:
        """What the recipe does at this step, and the optimizer's."""
        self._run.update()
        self._stepper.step()

    def updates(self) -> int:
        """Changes when an update has happened."""
        return len(self._run.history)

    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask, True = remains}``, of all modifiers together."""
        return self._run.masks

    def close(self, epoch: float) -> None:
        """The update that is due when training ends exactly there."""
        self._run.finish()

    def remove_states(self) -> None:
        """Delete what interrupted calibrations would resume from: training has ended, and its weights are written."""
        self._run.remove_states()

    def state_dict(self) -> dict[str, Any]:
        """Masks and step."""
        return self._run.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, after :meth:`attach`."""
        self._run.load_state_dict(state)


def open_training(path: str, engine: str | None, folder: Path, sparsities: Sequence[float] | None) -> Any:
    """A recipe file in the hands of an engine: the one that is asked for, or else SparseML for recipes with modifiers of its own, where it imports.

    Raises:
        UserError: the recipe is invalid, or the engine cannot carry it out.
    """
    foreign = [name for name in modifier_names(recipes.checked_text(path)) if name not in OURS and name not in ACTIONS]
    if engine == "native" or (engine is None and not foreign):
        return Native(path, folder, sparsities)
    try:
        from capruner.sparseml.training import BySparseML
    except ImportError as error:
        if engine == "sparseml":
            raise UserError(f"--engine sparseml: SparseML cannot be imported here ({error})") from error
        found = Native(path, folder, sparsities)
        if int(torch.distributed.is_initialized() and torch.distributed.get_rank()) == 0:
            names = ", ".join(sorted(set(foreign)))
            print(
                f"note: SparseML cannot be imported here, so {names} is carried out by capruner's own methods",
                file=sys.stderr,
            )
        return found
    return BySparseML(path, folder, sparsities)


def epochs(recipe: Any, args: argparse.Namespace) -> int:
    """``--epochs``, or until the recipe ends.

    Raises:
        UserError: neither is set.
    """
    if args.epochs is None and recipe.end < 1:
        raise UserError(f"{args.sparseml_recipe} has no end; pass --epochs, or add an EpochRangeModifier")
    return int(args.epochs or recipe.end)


def sparsity_of(masks: dict[str, Tensor]) -> float:
    """Share of the maskable weights that are pruned."""
    return sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero what is pruned, in a model that the recipe does not know (the moving average)."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def check_zeros(model: nn.Module, masks: dict[str, Tensor], what: str) -> None:
    """Check that every pruned weight is exactly zero.

    Raises:
        RuntimeError: one is not.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        alive = int((parameters[name].detach()[~mask.to(parameters[name].device)] != 0).sum())
        if alive:
            raise RuntimeError(
                f"{alive} pruned weights of {name} are not zero in {what}; it was not written. Please report this"
            )
