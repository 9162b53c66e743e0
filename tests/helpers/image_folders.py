"""Folders of small images for the scripts and commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(data: Path, train: int, val: int, tinted: bool = False) -> None:
    """Write ``data/train`` and ``data/val`` with three classes of 16 × 16 noise, that many images of each; ``tinted``: classes differ in colour."""
    noise = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(3):
            folder = data / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 80 if tinted else 255, (16, 16, 3))
                if tinted:
                    pixels = pixels + np.array([60 * label, 90, 120 - 40 * label])
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
