"""A recipe that is being carried out in a training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from capruner.batches import default_loss
from capruner.bits import pack, unpack
from capruner.calibration.gradients import LossFunction
from capruner.checkpoint import remove_state
from capruner.files import reading_state
from capruner.models.masking import MaskHandle, mask_model
from capruner.models.selection import ALL, SelectionError, select_parameters
from capruner.models.wrappers import first_names, unwrap
from capruner.recipes.training import (
    ConstantPruning,
    LearningRateFunction,
    Pruning,
    SetLearningRate,
    SetWeightDecay,
    TrainableParams,
    TrainingRecipe,
)
from capruner.recipes.updates import next_sparsity, prune_resumably
from capruner.recipes.values import FROM_WEIGHTS
from capruner.rows import zero_share
from capruner.training.schedules import SAME_EPOCH

_FORMAT, _VERSION = "capruner-recipe", 1


class RecipeRun:
    """Carries a :class:`capruner.recipes.TrainingRecipe` out, step by step.

    Everything but masks follows from the number of steps taken. So a training that resumes needs :meth:`state_dict`, the model's and the optimizer's states.

    Args:
        recipe: see :func:`capruner.recipes.load_training`.
        model: any module, in any wrapper or none.
        optimizer: its parameter groups get learning rates and weight decay.
        steps_per_epoch: calls of :meth:`update` in an epoch.
        batches: calibration data, see :func:`capruner.prune`; or a function that returns it, called with the modifier's ``grad_sampler_kwargs``.
        loss_fn: see :func:`capruner.prune`.
        folder: where the recipe's ``traces_backup_dir`` lies.

    Attributes:
        step: steps taken so far.
        history: ``(step, sparsity)`` whenever masks changed.

    Raises:
        ValueError: ``params`` of a modifier do not fit the model.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        model: nn.Module,
        optimizer: Optimizer,
        steps_per_epoch: int,
        batches: Iterable[Any] | Any = None,
        loss_fn: LossFunction = default_loss,
        folder: str | Path = ".",
    ) -> None:
        if isinstance(steps_per_epoch, bool) or not isinstance(steps_per_epoch, int) or steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be a whole number, at least 1, got {steps_per_epoch!r}")
        self.recipe, self.model, self.optimizer = recipe, unwrap(model), optimizer
        self.steps_per_epoch, self.step = steps_per_epoch, 0
        self.history: list[tuple[int, float]] = []
        self._batches, self.loss_fn, self.folder = batches, loss_fn, Path(folder)
        self._handle: MaskHandle | None = None
        self._hooks: list[Any] = []
        self._freezers = [_Freezer(a, self) for a in recipe.actions if isinstance(a, TrainableParams)]
        self._freeze()
        self._pruners = [_Pruner(a, self) for a in recipe.actions if isinstance(a, Pruning | ConstantPruning)]

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: bool tensor, False = pruned}`` of all parameters that the recipe prunes. Masks that were let go (``leave_enabled: False``) are the
        zeros of the weights as they are now."""
        found: dict[str, Tensor] = {}
        for pruner in self._pruners:
            for name, mask in pruner.shown().items():
                found[name] = found[name] & mask if name in found else mask
        return found

    @property
    def sparsity(self) -> float:
        """Share of pruned weights in :attr:`masks`."""
        return zero_share(self.masks.values())

    def update(self) -> None:
        """Do what is due at this step. Call it once for each optimizer step: after the backward pass, before gradients are clipped."""
        self._freeze()
        for action in self.recipe.actions:
            self._set_hyperparameters(action)
        for pruner in self._pruners:
            pruner.update(self.step)
        self.step += 1

    def finish(self) -> None:
        """Prune once more if a modifier ends exactly where training has ended: no further step would bring its last update."""
        for pruner in self._pruners:
            pruner.finish(self.step)

    def remove_states(self) -> None:
        """Delete the state folders of interrupted calibrations (``traces_backup_dir``): the weights are saved elsewhere."""
        for pruner in self._pruners:
            pruner.remove_state()

    def state_dict(self) -> dict[str, Any]:
        """Masks (one bit per weight) and the step: tensors and plain values, as ``torch.load(weights_only=True)`` reads them."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "recipe": self._fingerprint(),
            "steps_per_epoch": self.steps_per_epoch,
            "step": self.step,
            "history": [list(row) for row in self.history],
            "pruners": [pruner.state() for pruner in self._pruners],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore masks and step. Load the model's and the optimizer's states before.

        Raises:
            ValueError: the state was saved for another recipe, model or number of steps in an epoch, or is damaged.
        """
        with reading_state(state, _FORMAT, _VERSION, "recipe"):
            if state["recipe"] != self._fingerprint():
                raise ValueError("the state was saved with another recipe; load it with the recipe of that training")
            if state["steps_per_epoch"] != self.steps_per_epoch:
                raise ValueError(
                    f"the state was saved with {state['steps_per_epoch']} steps in an epoch, here are {self.steps_per_epoch}; use the same data and batch size"
                )
            for pruner, saved in zip(self._pruners, state["pruners"], strict=True):
                pruner.load(saved)
            self.step, self.history = int(state["step"]), [(int(a), float(b)) for a, b in state["history"]]
        self.hold()
        self._freeze(resumed=True)

    def _fingerprint(self) -> list[str]:
        return [repr(action) for action in self.recipe.actions]

    def due(self, epoch: float) -> int:
        """The number of the first step at or after ``epoch``; -1 means from the start on."""
        return max(math.ceil(epoch * self.steps_per_epoch - SAME_EPOCH), 0)

    def calibration_data(self, kwargs: Mapping[str, Any]) -> Any:
        """``batches`` for a modifier with these ``grad_sampler_kwargs``."""
        return self._batches(dict(kwargs)) if callable(self._batches) else self._batches

    def _freeze(self, resumed: bool = False) -> None:
        if any([freezer.update(self.step, resumed) for freezer in self._freezers]) and self._handle is not None:
            self.hold()

    def _set_hyperparameters(self, action: Any) -> None:
        if isinstance(action, LearningRateFunction):
            if self.due(action.start_epoch) <= self.step <= self.due(action.end_epoch):
                self._set("lr", action.rate(self.step / self.steps_per_epoch, self.steps_per_epoch), action)
        elif isinstance(action, SetLearningRate) and self.step == self.due(action.start_epoch):
            self._set("lr", action.learning_rate, action)
        elif isinstance(action, SetWeightDecay) and self.step == self.due(action.start_epoch):
            self._set("weight_decay", action.weight_decay, action)

    def _set(self, key: str, value: float, action: Any) -> None:
        groups = self.optimizer.param_groups
        if action.param_groups and (wrong := [i for i in action.param_groups if not 0 <= i < len(groups)]):
            raise ValueError(f"param_groups: the optimizer has {len(groups)} parameter groups, there is no {wrong[0]}")
        for group in [groups[i] for i in action.param_groups] if action.param_groups else groups:
            group[key] = value

    def hold(self) -> None:
        """Hold the masks of all modifiers together, and no others. Gradients of pruned weights are 0, so that clipping does not count them in the norm."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        while self._hooks:
            self._hooks.pop().remove()
        masks = self.held()
        if not masks:
            return
        self._handle = mask_model(self.model, masks=masks)
        parameters = first_names(self.model)
        for name, mask in masks.items():
            if parameters[name].requires_grad:
                self._hooks.append(parameters[name].register_hook(partial(_masked, mask)))

    def held(self) -> dict[str, Tensor]:
        """The masks that hold now."""
        found: dict[str, Tensor] = {}
        for pruner in self._pruners:
            for name, mask in pruner.masks.items() if pruner.holds else ():
                found[name] = found[name] & mask if name in found else mask
        return found


