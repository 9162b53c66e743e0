"""Image folders: pixels of every mode, classes that do not add up, images that cannot be decoded."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm

from capruner.cli.arguments import UserError
from capruner.vision import data
from capruner.vision.image_folders import Converted, ImageFolder, Images, to_mode

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def write(path: Path, image: Image.Image | None = None, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (16, 16), (10, 20, 30))).save(path, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write(tmp_path / split / name / "0.png")
    return tmp_path


def model(**kwargs: Any) -> torch.nn.Module:
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **small | kwargs)


def colours(path: Path, mode: str = "RGB") -> np.ndarray:
    """The pixels of the one image in a class folder beside nothing else."""
    return np.asarray(Images(ImageFolder(path), mode)[0][0])


SIXTEEN = GREY.astype(np.uint16) * 257
GREYS = {
    "16 bits": Image.fromarray(SIXTEEN),
    "8 bits": Image.fromarray(GREY),
    "LA": Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(255 - GREY))),
    "palette": Image.fromarray(GREY).convert("P"),
}


@pytest.mark.promise(
    "Scripts", "16-bit grey images, palettes, CMYK and one-bit images are converted to 8 bits per channel"
)
@pytest.mark.parametrize("name", GREYS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_greys_are_the_same_greys(tmp_path: Path, name: str, mode: str) -> None:
    write(tmp_path / "cat" / "0.png", GREYS[name])
    pixels = colours(tmp_path, mode)
    assert np.array_equal(pixels if mode == "L" else pixels[..., 1], GREY)


def test_sixteen_bits_of_the_other_byte_order() -> None:
    big = Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(to_mode(big, "L")), GREY)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    write(tmp_path / "cat" / "0.png", image, transparency=b"\x80\x00")
    assert colours(tmp_path)[3, 3].tolist() == [10, 20, 30]


@pytest.mark.promise(
    "Scripts", "16-bit grey images, palettes, CMYK and one-bit images are converted to 8 bits per channel"
)
def test_one_bit_and_cmyk(tmp_path: Path) -> None:
    write(tmp_path / "one" / "x" / "0.png", Image.fromarray(GREY > 127))
    assert np.array_equal(colours(tmp_path / "one", "L"), 255 * (GREY > 127))
    write(tmp_path / "four" / "x" / "0.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))
    red, green, blue = colours(tmp_path / "four")[8, 8]
    assert (red < 10, green > 245, blue > 245) == (True, True, True)


@pytest.mark.promise("Scripts", "Floating-point and 32-bit pixels are refused by file name")
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("F", (16, 16), 0.5), r"cat/0.png: floating-point pixels"),
        (Image.new("I", (16, 16), 70), r"cat/0.png: 32-bit integer pixels"),
    ],
    ids=["F", "I"],
)
def test_pixels_without_a_known_range_are_refused_by_name(tmp_path: Path, image: Any, message: str) -> None:
    write(tmp_path / "cat" / "0.png", image, format="TIFF")
    with pytest.raises(UserError, match=message):
        colours(tmp_path)


def test_data_sets_that_decode_by_themselves_are_converted_too() -> None:
    found = Converted([(Image.fromarray(SIXTEEN), 3)], "L")
    assert np.array_equal(np.asarray(found[0][0]), GREY)
    assert (len(found), found[0][1]) == (1, 3)


def png(width: int, height: int, content: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


BROKEN = {
    "a bomb": png(20000, 20000, zlib.compress(b"")),
    "a torn header": png(16, 16, b"")[:20],
    "a wrong checksum": png(16, 16, b"").replace(b"IHDR", b"IHDS"),
    "noise": png(16, 16, b"noise"),
    "empty": b"",
    "text": b"no image",
}


@pytest.mark.parametrize("name", BROKEN)
def test_another_image_is_taken(root: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / "cat" / "0.png").write_bytes(BROKEN[name])
    image, label = Images(ImageFolder(root / "train"), "RGB")[0]
    assert (np.asarray(image)[0, 0].tolist(), label) == ([10, 20, 30], 1)
    assert "cat/0.png cannot be read" in caplog.text


@pytest.mark.promise("Scripts", "An image that cannot be decoded is replaced by another and named in the log")
@pytest.mark.parametrize("error", [SyntaxError, ValueError, struct.error, MemoryError, KeyError, EOFError])
def test_whatever_the_decoder_raises(root: Path, error: type, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    load, names = Image.open, []

    def failing(source: Any) -> Any:
        names.append(source.name)
        if source.name.endswith("cat/0.png"):
            raise error("broken")
        return load(source)

    monkeypatch.setattr(Image, "open", failing)
    assert Images(ImageFolder(root / "train"), "RGB")[0][1] == 1
    assert f"cat/0.png cannot be read ({error.__name__}" in caplog.text


def test_labels_and_order_are_timms(tmp_path: Path) -> None:
    for name in ("b10", "b9", "a/deep"):
        for index in (10, 9):
            write(tmp_path / name / f"{index}.jpg")
    theirs, ours = timm.data.create_dataset("", root=str(tmp_path)).reader, ImageFolder(tmp_path)
    assert (ours.samples, ours.class_to_idx) == (theirs.samples, theirs.class_to_idx)


@pytest.mark.promise(
    "Scripts",
    "Class folders that are ambiguous, missing in a split, or without images are refused by name before the work",
)
def test_folders_of_the_same_last_name_are_refused(tmp_path: Path) -> None:
    for name in ("x/good", "y/good", "z/bad"):
        write(tmp_path / name / "0.png")
    with pytest.raises(UserError, match=r"the folders x/good, y/good have the same last name, 'good'"):
        ImageFolder(tmp_path)


def test_hidden_files_and_folders_are_passed_over(root: Path) -> None:
    write(root / "train" / ".ipynb_checkpoints" / "0.png")
    write(root / "train" / "cat" / ".thumbnails" / "0.png")
    (root / "train" / "cat" / "._0.png").write_bytes(b"a Mac's")
    assert len(data.open_splits(str(root), "", model())[0]) == 2


def test_images_outside_a_class_are_refused(root: Path) -> None:
    write(root / "val" / "overview.png")
    with pytest.raises(UserError, match=r"val holds images outside a class folder, overview.png for example"):
        data.open_splits(str(root), "", model())


def test_a_stray_folder_is_named_with_its_split(root: Path) -> None:
    write(root / "train" / "backup" / "0.png")
    with pytest.raises(UserError, match="val has no images of 'backup', which train has as class folders"):
        data.open_splits(str(root), "", model())


@pytest.mark.promise(
    "Scripts",
    "Class folders that are ambiguous, missing in a split, or without images are refused by name before the work",
)
def test_a_missing_class_is_named_with_its_split(root: Path) -> None:
    (root / "train" / "dog" / "0.png").unlink()
    with pytest.raises(UserError, match="train has no images of 'dog', which val has") as caught:
        data.open_splits(str(root), "", model())
    assert "num_classes" not in str(caught.value)


def test_a_class_of_another_format_is_named(root: Path) -> None:
    (root / "val" / "dog" / "0.png").rename(root / "val" / "dog" / "0.webp")
    with pytest.raises(UserError, match=r"val has no images of 'dog'.*not read are dog: 1 .webp file, convert them"):
        data.open_splits(str(root), "", model())
    (root / "train" / "dog" / "0.png").rename(root / "train" / "dog" / "0.webp")
    with pytest.raises(UserError, match=r"1 classes, the model 2 outputs; .* 'cat'.*dog: 1 .webp file"):
        data.open_splits(str(root), "", model())


def test_files_that_are_not_read_are_mentioned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "train" / "dog" / "1.bmp")
    data.open_splits(str(root), "", model())
    assert "train: not read are dog: 1 .bmp file" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [2, 4])
def test_other_channels_are_refused_by_their_number(root: Path, channels: int) -> None:
    with pytest.raises(UserError, match=f"the model takes {channels} input channels; .* in_chans=3 or in_chans=1"):
        data.open_splits(str(root), "", model(in_chans=channels))
