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

from research.demo.digits import MODEL, MODEL_KWARGS, PREPROCESSING, WEIGHTS, write_folders


def tensors(folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a split, normalised, and their labels."""
    data = ImageFolder(str(folder))
    mean, std = list(PREPROCESSING["mean"]), list(PREPROCESSING["std"])
    images = torch.stack(
        [tf.normalize(tf.to_dtype(tf.to_image(image), torch.float32, scale=True), mean, std) for image, _ in data]
    )
    return images, torch.tensor(data.targets)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel: the only augmentation."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    dx, dy = torch.randint(3, (2, len(images)), generator=generator)
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, x, y in zip(padded, dx.tolist(), dy.tolist())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(WEIGHTS))
    parser.add_argument("--epochs", type=int, default=80)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_folders(Path(folder))
        (images, labels), (val_images, val_labels) = tensors(Path(folder) / "train"), tensors(Path(folder) / "val")
    model = timm.create_model(MODEL, **MODEL_KWARGS)
    batch = 64
    steps = args.epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(args.epochs):
        model.train()
        for chosen in torch.randperm(len(images), generator=generator)[: len(images) // batch * batch].split(batch):
            loss = nn.functional.cross_entropy(
                model(shifted(images[chosen], generator)), labels[chosen], label_smoothing=0.1
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            model.eval()
            with torch.no_grad():
                accuracy = (model(val_images).argmax(dim=1) == val_labels).double().mean()
            print(f"epoch {epoch + 1}: loss {loss:.3f}, val top-1 {100 * accuracy:.2f} %", flush=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, args.output)


if __name__ == "__main__":
    main()
