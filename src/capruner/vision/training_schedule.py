"""timm's learning-rate schedulers.

All but plateau compute the rate from the epoch (or step) and the command line, so a resumed run computes it again and follows changed arguments.
Plateau keeps its rate in the optimizer and counts epochs without progress: its state is saved.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from capruner.cli.arguments import UserError, describe


class Schedule:
    """The scheduler of ``--sched``; none with ``--sched none``, or if the recipe sets the learning rate (``active`` is False).

    Raises:
        UserError: timm cannot build it.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int, active: bool
    ) -> None:
        self._scheduler: Any = None
        if active:
            try:
                with warnings.catch_warnings():
                    # About plateau's state, which timm does not save: it is saved here.
                    warnings.simplefilter("ignore", FutureWarning)
                    self._scheduler, _ = create_scheduler_v2(
                        optimizer, **scheduler_kwargs(args), updates_per_epoch=steps_per_epoch
                    )
            except Exception as error:  # whatever timm trips over
                raise UserError(f"--sched {args.sched} cannot be built: {describe(error)}") from error
        self.by_metric = isinstance(self._scheduler, PlateauLRScheduler)
        self.place(0, 0)

    def place(self, epoch: int, steps: int) -> None:
        """Set the rate after ``epoch`` epochs of ``steps`` steps in total; plateau's comes with its state."""
        if self._scheduler is not None and not self.by_metric:
            self._scheduler.step(epoch)
            self._scheduler.step_update(steps)

    def after_step(self, steps: int) -> None:
        """Set the rate after step number ``steps``."""
        if self._scheduler is not None:
            self._scheduler.step_update(steps)

    def after_epoch(self, epoch: int, top1: float) -> None:
        """Set the rate after epoch number ``epoch``; 0 is the model before training."""
        if self._scheduler is not None and epoch > 0:
            self._scheduler.step(epoch, top1)

    def state_dict(self) -> dict[str, Any] | None:
        """Plateau's counters; None for other schedulers."""
        if not self.by_metric:
            return None
        return {"plateau": self._scheduler.lr_scheduler.state_dict(), "restore_lr": self._scheduler.restore_lr}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore :meth:`state_dict`."""
        if self.by_metric and state is not None:
            self._scheduler.lr_scheduler.load_state_dict(state["plateau"])
            self._scheduler.restore_lr = state["restore_lr"]
