#!/usr/bin/env python
"""Train the demo's vision transformer on the digits; writes digits_vit.safetensors beside this file. About two minutes on two cores.

python research/demo/train_digits_vit.py --output /tmp/digits_vit.safetensors
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as tf

from capruner.files import replacing
from research.demo.digits import MODEL, MODEL_KWARGS, PREPROCESSING, WEIGHTS, write_folders


def tensors(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a split, normalised, and their labels."""
    data = ImageFolder(str(folder))
    mean, std = list(PREPROCESSING["mean"]), list(PREPROCESSING["std"])
    images = torch.stack(
        [tf.normalize(tf.to_dtype(tf.to_image(image), torch.float32, scale=True), mean, std) for image, _ in data]
    )
    return images, torch.tensor(data.targets)


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image rotated by up to 11 degrees, scaled by up to 12 % and shifted by up to 0.8 pixels: the only augmentation."""
    angle, scale, dx, dy = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale, dx, dy = 0.2 * angle, 1 + 0.12 * scale, 0.2 * dx, 0.2 * dy
    rows = [
        torch.stack([scale * angle.cos(), -scale * angle.sin(), dx], dim=1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), dy], dim=1),
    ]
    grid = nn.functional.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return (
        nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1
    )  # what comes in from outside is black: -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(WEIGHTS))
    parser.add_argument("--epochs", type=int, default=120)
    args = parser.parse_args()
    torch.set_num_threads(
        1
    )  # faster than more at this size, and the sums come out the same on any machine's core count
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        (images, labels), (val_images, val_labels) = tensors(Path(folder) / "train"), tensors(Path(folder) / "val")
    model = timm.create_model(MODEL, **MODEL_KWARGS)
    batch = 64
    steps = args.epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(images), generator=generator)[: len(images) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(
                model(moved(images[chosen], generator)), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            model.eval()
            with torch.no_grad():
                accuracy = (model(val_images).argmax(dim=1) == val_labels).double().mean()
            print(f"epoch {epoch + 1}: loss {loss:.3f}, val top-1 {100 * accuracy:.2f} %", flush=True)
    with replacing(args.output) as partial:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, partial)


if __name__ == "__main__":
    main()
