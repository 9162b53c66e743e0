"""Image folders and timm data sets as loaders, checked before the work starts."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from capruner.cli.arguments import UserError, describe
from capruner.distributed import processes
from capruner.report.architecture import input_size
from capruner.vision.image_folders import Converted, ImageFolder, Images, check_classes

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
SOURCES = ("torch", "hfds", "hfids", "tfds", "wds")
"""Prefixes of timm's data sets; timm takes any other name for that of a folder."""
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


def open_splits(data_dir: str, dataset: str, model: nn.Module) -> tuple[Dataset[Any], Dataset[Any]]:
    """Open the training and the validation split.

    Args:
        data_dir: folder with ``train/<class>/*`` and ``val/<class>/*``, or the root of a timm data set.
        dataset: "" for image folders, else a timm name such as ``torch/cifar10``.

    Raises:
        UserError: a missing folder, no images, classes that differ between the splits or from the model's outputs, or a model whose input is not an
            image of one or three channels.
    """
    root, mode = Path(data_dir), image_mode(model)
    if not root.is_dir():
        raise UserError(
            f"--data-dir {data_dir} is not a folder; it should hold train/<class>/*.jpg and val/<class>/*.jpg"
        )
    if not dataset:
        folders = {folder.name: ImageFolder(folder) for folder in (_split_folder(root, split) for split in SPLITS)}
        check_classes(folders, getattr(model, "num_classes", None))
        train, val = (Images(folder, mode) for folder in folders.values())
        return train, val
    if dataset.partition("/")[0] not in SOURCES:
        raise UserError(
            f"--dataset {dataset}: timm's data sets begin with {', '.join(f'{s}/' for s in SOURCES)}; for image folders leave it out"
        )
    train, val = (_open_dataset(root, dataset, split, mode) for split in SPLITS)
    outputs, classes = getattr(model, "num_classes", None), getattr(train, "class_to_idx", None)
    if classes and outputs is not None and len(classes) != outputs:
        raise UserError(
            f"--dataset {dataset} has {len(classes)} classes, the model {outputs} outputs; use a checkpoint trained on these classes, with "
            f"--model-kwargs num_classes={len(classes)}"
        )
    return train, val


def _split_folder(root: Path, split: str) -> Path:
    folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
    if folder is None:
        raise UserError(f"--data-dir {root} has no folder {split}/ (looked for {', '.join(SPLITS[split])})")
    return folder


def _open_dataset(root: Path, dataset: str, split: str, mode: str) -> Any:
    try:
        data = create_dataset(
            dataset, root=str(root), split="train" if split == "train" else "validation", input_img_mode=mode
        )
    except Exception as error:  # timm, torchvision and Hugging Face raise what they like
        raise UserError(
            f"the {split} split of --dataset {dataset} in {root} cannot be opened: {describe(error)}"
        ) from error
    if isinstance(data, IterableDataset):
        return data
    if not len(data):
        raise UserError(f"the {split} split of --dataset {dataset} in {root} holds no image")
    return Images(data.reader, mode) if isinstance(data, ImageDataset) else Converted(data, mode)


def image_mode(model: nn.Module) -> str:
    """PIL's mode for the model's input, ``L`` or ``RGB``; raise ``UserError`` unless it has one or three channels."""
    channels = input_size(model)[0]
    if channels not in (1, 3):
        raise UserError(
            f"the model takes {channels} input channels; images are read with 3 (RGB) or 1 (grey). "
            "Use --model-kwargs in_chans=3 or in_chans=1, or prune with capruner.prune and a loader of your own"
        )
    return "L" if channels == 1 else "RGB"


def loader(
    data: Dataset[Any],
    config: dict[str, Any],
    batch_size: int,
    workers: int,
    *,
    augment: bool = False,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
    limit: int | None = None,
) -> DataLoader[Any]:
    """Batches of ``(images, labels)``, transformed as ``config`` (see :func:`preprocessing`) says; augmented only on request."""
    data.transform = create_transform(**config, is_training=augment)  # type: ignore[attr-defined]
    if limit is not None and limit < len(data):  # type: ignore[arg-type]
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]  # type: ignore[arg-type]
        data = torch.utils.data.Subset(data, chosen.tolist())
    return DataLoader(
        data,
        batch_size,
        shuffle=shuffle,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=generator,
    )


