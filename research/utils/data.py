"""Image folders (or any data set that timm knows) as loaders, checked before the work starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from capruner.distributed import world
from research.utils.cli import UserError

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
SOURCES = ("torch", "hfds", "hfids", "tfds", "wds")
"""What timm's names of data sets begin with; it takes any other for that of a folder."""
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}


def open_splits(data_dir: str, dataset: str, model: nn.Module) -> tuple[Dataset[Any], Dataset[Any]]:
    """The training and the validation split, see :func:`open_split`.

    Raises:
        UserError: also where the two number their classes differently.
    """
    train, val = (open_split(data_dir, dataset, split, model) for split in ("train", "val"))
    ours, theirs = _classes(train), _classes(val)
    if ours != theirs:
        odd = sorted(set(ours or ()) ^ set(theirs or ()))
        raise UserError(f"train/ and val/ in {data_dir} differ in their class folders: {', '.join(map(str, odd[:8]))}")
    return train, val


def _classes(data: Dataset[Any]) -> dict[str, int] | None:
    """``{class name: label}`` of image folders; None where a data set does not say."""
    return getattr(getattr(data, "reader", None), "class_to_idx", None)


def image_mode(model: nn.Module) -> str:
    """PIL's mode for the model's input: ``L`` for one channel, else ``RGB``."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    return "L" if first is not None and first.in_channels == 1 else "RGB"


def open_split(data_dir: str, dataset: str, split: str, model: nn.Module) -> Dataset[Any]:
    """One split of the data.

    Args:
        data_dir: folder with ``train/<class>/*`` and ``val/<class>/*``, or the root that a timm data set wants.
        dataset: "" for image folders, else a timm name such as ``torch/cifar10``.
        split: ``train`` or ``val``.

    Raises:
        UserError: no such folder, no image in it, or another number of classes than the model has.
    """
    root = Path(data_dir)
    if not root.is_dir():
        raise UserError(
            f"--data-dir {data_dir} is not a folder; it should hold train/<class>/*.jpg and val/<class>/*.jpg"
        )
    if dataset and dataset.partition("/")[0] not in SOURCES:
        raise UserError(
            f"--dataset {dataset}: timm's data sets begin with {', '.join(f'{s}/' for s in SOURCES)}; for image folders leave it out"
        )
    try:
        if dataset:
            where = {"root": str(root), "split": "train" if split == "train" else "validation"}
            found = create_dataset(dataset, input_img_mode=image_mode(model), **where)
        else:
            folder = next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)
            if folder is None:
                raise UserError(f"--data-dir {data_dir} has no folder {split}/ (looked for {', '.join(SPLITS[split])})")
            found = create_dataset("", root=str(folder), input_img_mode=image_mode(model))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"the {split} split of {data_dir} cannot be read: {error}") from error
    if not len(found):
        raise UserError(f"the {split} split of {data_dir} holds no image")
    classes = _classes(found)
    outputs = getattr(model, "num_classes", None)
    if classes is not None and outputs is not None and len(classes) != outputs:
        raise UserError(
            f"{data_dir} has {len(classes)} classes, the model {outputs} outputs; use a checkpoint trained on these classes, with "
            f"--model-kwargs num_classes={len(classes)}"
        )
    return found


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
    """Batches of ``(images, labels)``, transformed as ``config`` (see :func:`preprocessing`) says; training augmentation only on request."""
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


def preprocessing_arguments(parser: Any) -> None:
    """timm's flags for how images become tensors; what is not given comes from the model's configuration."""
    group = parser.add_argument_group("preprocessing (default: as the model's configuration says)")
    group.add_argument(
        "--img-size", type=int, help="side of the input in pixels (default: model kwarg img_size, or the model's)"
    )
    group.add_argument("--mean", type=float, nargs="+", help="per channel, 0.485 0.456 0.406 say")
    group.add_argument("--std", type=float, nargs="+")
    group.add_argument("--crop-pct", type=float, help="share of the resized image that the centre crop keeps")
    group.add_argument("--interpolation", help="bicubic, bilinear, ...")


def preprocessing(args: Any, model: nn.Module) -> dict[str, Any]:
    """The data configuration of timm for a command line with :func:`preprocessing_arguments`."""
    for flag, value in (("--img-size", args.img_size), ("--crop-pct", args.crop_pct)):
        if value is not None and not value > 0:
            raise UserError(f"{flag} {value}: must be more than 0")
    if args.interpolation and args.interpolation not in INTERPOLATIONS:
        raise UserError(f"--interpolation {args.interpolation}: there are {', '.join(INTERPOLATIONS)}")
    size = args.img_size or args.model_kwargs.get("img_size")
    given = {
        "in_chans": args.model_kwargs.get("in_chans"),
        "img_size": size,
        "crop_pct": args.crop_pct,
        "interpolation": args.interpolation,
    }
    config = resolve_data_config({key: value for key, value in given.items() if value is not None}, model=model)
    channels = config["input_size"][0]
    per_channel = {"mean": args.mean or config["mean"], "std": args.std or config["std"]}
    found = config | {key: _per_channel(values, channels, f"--{key}") for key, values in per_channel.items()}
    if args.checkpoint and not (args.mean or args.std or args.crop_pct) and world()[0] == 0:
        # The weights say nothing of it, and with another preprocessing than in training they are bad without any error.
        mean, std = (" ".join(f"{value:g}" for value in found[key]) for key in ("mean", "std"))
        print(
            f"note: images are preprocessed as timm says for {args.model}: --mean {mean} --std {std} --crop-pct {found['crop_pct']:g}; "
            f"give what {args.checkpoint} was trained with, where it is something else",
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


class CalibrationBatches:
    """SparseML's ``data_loader_builder`` over a training split: endless, reshuffled at each pass and at each call.

    Batches are ``([images], {}, labels)`` on ``device``: SparseML's own sampler moves nothing. ``grad_sampler_kwargs`` of a recipe may set
    ``batch_size``. The order follows from ``seed`` alone.
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
        # Lives as long as this object, so that a second calibration draws other batches than the first.
        generator = torch.Generator().manual_seed(seed)
        self._options = {"workers": workers, "augment": augment, "generator": generator}

    def __call__(
        self, kwargs: dict[str, Any] | None = None, **more: Any
    ) -> Iterator[tuple[list[Tensor], dict[str, Any], Tensor]]:
        given = (kwargs or {}) | more
        size = int(given.pop("batch_size", self._batch_size))
        given.pop("device", None)
        if given:
            raise UserError(f"grad_sampler_kwargs: {sorted(given)} mean nothing here; batch_size does")
        batches = loader(*self._arguments, batch_size=size, shuffle=True, **self._options)  # type: ignore[arg-type]
        while True:
            for images, labels in batches:
                yield [images.to(self._device)], {}, labels.to(self._device)
