"""A training recipe in SparseML's hands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capruner.sparseml.base import (
    CorrelationAwareModifier,  # first: its package sets what SparseML reads when it is imported
)

# isort: split
import torch
from sparseml.pytorch.sparsification.modifier import Modifier
from sparseml.pytorch.sparsification.pruning import BaseGradualPruningModifier, BasePruningModifier
from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.models.wrappers import owner
from capruner.recipes.one_shot import general_refusal
from capruner.recipes.training import check_ladder, rung
from capruner.sparseml.recipe import check_patterns, keep_inside, load_manager, quiet_loggers
from capruner.sparseml.state import load_manager_state, manager_state
from capruner.training.schedules import SAME_EPOCH, update_epochs


class BySparseML:
    """A recipe carried out by SparseML's manager; see :mod:`capruner.vision.training_recipe`. Raises ``UserError`` if it is invalid."""

    name = "sparseml"

    def __init__(self, path: str, folder: Path, sparsities: Sequence[float] | None) -> None:
        self.path = path
        self.manager = load_manager(path)
        modifiers = list(self.manager.iter_modifiers())
        self.pruning = [m for m in modifiers if isinstance(m, BasePruningModifier)]
        if not self.pruning:
            raise UserError(f"--sparseml-recipe {path} has no pruning modifier; see 'capruner recipes list'")
        for modifier in modifiers:
            if type(modifier).loss_update is not Modifier.loss_update:  # the loss of the training is not handed to it
                raise UserError(f"{path}: {general_refusal(type(modifier).__name__)}")
        rates = [m for m in modifiers if "LearningRate" in type(m).__name__]
        self.sets_learning_rate = bool(rates)
        if any(type(m).__name__ == "LearningRateModifier" for m in rates):
            raise UserError(
                f"{path}: LearningRateModifier hides its place in the schedule, so that training could not be resumed; "
                "use LearningRateFunctionModifier, or no learning rate in the recipe and --sched"
            )
        for rate in rates:
            length = rate.end_epoch - max(rate.start_epoch, 0.0)
            if getattr(rate, "cycle_epochs", 1.0) not in (1.0, length) and rate.lr_func != "cyclic_linear":
                raise UserError(
                    f"{path}: cycle_epochs {rate.cycle_epochs:g} has no effect with lr_func {rate.lr_func}; write lr_func: cyclic_linear, "
                    "or leave cycle_epochs out"
                )
        if not math.isfinite(self.manager.max_epochs):
            raise UserError(f"{path} ends at epoch {self.manager.max_epochs:g}; give its modifiers an end_epoch")
        self.end = math.ceil(self.manager.max_epochs - SAME_EPOCH)
        for modifier in self.pruning:
            keep_inside(modifier, folder)
        if sparsities:
            self._climb(list(sparsities))

    def check(self, model: nn.Module) -> None:
        """Check that patterns can be matched in time."""
        check_patterns(self.manager, model)

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
        self._model, self._optimizer, self._stepper, self._steps = model, optimizer, stepper, steps_per_epoch
        self._wrapped = self.manager.modify(
            model,
            optimizer,
            steps_per_epoch=steps_per_epoch,
            wrap_optim=stepper,
            epoch=float(epoch),
            loggers=quiet_loggers(),
            grad_sampler={"data_loader_builder": samples, "loss_function": nn.functional.cross_entropy},
        )

    def step(self) -> None:
        """What the recipe does at this step, and the optimizer's."""
        self._stepper.keep_gradients()
        self._wrapped.step()

    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask, True = remains}``, of all modifiers together. Of one that has ended and let its masks go: the zeros of the weights."""
        found: dict[str, Tensor] = {}
        for modifier in self.pruning:
            masks = modifier.module_masks
            for layer, param, mask in zip(masks.layer_names, masks.param_names, masks.param_masks):
                name = f"{layer}.{param}" if layer else param
                keep = mask != 0 if masks.enabled else torch.ones_like(mask, dtype=torch.bool)
                if modifier.ended and not masks.enabled:
                    holder, attribute = owner(self._model, name)
                    keep = getattr(holder, attribute).detach() != 0
                found[name] = found[name] & keep if name in found else keep
        return found

    def updates(self) -> list[tuple[bool, bool, float]]:
        """Changes when an update has happened."""
        return [(m.started, m.ended, getattr(m, "_last_update_epoch", 0.0)) for m in self.pruning]

    def close(self, epoch: float) -> None:
        """The update that is due when training ends exactly at ``end_epoch``: no further step would bring it."""
        for modifier in self.pruning:
            if modifier.end_pending(epoch + SAME_EPOCH, self._steps):
                modifier.scheduled_update(self._model, self._optimizer, max(epoch, modifier.end_epoch), self._steps)
                modifier.optimizer_post_step(self._model, self._optimizer, epoch, self._steps)

    def remove_states(self) -> None:
        """Delete what interrupted calibrations would resume from: training has ended, and its weights are written."""
        for modifier in self.pruning:
            if isinstance(modifier, CorrelationAwareModifier):
                modifier.remove_state()

    def state_dict(self) -> dict[str, Any]:
        """Masks and places in the schedule."""
        return manager_state(self.manager)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, after :meth:`attach`."""
        load_manager_state(self.manager, state)

    def _climb(self, sparsities: list[float]) -> None:
        """Let the ladder say the sparsity at each update, instead of the interpolation."""
        for modifier in self.pruning:
            if not isinstance(modifier, BaseGradualPruningModifier) or isinstance(modifier.final_sparsity, dict):
                raise UserError(
                    f"{self.path}: --sparsities replaces init_sparsity and final_sparsity, numbers both; {type(modifier).__name__} has none"
                )
        due = sorted({round(epoch, 6) for modifier in self.pruning for epoch in _updates(modifier)})
        check_ladder(due, sparsities, self.path)

        def target(modifier: Any) -> Any:
            def at(epoch: float, steps_per_epoch: int) -> list[float]:
                return [rung(due, sparsities, epoch)] * len(modifier.module_masks.layers)

            return at

        for modifier in self.pruning:
            modifier.get_applied_sparsity_for_epoch = target(modifier)


def _updates(modifier: Any) -> list[float]:
    try:
        return update_epochs(modifier.start_epoch, modifier.end_epoch, modifier.update_frequency)
    except ValueError as error:
        raise UserError(str(error)) from error