def preprocessing(args: Any, model: nn.Module) -> dict[str, Any]:
    """timm's data configuration for a command line with :func:`capruner.cli.arguments.add_preprocessing`."""
    for flag, value in (("--img-size", args.img_size), ("--crop-pct", args.crop_pct)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value}: must be more than 0")
    if args.interpolation and args.interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation {args.interpolation}: there are {', '.join(INTERPOLATIONS)}")
    size = input_size(model, args.img_size)
    given = {"input_size": size, "crop_pct": args.crop_pct, "interpolation": args.interpolation}
    config = resolve_data_config({key: value for key, value in given.items() if value is not None}, model=model)
    channels = size[0]
    per_channel = {"mean": args.mean or config["mean"], "std": args.std or config["std"]}
    found = config | {key: _per_channel(values, channels, f"--{key}") for key, values in per_channel.items()}
    if args.checkpoint and not (args.mean or args.std or args.crop_pct) and processes().rank == 0:
        # A checkpoint does not record its preprocessing, and a mismatch silently costs accuracy.
        mean, std = (" ".join(f"{value:g}" for value in found[key]) for key in ("mean", "std"))
        print(
            f"note: images are preprocessed as timm says for {args.model}: --mean {mean} --std {std} --crop-pct {found['crop_pct']:g}; "
            f"pass the preprocessing that {args.checkpoint} was trained with if it differs",
            file=sys.stderr,
        )
    return found


def _per_channel(values: Sequence[float], channels: int, flag: str) -> tuple[float, ...]:
    """One value for each channel; a single channel gets the average of a configuration's three."""
    if len(values) != channels and channels == 1:
        return (sum(values) / len(values),)
    if len(values) != channels:
        raise UserError(f"{flag} has {len(values)} values, the model's input {channels} channels")
    return tuple(values)


class Part(Dataset[Any]):
    """Some images of a data set, with their own transform."""

    def __init__(self, data: Dataset[Any], chosen: Sequence[int]) -> None:
        self._data, self._chosen = copy.copy(data), chosen

    @property
    def transform(self) -> Any:
        """The transform of each image."""
        return self._data.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self._data.transform = transform  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        return self._data[self._chosen[index]]


def hold_out(data: Dataset[Any], count: int | None, seed: int) -> tuple[Part, Part]:
    """Split off ``count`` random images: the rest, and these. None: 2,000, but at most a fifth. Raise ``UserError`` if none would remain."""
    total = len(data)  # type: ignore[arg-type]
    if count is None:
        count = min(2000, max(1, total // 5))
    if not count < total:
        raise UserError(
            f"--held-out {count}: the training split has {total} images, and some must be left to calibrate on"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return Part(data, order[count:]), Part(data, order[:count])


def sampled_batch_size(kwargs: Mapping[str, Any], default: int) -> int:
    """``batch_size`` in a recipe's ``grad_sampler_kwargs``; any other parameter raises ``UserError``."""
    if others := sorted(kwargs.keys() - {"batch_size", "device"}):
        raise UserError(f"grad_sampler_kwargs: {others} mean nothing here; batch_size does")
    return int(kwargs.get("batch_size", default))


class CalibrationBatches:
    """SparseML's ``data_loader_builder`` over a training split: endless, reshuffled at each pass and at each call.

    Batches are ``([images], {}, labels)`` on ``device``, because SparseML's own sampler moves nothing. The order depends on ``seed`` alone.
    """

    def __init__(
        self,
        data: Dataset[Any],
        config: dict[str, Any],
        batch_size: int,
        workers: int,
        augment: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._arguments = (data, config)
        self._batch_size = batch_size
        self._device = device
        # Kept, so that a second calibration draws other batches than the first.
        generator = torch.Generator().manual_seed(seed)
        self._options = {"workers": workers, "augment": augment, "generator": generator}

    def __call__(
        self, kwargs: dict[str, Any] | None = None, **more: Any
    ) -> Iterator[tuple[list[Tensor], dict[str, Any], Tensor]]:
        size = sampled_batch_size((kwargs or {}) | more, self._batch_size)
        batches = loader(*self._arguments, batch_size=size, shuffle=True, **self._options)  # type: ignore[arg-type]
        while True:
            for images, labels in batches:
                yield [images.to(self._device)], {}, labels.to(self._device)


class PlainBatches:
    """The batches of a builder as ``(images, labels)``, for :func:`capruner.prune`; each pass calls the builder again."""

    def __init__(self, builder: Callable[[dict[str, Any]], Iterator[Any]], kwargs: Mapping[str, Any]) -> None:
        self._builder = builder
        self._kwargs = dict(kwargs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (images,), _, labels in self._builder(self._kwargs):
            yield images, labels
