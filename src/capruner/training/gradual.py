"""``GradualPruner``: prune a model in several steps inside any training loop, with masks that hold in between.

    pruner = capruner.GradualPruner(model, loader, loss_fn, sparsity={0: 0.5, 2: 0.75, 4: 0.9}, num_grads=1024)
    for epoch in range(6):
        pruner.step(epoch)          # prunes if an update is due
        for x, y in loader:         # any loop; pruned weights are 0 after every optimizer.step()
            ...
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, path)

Optimizer state of pruned weights (momentum, ``exp_avg``) is not cleared. It has no effect: pruned weights never come back, and are set to 0 after each step
whatever the optimizer did to them. Gradients that were accumulated before ``step`` are not changed by it.

In Accelerate's loop construct the pruner after ``accelerator.prepare``; the prepared model and loader are passed as they are:

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = capruner.GradualPruner(model, loader, loss_fn, sparsity={0: 0.5, 2: 0.75})
    accelerator.register_for_checkpointing(pruner)      # save_state and load_state include the masks
    for epoch in range(4):
        pruner.step(epoch)
        ...
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner.batches import Batches, default_loss
from capruner.bits import pack, unpack
from capruner.calibration.driver import Calibration
from capruner.calibration.gradients import LossFunction
from capruner.checkpoint import remove_state
from capruner.checks import is_number
from capruner.files import reading_state
from capruner.job import Job
from capruner.models.masking import MaskHandle, mask_model
from capruner.models.wrappers import first_names
from capruner.pruning import prune
from capruner.result import PruningResult
from capruner.rows import zero_share
from capruner.training.schedules import SAME_EPOCH, Schedule, check_schedule, plain_number

_LOGGER = logging.getLogger(__name__)
_FORMAT, _VERSION = "capruner-gradual", 1


class GradualPruner:
    """Prune ``model`` to rising sparsities while it is trained.

    Arguments, the selection of parameters and the schedule are checked here, before any training.

    Args:
        model: any module, in any wrapper (``DistributedDataParallel``, ``torch.compile``) or none. With several processes all of them construct the pruner
            and call :meth:`step` at the same epochs; all end with the same weights, bit for bit.
        batches: calibration data, see :func:`capruner.prune`. It is iterated again at each update.
        loss_fn: see :func:`capruner.prune`.
        sparsity: ``{epoch: sparsity}``, rising; an entry of 0 needs no update. :mod:`capruner.training.schedules` computes such schedules.
        knobs: those of :func:`capruner.prune`. ``masks`` are the weights that are pruned already; they hold from now on. ``state_dir`` gets a folder for
            each update.

    Raises:
        ValueError: as :func:`capruner.prune`; a schedule that does not rise.
        TypeError: a knob that :func:`capruner.prune` does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        loss_fn: LossFunction = default_loss,
        *,
        sparsity: Mapping[float, float],
        **knobs: Any,
    ) -> None:
        self.schedule: Schedule = check_schedule(sparsity)
        job = _check(model, batches, loss_fn, list(self.schedule.values()), knobs)
        self.model = job.model
        self.history: list[dict[str, Any]] = []
        self._batches, self._loss_fn = plain_loader(batches), loss_fn
        # The parameters of now: some that are unfrozen later would join, without a mask in the states so far.
        chosen = {"params": list(job.parameters), "exclude": ()}
        self._knobs = {name: value for name, value in knobs.items() if name not in ("masks", "state_dir")} | chosen
        self._state_dir = None if knobs.get("state_dir") is None else Path(knobs["state_dir"])
        self._masks: dict[str, Tensor] = dict(job.masks)
        self._configuration: dict[str, Any] = {
            "method": job.config.method,
            "mask_type": str(job.settings.pattern),
            "global_sparsity": job.config.global_sparsity,
            "shapes": {name: list(p.shape) for name, p in job.parameters.items()},
        }
        self._applied: float | None = None  # the epoch of the schedule's last update so far
        self._handle: MaskHandle | None = None
        self._removed = False
        if not all(bool(mask.all()) for mask in self._masks.values()):
            self._hold(self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: bool tensor, False = pruned}`` of all selected parameters."""
        return dict(self._masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the selected weights, counted in the model as it is now."""
        parameters = first_names(self.model)
        return zero_share(parameters[name] for name in self._masks)

    @property
    def next(self) -> float | None:
        """Epoch of the next update; None after the last."""
        return next(iter(self._ahead()), None)

    def step(self, epoch: float) -> PruningResult | None:
        """Prune if an update is due at ``epoch``: to the highest sparsity whose epoch has come. Call it before each epoch.

        Updates that were skipped (training started in the middle of the schedule) are not made up for one by one. Calling it again at the same epoch
        does nothing.

        Returns:
            The result, already applied to the model; None if nothing was due.

        Raises:
            ValueError: ``epoch`` is not a number, the pruner was removed, or the data cannot be used; see :func:`capruner.prune`.
        """
        epoch = plain_number(epoch)
        if not is_number(epoch) or not math.isfinite(epoch):
            raise ValueError(f"epoch must be a number, got {epoch!r}")
        due = [update for update in self._ahead() if update <= epoch + SAME_EPOCH]
        if not due:
            return None
        if self._removed:
            raise ValueError("this pruner was removed and does not prune any more; construct another one")
        if len(due) > 1:
            _LOGGER.info("epoch %g: %d updates are due, only the last is made", epoch, len(due))
        with torch.inference_mode(False):
            result = self._prune(due[-1])
            result.apply(self.model)
            self._hold(result.masks())
        self._applied = due[-1]
        self.history.append(
            {"epoch": epoch, "sparsity": self.schedule[due[-1]], "predicted_loss": result.predicted_loss()}
        )
        return result

    def apply_to(self, model: nn.Module) -> None:
        """Zero the pruned weights of another copy of the model, once.

        For a moving average of the weights (``AveragedModel``, or the ``module`` of timm's ``ModelEmaV3``): call it after each update, and the average keeps
        the zeros. A deep copy that is trained itself needs ``capruner.mask_model(copy, masks=pruner.masks)`` instead.

        Raises:
            ValueError: the model does not have the pruned parameters.
        """
        mask_model(model, masks=self._masks).remove()

    def state_dict(self) -> dict[str, Any]:
        """Masks (one bit per weight) and place in the schedule: tensors and plain values, as ``torch.load(weights_only=True)`` reads them."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "configuration": self._configuration,
            "schedule": [[epoch, value] for epoch, value in self.schedule.items()],
            "applied": self._applied,
            "history": [dict(row) for row in self.history],
            "masks": {name: pack(mask) for name, mask in self._masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore masks and place in the schedule. The model's weights may be loaded before or after.

        To go back to an earlier, denser state of the same model object, load this state first and the weights after it: weights that are loaded while the
        present masks hold are pruned by them.

        Raises:
            ValueError: the state was saved for a different model, schedule, method or mask type. Nothing is changed then.
        """
        masks, applied, history = self._read(state)
        self._applied, self.history = applied, history
        self._hold(masks)

    def check_not_denser(self, state: Mapping[str, Any]) -> None:
        """Check, after a checkpoint was loaded into a model whose masks held, that they pruned nothing of it.

        Raises:
            ValueError: some weights that are pruned now are not pruned in ``state``.
        """
        masks, _, _ = self._read(state)
        if any(bool((mask & ~self._masks[name].cpu()).any()) for name, mask in masks.items()):
            raise ValueError(
                "the checkpoint has fewer pruned weights than this model object, whose masks held while it was loaded; resume with a new model object"
            )

    def remove(self) -> None:
        """Let the masks go; the weights stay as they are, and there are no further updates."""
        self._removed = True
        if self._handle is not None:
            self._handle.remove()

    def _ahead(self) -> list[float]:
        return [epoch for epoch in self.schedule if self._applied is None or epoch > self._applied]

    def _prune(self, update: float) -> PruningResult:
        if self._handle is not None:
            self._handle.apply()  # the calibration sees the pruned model, also after weights were written by hand
        folder = None if self._state_dir is None else self._state_dir / f"epoch-{update:g}"
        if self._state_dir is not None and self._applied is not None:  # its weights are in a checkpoint by now
            remove_state(self._state_dir / f"epoch-{self._applied:g}")
        return prune(
            self.model,
            self._batches,
            self._loss_fn,
            self.schedule[update],
            masks=self._masks,
            state_dir=folder,
            **self._knobs,
        )

    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = mask_model(self.model, masks=masks)
        self._masks = dict(self._handle.masks)

    def _read(self, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], float | None, list[dict[str, Any]]]:
        """Masks, epoch of the last update, and history, checked."""
        with reading_state(state, _FORMAT, _VERSION, "GradualPruner"):
            self._compare(state)
            shapes = self._configuration["shapes"]
            masks = {name: unpack(state["masks"][name], shape, name) for name, shape in shapes.items()}
            if state["applied"] is not None and state["applied"] not in self.schedule:
                raise TypeError(f"there is no update at epoch {state['applied']!r}")
            return masks, state["applied"], [dict(row) for row in state["history"]]

    def _compare(self, state: Mapping[str, Any]) -> None:
        shapes, saved = self._configuration["shapes"], state["configuration"]["shapes"]
        for name in (*shapes, *saved):
            if shapes.get(name) != saved.get(name):
                raise ValueError(
                    f"the state of the GradualPruner was saved for different parameters: {name} is {_shape(saved.get(name))} in it and "
                    f"{_shape(shapes.get(name))} here; construct the pruner with the same model, params and exclude"
                )
        here = {**self._configuration, "sparsity": self.schedule}
        there = {**state["configuration"], "sparsity": {epoch: value for epoch, value in state["schedule"]}}
        for name in ("sparsity", "method", "mask_type", "global_sparsity"):
            if here[name] != there[name]:
                raise ValueError(
                    f"the state of the GradualPruner was saved with {name}={there[name]}, and this one has {name}={here[name]}; construct it "
                    "with the same arguments"
                )


def plain_loader(batches: Any) -> Any:
    """The loader inside one that Accelerate has prepared: Accelerate counts every iteration of its own as one of the training loop."""
    return getattr(batches, "base_dataloader", batches)


def _check(
    model: nn.Module, batches: Iterable[Any] | None, loss_fn: LossFunction, sparsity: list[float], knobs: dict[str, Any]
) -> Job:
    """Check the arguments of all updates to come."""
    job = Job.of(model, batches, loss_fn, sparsity, **knobs)
    # Cuts every layer into blocks, or raises.
    Calibration(job.model, Batches(()), loss_fn, job.parameters, job.settings, job.config.kind)
    return job


def _shape(shape: list[int] | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"
