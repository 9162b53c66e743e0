"""Images for training, evaluation and gradient samples.

They depend on seed, epoch and step alone, so a resumed run sees the same images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from capruner.cli.arguments import UserError
from capruner.vision.data import sampled_batch_size
from capruner.vision.training_arguments import uses_mixup
from capruner.vision.training_processes import Processes

Batch = tuple[list[Tensor], dict[str, Any], Tensor]


def train_loader(
    data: Dataset[Any], config: dict[str, Any], args: argparse.Namespace, processes: Processes, num_classes: int
) -> tuple[Any, Mixup | None]:
    """timm's training loader, and the mixup to apply to each batch: None if the loader mixes itself, or nothing is mixed.

    Raises:
        UserError: a stream of unknown length, or fewer images than one batch.
    """
    if isinstance(data, IterableDataset):
        raise UserError(f"--dataset {args.dataset} is a stream; gradual pruning needs a data set of known length")
    if len(data) < args.batch_size * processes.size:  # type: ignore[arg-type]
        raise UserError(
            f"the training split has {len(data)} images, fewer than one batch on each process; "  # type: ignore[arg-type]
            f"lower --batch-size, now {args.batch_size}"
        )
    if args.aug_repeats and processes.size == 1:
        print(
            f"note: --aug-repeats {args.aug_repeats} is for several processes; it is off in this run of one",
            file=sys.stderr,
        )
    mixup = _mixup(args, num_classes) if uses_mixup(args) else None
    in_loader = isinstance(mixup, FastCollateMixup)
    loader = create_loader(
        data,
        **{key: config[key] for key in ("input_size", "mean", "std", "crop_pct")},
        batch_size=args.batch_size,
        is_training=True,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        **{name: getattr(args, name) for name in _AUGMENTATION},
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats if processes.size > 1 else 0,
        interpolation=config["interpolation"] if args.no_aug else args.train_interpolation,
        num_workers=args.workers,
        distributed=processes.size > 1,
        collate_fn=mixup if in_loader else None,
        pin_memory=args.pin_mem,
        device=processes.device,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=False,  # random states of persistent workers depend on all epochs before
    )
    _allow_zero_bits(data.transform)  # type: ignore[attr-defined]
    return loader, None if in_loader else mixup


def _allow_zero_bits(transform: Any) -> None:
    """Let timm's augmentation policies posterize to 0 bits, as the strongest do now and then: Pillow 13 refuses that, and earlier ones return black."""
    for step in transform.transforms:
        for op in itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if op.aug_fn is posterize:
                op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


_AUGMENTATION = (
    *("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob"),
    *("grayscale_prob", "gaussian_blur_prob"),
)
"""Arguments that have the same names in timm's loader."""


def _mixup(args: argparse.Namespace, num_classes: int) -> Mixup:
    kind = Mixup if args.no_prefetcher else FastCollateMixup
    return kind(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def validation_loader(
    data: Dataset[Any], config: dict[str, Any], args: argparse.Namespace, processes: Processes
) -> DataLoader[Any]:
    """Loader of this process's share of the validation images; each image is in one share only."""
    data.transform = create_transform(**config)  # type: ignore[attr-defined]
    chosen = list(range(len(data)))  # type: ignore[arg-type]
    if args.val_limit is not None:
        chosen = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[: args.val_limit].tolist()
    share = Subset(data, chosen[processes.rank :: processes.size])
    return DataLoader(
        share, args.val_batch_size, num_workers=args.workers, pin_memory=args.pin_mem, generator=torch.Generator()
    )


class GradientSamples:
    """SparseML's ``data_loader_builder``: endless batches of ``([images], {}, labels)`` on the model's device.

    Together, the processes draw what a single one would: each takes every ``size``-th batch. The order depends on the seed and on the number of
    optimizer steps, so every calibration sees new images, and a resumed run the same ones.

    Args:
        step: returns the number of optimizer steps taken.
    """

    def __init__(
        self,
        data: Dataset[Any],
        config: dict[str, Any],
        args: argparse.Namespace,
        processes: Processes,
        step: Callable[[], int],
    ) -> None:
        self._data = copy.copy(data)  # it has a transform of its own
        self._data.transform = create_transform(**config, is_training=args.gs_aug)  # type: ignore[attr-defined]
        self._args, self._processes, self._step = args, processes, step
        self._drawn = (-1, 0)

    def __call__(self, kwargs: dict[str, Any] | None = None, **more: Any) -> Callable[[], Iterator[Batch]]:
        size = sampled_batch_size((kwargs or {}) | more, self._args.gs_batch_size)
        return lambda: self._batches(size)

    def _batches(self, size: int) -> Iterator[Batch]:
        step = self._step()
        again = self._drawn[1] + 1 if self._drawn[0] == step else 0  # a recomputation within one update
        self._drawn = (step, again)
        entropy = np.random.SeedSequence([self._args.seed, step, again])
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        device, count = self._processes.device, len(self._data)  # type: ignore[arg-type]
        first = self._processes.rank
        while True:
            order = torch.randperm(count, generator=generator).tolist()
            batches = [order[i : i + size] for i in range(0, count - size + 1, size)] or [order]
            mine = batches[first :: self._processes.size]
            first = (first - len(batches)) % self._processes.size
            loader = DataLoader(self._data, batch_sampler=mine, num_workers=self._args.workers, generator=generator)
            for images, labels in loader:
                yield [images.to(device)], {}, labels.to(device)
