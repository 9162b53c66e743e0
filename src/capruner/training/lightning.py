"""Gradual pruning in Lightning: one callback.

    from capruner.training.lightning import PruningCallback

    trainer = lightning.Trainer(callbacks=[PruningCallback({0: 0.5, 2: 0.75, 4: 0.9}, num_grads=1024)])
    trainer.fit(module, loader)

Needs ``lightning`` or ``pytorch_lightning``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from capruner.batches import default_loss
from capruner.calibration.gradients import LossFunction
from capruner.models.wrappers import unwrap
from capruner.training.gradual import GradualPruner
from capruner.training.schedules import check_schedule

try:
    # Both may be installed: the one that the program uses.
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback, LightningModule, Trainer
    else:
        from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as missing:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        raise ImportError(
            "capruner.training.lightning needs Lightning: pip install lightning (or pytorch-lightning)"
        ) from missing


class PruningCallback(Callback):
    """Prune at the start of the epochs in ``sparsity``; pruned weights are 0 after every optimizer step from then on.

    Masks and the place in the schedule are part of Lightning's checkpoints. ``fit(ckpt_path=...)`` restores them before the first step. The sparsity is
    logged as ``sparsity``. A ``ModelCheckpoint`` that monitors a metric compares all epochs, so its best may be one of an early, low sparsity. An averaged copy
    of the weights keeps the zeros after ``callback.pruner.apply_to(copy)``.

    Args:
        sparsity: ``{epoch: sparsity}``, see :class:`capruner.GradualPruner`.
        batches: calibration data; the trainer's training data loader if None, without the hooks of the module that change batches.
        loss_fn: as in :func:`capruner.prune`; it gets what the module's ``forward`` returns.
        knobs: those of :func:`capruner.prune`. Parameter names are the module's, such as ``net.head.weight``.

    Attributes:
        pruner: the :class:`capruner.GradualPruner`, from the start of ``fit`` on.
    """

    def __init__(
        self,
        sparsity: Mapping[float, float],
        batches: Iterable[Any] | None = None,
        loss_fn: LossFunction = default_loss,
        **knobs: Any,
    ) -> None:
        self.sparsity = check_schedule(sparsity)
        self.pruner: GradualPruner | None = None
        self._batches, self._loss_fn, self._knobs = batches, loss_fn, knobs
        self._saved: dict[str, Any] | None = None
        self._training = _TrainingBatches()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Construct the pruner, which checks all arguments; restore it when training resumes.

        Raises:
            ValueError: as :class:`capruner.GradualPruner`; the checkpoint is from before an update that this module has gone through already.
        """
        self._training.trainer = trainer
        if self.pruner is None or self.pruner.model is not unwrap(pl_module):
            batches = self._training if self._batches is None else self._batches
            self.pruner = GradualPruner(pl_module, batches, self._loss_fn, sparsity=self.sparsity, **self._knobs)
        elif self._saved is not None:
            self.pruner.check_not_denser(self._saved)
        self._restore()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore, with the strategies that load checkpoints late."""
        self._restore()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if an update is due."""
        assert self.pruner is not None
        self.pruner.step(trainer.current_epoch)
        pl_module.log("sparsity", self.pruner.sparsity)

    def state_dict(self) -> dict[str, Any]:
        """The pruner's."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a pruner: Lightning loads it before ``on_fit_start``."""
        self._saved = state_dict

    def _restore(self) -> None:
        if self._saved is not None and self.pruner is not None:
            self.pruner.load_state_dict(self._saved)
            self._saved = None


class _TrainingBatches:
    """The trainer's training data, which is there when training has started."""

    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[Any]:
        assert self.trainer is not None
        loader = self.trainer.train_dataloader
        if loader is None or isinstance(loader, Mapping | list | tuple):
            raise ValueError(
                "training uses several data loaders; pass the calibration data as PruningCallback(batches=...)"
            )
        for batch in loader:
            yield self.trainer.precision_plugin.convert_input(batch)
