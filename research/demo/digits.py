"""scikit-learn's 1,797 handwritten digits as image folders, and the small vision transformer that knows them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

MODEL = "vit_tiny_patch16_224"
MODEL_KWARGS = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10}
PREPROCESSING = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")


def write_folders(root: Path) -> None:
    """``root/train/<digit>/*.png`` and ``root/val/<digit>/*.png``: a fixed, stratified split of two to one."""
    digits = load_digits()
    train, val = train_test_split(range(len(digits.images)), test_size=1 / 3, random_state=0, stratify=digits.target)
    for split, indices in (("train", train), ("val", val)):
        for index in indices:
            folder = root / split / str(digits.target[index])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).round().astype("uint8")
            Image.fromarray(pixels).convert("RGB").save(folder / f"{index:04d}.png")
