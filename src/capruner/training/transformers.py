"""Gradual pruning in Hugging Face's ``Trainer``: one callback.

    from capruner.training.transformers import PruningCallback

    trainer = Trainer(model, args, train_dataset=data, callbacks=[PruningCallback({0: 0.5, 2: 0.75, 4: 0.9}, num_grads=1024)])
    trainer.train()

Needs ``transformers``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from capruner.batches import default_loss
from capruner.bits import pack
from capruner.calibration.gradients import LossFunction
from capruner.files import digest, save_tensors
from capruner.models.wrappers import first_names, unwrap
from capruner.training.gradual import GradualPruner, plain_loader
from capruner.training.schedules import check_schedule

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as missing:
    raise ImportError(
        "capruner.training.transformers needs Hugging Face's transformers: pip install transformers accelerate"
    ) from missing

MASKS = "capruner_masks.safetensors"
_KEY = "capruner"
_LOGGER = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):
    """Prune at the start of the epochs in ``sparsity``; pruned weights are 0 after every optimizer step from then on.

    Each checkpoint gets a file ``capruner_masks.safetensors``. ``train(resume_from_checkpoint=...)`` restores the masks from it and checks them against
    ``trainer_state.json``. A checkpoint without the file, or in an unknown place, gives the same masks by the zeros of its weights, or is refused.

    The best checkpoint (``load_best_model_at_end``, early stopping) is the best since the last update, so that it has the sparsity reached. Each update appends
    the sparsity to ``state.log_history``.

    Args:
        sparsity: ``{epoch: sparsity}``, see :class:`capruner.GradualPruner`. Updates are made at the start of epochs; one at 1.5 is made at 2.
        batches: calibration data; the trainer's training data if None.
        loss_fn: as in :func:`capruner.prune`; the ``loss`` of the model's output if left out.
        knobs: those of :func:`capruner.prune`.

    Attributes:
        pruner: the :class:`capruner.GradualPruner`, from the construction of the ``Trainer`` on (or, with ``add_callback``, from the start of training).
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
        self._loss_fn, self._knobs = loss_fn, knobs
        self._training = _TrainingBatches()
        self._batches = self._training if batches is None else batches

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Construct the pruner, which checks all arguments."""
        if model is not None and (self.pruner is None or self.pruner.model is not unwrap(model)):
            self.pruner = GradualPruner(model, self._batches, self._loss_fn, sparsity=self.sparsity, **self._knobs)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Restore masks and place in the schedule when training resumes.

        Raises:
            ValueError: the masks of the checkpoint are nowhere; or as :meth:`capruner.GradualPruner.load_state_dict`.
        """
        self.on_init_end(args, state, control, model)
        self._training.loader = train_dataloader
        assert self.pruner is not None
        saved = state.stateful_callbacks.get(_KEY)
        if saved is not None:
            whole = {**saved, "masks": _find_masks(args, state, saved, self.pruner)}
            self.pruner.check_not_denser(whole)
            self.pruner.load_state_dict(whole)
        self._record(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune if an update is due."""
        assert self.pruner is not None
        if self.pruner.step(state.epoch or 0) is None:
            return
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, "sparsity": self.pruner.sparsity})
        # The best so far is one of a lower sparsity.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._record(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks beside the checkpoint."""
        assert self.pruner is not None
        folder = _folder(args, state)
        if args.should_save and not folder.is_dir():
            _LOGGER.warning("%s does not exist, so the masks are not saved; the zeros of the weights have them", folder)
        elif args.should_save:
            saved = self.pruner.state_dict()
            save_tensors(folder / MASKS, saved["masks"], _header(saved))

    def _record(self, state: TrainerState) -> None:
        """Put everything but the masks into what becomes ``trainer_state.json``."""
        assert self.pruner is not None
        state.stateful_callbacks[_KEY] = _header(self.pruner.state_dict())


class _TrainingBatches:
    """The trainer's training data, which is there when training has started."""

    loader: Any = None

    def __iter__(self) -> Iterator[Any]:
        yield from plain_loader(self.loader)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _header(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON part of a state, with a digest of the masks in their place."""
    return {name: value for name, value in saved.items() if name != "masks"} | {"sha256": _digest(saved["masks"])}


def _digest(masks: Mapping[str, Tensor]) -> str:
    return digest(part for named in sorted(masks.items()) for part in named)


def _find_masks(
    args: TrainingArguments, state: TrainerState, saved: Mapping[str, Any], pruner: GradualPruner
) -> dict[str, Tensor]:
    """The masks of ``saved``, from the checkpoint's file or the zeros of the loaded weights; raise ``ValueError`` if neither has them."""
    folders = [_folder(args, state)]
    if isinstance(named := args.resume_from_checkpoint, str):
        folders.insert(0, Path(named))
    for path in (folder / MASKS for folder in folders):
        if path.is_file():
            try:
                masks = load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}; delete it, or resume from another checkpoint") from error
            if _digest(masks) == saved["sha256"]:
                return masks
    parameters = first_names(pruner.model)
    masks = {name: pack(parameters[name].detach() != 0) for name in pruner.masks}
    if _digest(masks) == saved["sha256"]:
        return masks
    raise ValueError(
        f"the masks of step {state.global_step} were not found: no {MASKS} that fits is in {' or '.join(map(str, folders))}, and the zeros of the weights are "
        "not those masks; set TrainingArguments.resume_from_checkpoint to the checkpoint's folder too"
    )
