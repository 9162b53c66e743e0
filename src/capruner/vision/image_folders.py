"""Image folders ``<split>/<class>/*.jpg``: their classes, and their images with 8 bits per channel.

Labels and the order of images are those of timm's own reader. Hidden files and folders are skipped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from capruner.cli.arguments import UserError
from capruner.distributed import processes
from capruner.text import some

FORMATS = (".jpg", ".jpeg", ".png")
OTHER_FORMATS = {".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".npy", ".ppm", ".tif", ".tiff", ".webp"}
"""Endings of images that are read, and of files that were probably meant as images."""

_log = logging.getLogger(__name__)


class ImageFolder(Reader):
    """The images of one split, by class.

    Attributes:
        samples: ``(path, label)``, sorted as timm sorts them.
        class_to_idx: ``{name of the innermost folder: label}``.
        unread: ``{folder: {ending: count}}`` of images in formats that are not read.

    Raises:
        UserError: two classes of the same name, images outside a class folder, or no images.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = str(root)
        images: dict[str, list[str]] = {}
        self.unread: dict[str, Counter[str]] = {}
        for folder, inner, files in os.walk(root, followlinks=True):
            inner[:] = [name for name in inner if not name.startswith(".")]
            shown = [name for name in files if not name.startswith(".")]
            chosen = [os.path.join(folder, name) for name in shown if _ending(name) in FORMATS]
            place = os.path.relpath(folder, root)
            if chosen:
                images[place] = chosen
            if other := Counter(_ending(name) for name in shown if _ending(name) in OTHER_FORMATS):
                self.unread[place] = other
        if "." in images:
            raise UserError(
                f"{root} holds images outside a class folder, {os.path.basename(images['.'][0])} for example; "
                f"move each into the folder of its class, {root}/<class>/"
            )
        self.class_to_idx = self._classes(images)
        pairs = [(path, self.class_to_idx[os.path.basename(place)]) for place in images for path in images[place]]
        self.samples = sorted(pairs, key=lambda pair: natural_key(pair[0]))
        if not self.samples:
            raise UserError(f"{root} holds no image ({', '.join(FORMATS)}) in a class folder{self.describe_unread()}")

    def _classes(self, images: Mapping[str, list[str]]) -> dict[str, int]:
        places = defaultdict(list)
        for place in images:
            places[os.path.basename(place)].append(place)
        for name, same in places.items():
            if len(same) > 1:
                raise UserError(
                    f"{self.root}: the folders {', '.join(sorted(same))} have the same last name, {name!r}, and would be one "
                    "class; give each class a folder of its own name"
                )
        return {name: label for label, name in enumerate(sorted(places, key=natural_key))}

    def describe_unread(self) -> str:
        """``; not read are dog: 3 .webp files ...``, or nothing."""
        parts = [f"{place}: {_counted(endings)}" for place, endings in sorted(self.unread.items())]
        return f"; not read are {'; '.join(parts[:4])}{'; ...' * (len(parts) > 4)}, convert them" if parts else ""

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class Images(ImageDataset):
    """timm's data set of images, except that one that cannot be decoded is replaced by the next, whatever the decoder raises."""

    def __init__(self, reader: Any, mode: str) -> None:
        super().__init__(root=None, reader=reader, input_img_mode=mode)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._decode(index)
        return (image if self.transform is None else self.transform(image)), -1 if label is None else label

    def _decode(self, index: int) -> tuple[Image.Image, int | None]:
        for _ in range(self._max_retries):
            try:
                source, label = self.reader[index]
                with source:
                    image = Image.open(source)
                    image.load()
            except Exception as error:  # PIL's decoders raise what they like at a damaged file
                problem = " ".join(str(error).split())
                _log.warning(
                    "%s cannot be read (%s: %s); the next image is taken",
                    self._name(index),
                    type(error).__name__,
                    problem,
                )
                index = (index + 1) % len(self.reader)
                continue
            return to_mode(image, self.input_img_mode, self._name(index)), label
        raise UserError(
            f"{self._max_retries} images in a row cannot be read; the lines above name them and say why. "
            "Is their folder still there, and are they images?"
        )

    def _name(self, index: int) -> str:
        try:
            return str(self.reader.filename(index, absolute=True))
        except Exception:  # not every source names its images
            return f"image {index}"


def to_mode(image: Image.Image, mode: str, name: str = "an image") -> Image.Image:
    """Convert to ``RGB`` or ``L`` with 8 bits per channel: the upper 8 of 16 bits; transparency is dropped, as timm does.

    Raises:
        UserError: pixels without a known range (floating point, 32-bit integers), or a mode that PIL does not convert.
    """
    # PNG has no integers beyond 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise UserError(f"{name}: {kind} pixels have no known range; scale and save the image with 8 bits")
    elif image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
    try:
        return image.convert(mode)
    except ValueError as error:
        raise UserError(f"{name}: an image of mode {image.mode} cannot become {mode}; save it as RGB") from error


class Converted(Dataset[Any]):
    """A data set that decodes images itself (torchvision's), with :func:`to_mode` before its transform."""

    def __init__(self, data: Any, mode: str) -> None:
        self._data, self._mode, self.transform = data, mode, None
        self.class_to_idx = getattr(data, "class_to_idx", None)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._data[index]
        image = to_mode(image, self._mode, f"image {index}")
        return (image if self.transform is None else self.transform(image)), label

    def __len__(self) -> int:
        return len(self._data)


def check_classes(splits: Mapping[str, ImageFolder], outputs: int | None) -> None:
    """Raise ``UserError`` unless both splits have the same classes and the model one output for each. Print a note about unread files."""
    (first, train), (second, val) = splits.items()
    for name, here, other, there in ((second, val, first, train), (first, train, second, val)):
        if missing := sorted(there.class_to_idx.keys() - here.class_to_idx.keys(), key=natural_key):
            raise UserError(
                f"{name} has no images of {some([*map(repr, missing)], 8)}, which {other} has as class folders; "
                f"add them there, or move folders that are not classes out of {other}{here.describe_unread()}"
            )
    count = len(train.class_to_idx)
    if outputs is not None and count != outputs:
        raise UserError(
            f"the data has {count} classes, the model {outputs} outputs; the class folders are {some([*map(repr, train.class_to_idx)], 8)}. "
            f"If each is a class, use a checkpoint trained on them, with --model-kwargs num_classes={count}{train.describe_unread()}"
        )
    for name, folder in splits.items():
        if folder.unread and processes().rank == 0:
            print(f"note: {name}: {folder.describe_unread().removeprefix('; ')}", file=sys.stderr)


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _counted(endings: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {ending} file{'s' * (count > 1)}" for ending, count in sorted(endings.items()))
