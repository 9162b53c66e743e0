"""Flags of the original repository's scripts without a counterpart here: harmless ones are accepted with a note, the others refused with a replacement.

Flags with the same meaning are aliases in the parsers (``--checkpoint-path``, ``--output-dir``, ``--grad-sampler-batch-size``, ``--opt-kwargs``, ...).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

from capruner.cli.arguments import flag

_LOADER = "calibration images always come from the training split"
ONE_SHOT = {
    "gs_loader": (0, _LOADER),
    "no_prefetcher": (0, "one-shot pruning has no prefetcher"),
    "pin_mem": (0, "memory is pinned where there is a GPU"),
}
TRAINING = {
    "gs_loader": (0, _LOADER),
    "gs_no_aug": (0, "gradient samples are not augmented unless --gs-aug is given"),
    "gs_distributed": (0, "the processes always share the gradient samples"),
    "train_split": (1, "the training split is found by its folder's name"),
    "val_split": (1, "the validation split is found by its folder's name"),
    "log_interval": (1, "progress is a bar, and a line per epoch"),
    "recovery_interval": (1, "last.pt is written after each epoch"),
    "checkpoint_hist": (1, "the best weights per sparsity are kept"),
    "eval_metric": (1, "the best weights are those with the best top-1 accuracy"),
    "worker_seeding": (1, "workers are seeded from --seed and the epoch"),
    "no_ddp_bb": (0, "BatchNorm statistics follow --dist-bn"),
    "synchronize_step": (0, "it changes no result"),
    "use_multi_epochs_loader": (0, "it changes no result"),
    "fuser": (1, "it changes no result"),
    "fast_norm": (0, "normalisation runs as torch does it"),
    "amp_impl": (1, "mixed precision is torch's"),
    "no_resume_opt": (0, "--resume restores the optimizer"),
}
"""``{flag: (number of values, why it needs no replacement)}``."""
GONE: dict[str, tuple[int | str, str]] = {
    "gs_no_training": (0, "gradient samples are drawn in evaluation mode; leave it out"),
    "gs_aa": (0, "use --gs-aug"),
    "apex_amp": (0, "use --amp"),
    "gp": (1, "use --model-kwargs global_pool=NAME"),
    "in_chans": (1, "use --model-kwargs in_chans=N"),
    "input_size": (3, "use --img-size"),
    "bn_momentum": (1, "use --model-kwargs bn_momentum=X"),
    "bn_eps": (1, "use --model-kwargs bn_eps=X"),
    "bn_tf": (0, "use --model-kwargs bn_eps=0.001 bn_momentum=0.01"),
    "drop_connect": (1, "use --drop-path"),
    "drop_block": (1, "use --model-kwargs drop_block_rate=X"),
    "class_map": (1, "name the class folders instead"),
    "dataset_download": (0, "download the data set first"),
    "head_init_scale": (1, "scale the head in the checkpoint"),
    "head_init_bias": (1, "set the head's bias in the checkpoint"),
    "epoch_repeats": (1, "raise --epochs"),
    "start_epoch": (1, "use --resume"),
    "aug_splits": (1, "augmentation splits are not supported"),
    "resplit": (0, "augmentation splits are not supported"),
    "jsd": (0, "augmentation splits are not supported"),
    "jsd_loss": (0, "augmentation splits are not supported"),
    "split_bn": (0, "augmentation splits are not supported"),
    "tta": (1, "test-time augmentation is not supported"),
    "torchscript": (0, "train without it"),
    "torchcompile": ("?", "train without it"),
    "model_ema_force_cpu": (0, "the average is kept beside the model"),
    "validation_batch_size_multiplier": (1, "use --val-batch-size"),
    "save_images": (0, "batches are not saved"),
}
"""``{flag: (number of values as argparse has it, what to use)}``."""
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "in_chans": (3,),
    "drop_connect": (0,),
    "drop_block": (0,),
    "head_init_scale": (1,),
    "head_init_bias": (0,),
    "epoch_repeats": (0,),
    "start_epoch": (0,),
    "aug_splits": (0,),
    "tta": (0, 1),
    "validation_batch_size_multiplier": (1,),
}
"""Values of flags in ``GONE`` that ask for nothing."""


class Idle(argparse.Action):
    """A flag without effect; a note says why."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        told = vars(parser).setdefault("_told", set())
        if self.dest not in told and os.environ.get("RANK", "0") == "0":
            print(f"note: {flag(self.dest)} has no effect: {self.const}", file=sys.stderr)
        told.add(self.dest)


class Gone(argparse.Action):
    """A refused flag, unless its value asks for nothing; the error names a replacement."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if isinstance(values, list) and len(values) == 1 and asks_for_nothing(self, values[0]):
            return
        parser.error(f"{flag(self.dest)} is not supported: {self.const}")


def add_idle(
    parser: argparse.ArgumentParser, idle: Mapping[str, tuple[int | str, str]], action: type[argparse.Action] = Idle
) -> None:
    """Accept the flags of ``idle`` without listing them in ``--help``."""
    for name, (count, why) in idle.items():
        parser.add_argument(
            flag(name), action=action, nargs=count, const=why, help=argparse.SUPPRESS, default=argparse.SUPPRESS
        )


def asks_for_nothing(action: argparse.Action, value: Any) -> bool:
    """Whether a flag of the original is set to a value without effect, on the command line or (None and False too) in a configuration file."""
    if isinstance(action, Idle) or not isinstance(action, Gone):
        return isinstance(action, Idle)
    if value is None or value is False or value == "":
        return True
    try:
        return value is not True and float(value) in _NEUTRAL.get(action.dest, ())
    except (TypeError, ValueError):
        return False