def _masked(mask: Tensor, gradient: Tensor) -> Tensor:
    return gradient * mask.to(gradient.device)


class _Freezer:
    """Parameters that are trained, or not, for a while."""

    def __init__(self, spec: TrainableParams, run: RecipeRun) -> None:
        everything = spec.params == ALL or ALL in spec.params
        try:
            chosen = select_parameters(run.model, ALL if everything else spec.params, trainable=False)
        except SelectionError:
            if spec.params_strict:
                raise
            chosen = {}
        self._trainable, self._before = spec.trainable, {id(p): (p, p.requires_grad) for p in chosen.values()}
        self._first = run.due(spec.start_epoch)
        self._last = run.due(spec.end_epoch) if spec.end_epoch >= 0 else math.inf

    def update(self, step: int, resumed: bool) -> bool:
        """Set what holds at ``step``, if it changes there or training has just resumed; True if it does."""
        begins = step == self._first or (resumed and self._first < step < self._last)
        ends = step == self._last or (resumed and step > self._last)
        if begins:
            self._set(dict.fromkeys(self._before, self._trainable))
        if ends:
            self._set({key: before for key, (_, before) in self._before.items()})
        return begins or ends

    def _set(self, trainable: Mapping[int, bool]) -> None:
        for key, value in trainable.items():
            parameter = self._before[key][0]
            parameter.requires_grad_(value)
            if not value:
                parameter.grad = None  # an optimizer passes over parameters without a gradient


class _Pruner:
    """One modifier that prunes, or holds what is pruned.

    Attributes:
        masks: by parameter name, True = remains.
        holds: whether they hold now.
    """

    def __init__(self, spec: Pruning | ConstantPruning, run: RecipeRun) -> None:
        self._spec, self._run = spec, run
        if isinstance(spec, Pruning):
            self._final = spec.one_shot.targets(run.model)
            self._updates = {run.due(epoch) for epoch in spec.epochs()}
            names = list(self._final)
        else:
            self._final, self._updates = {}, set()
            names = list(select_parameters(run.model, spec.params, trainable=False))
        parameters = first_names(run.model)
        self.masks = {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in names}
        self.holds = self._let_go = False
        self._begin = run.due(spec.start_epoch)
        self._end = run.due(spec.end_epoch) if spec.end_epoch >= 0 else math.inf
        self._first = self._sparsity_at_start(parameters)
        named = spec.one_shot.traces_backup_dir if isinstance(spec, Pruning) else None
        self._folder = run.folder / named if named else None
        self._served = False

    def _sparsity_at_start(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        if not isinstance(self._spec, Pruning):
            return {}
        init = self._spec.init_sparsity
        if init != FROM_WEIGHTS:
            return dict.fromkeys(self.masks, float(init))
        return {name: zero_share([parameters[name]]) for name in self.masks}

    def shown(self) -> dict[str, Tensor]:
        """Masks for whoever looks from outside."""
        if not self._let_go:
            return self.masks
        parameters = first_names(self._run.model)
        return {name: parameters[name].detach() != 0 for name in self.masks}

    def update(self, step: int) -> None:
        """Do what is due at ``step``."""
        if step == self._begin:
            self._start()
        if isinstance(self._spec, Pruning) and (step in self._updates or self._every_step(step)):
            self._prune(step)
        if step == self._end and not (isinstance(self._spec, Pruning) and self._spec.leave_enabled):
            self.holds, self._let_go = False, True
            self._run.hold()

    def finish(self, step: int) -> None:
        """The update of the end, where training has ended there."""
        if isinstance(self._spec, Pruning) and self._begin < step == self._end:
            self._prune(step)

    def _every_step(self, step: int) -> bool:
        assert isinstance(self._spec, Pruning)
        return self._spec.update_frequency <= 0 and self._begin <= step <= self._end

    def _start(self) -> None:
        if isinstance(self._spec, ConstantPruning):
            parameters = first_names(self._run.model)
            self.masks = {name: parameters[name].detach() != 0 for name in self.masks}
        self.holds = True
        self._run.hold()
        if isinstance(self._spec, ConstantPruning):
            self._run.history.append((self._run.step, self._run.sparsity))

    def _prune(self, step: int) -> None:
        assert isinstance(self._spec, Pruning)
        run, one_shot = self._run, self._spec.one_shot
        epoch = step / run.steps_per_epoch
        targets = {n: self._spec.sparsity(epoch, self._first[n], final) for n, final in self._final.items()}
        held = run.held()
        masks = {name: held[name] for name in self.masks}
        sparsity = next_sparsity(masks, targets, one_shot.global_sparsity)
        if sparsity is None:
            self.masks = masks
        else:
            if self._served:  # by the update before this one, whose weights a checkpoint has by now
                self.remove_state()
            self.masks = self._prune_to(sparsity, masks)
            self._served = True
        run.hold()
        run.history.append((step, run.sparsity))

    def _prune_to(self, sparsity: Any, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(self._spec, Pruning)
        run, one_shot = self._run, self._spec.one_shot
        batches = run.calibration_data(one_shot.grad_sampler_kwargs)
        more = {"params": list(masks), "masks": masks, "state_dir": self._folder}
        result = prune_resumably(
            lambda: one_shot.prune(run.model, batches, run.loss_fn, sparsity, **more), self._folder
        )
        result.apply(run.model)
        return result.masks()

    def remove_state(self) -> None:
        """Delete what an interrupted calibration would resume from."""
        if self._folder:
            remove_state(self._folder)

    def state(self) -> dict[str, Any]:
        """Masks as bits, and what depends on where training started."""
        return {
            "masks": {name: pack(mask) for name, mask in self.masks.items()},
            "holds": self.holds,
            "let_go": self._let_go,
            "first": dict(self._first),
        }

    def load(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        if saved["masks"].keys() != self.masks.keys():
            odd = sorted(saved["masks"].keys() ^ self.masks.keys())
            raise ValueError(f"the state was saved for a model with other parameters: {', '.join(odd[:4])}")
        self.masks = {
            name: unpack(saved["masks"][name], mask.shape, name).to(mask.device) for name, mask in self.masks.items()
        }
        self.holds, self._let_go, self._first = saved["holds"], saved["let_go"], dict(saved["first"])
