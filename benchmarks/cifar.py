"""CIFAR-10 from a folder of images, and the models that the accuracy benchmarks prune."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

MODELS = Path(__file__).parent / "models"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5_000
"""Training images that calibration never sees: what one selects settings on, so that the validation images are looked at once."""

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10},
    ),
    "conv": ("resnet18", {"channels": (24, 48, 96, 144), "num_classes": 10}),
    "hybrid": (
        "visformer_tiny",
        {"img_size": 32, "init_channels": 16, "embed_dim": 96, "depth": (3, 2, 2), "num_heads": 4, "num_classes": 10},
    ),
}

PRUNED: dict[str, list[str]] = {
    "vit": ["re:blocks.[0-9]+.(attn|mlp).*weight$"],
    "conv": ["re:layer[0-9].*conv[0-9].weight$", "re:layer[0-9].*downsample.0.weight$"],
    "hybrid": ["re:stage[0-9].[0-9]+.(attn|mlp).*weight$"],
}
"""What gets pruned: everything but the first and the last layer, norms and biases, as the papers do."""


def load_images(data_dir: Path, split: str, cache: Path) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 ``(n, 3, 32, 32)`` and their labels, in one fixed random order; decoded once, then cached."""
    file = cache / f"cifar_{split}.pt"
    if not file.is_file():
        dataset = ImageFolder(str(data_dir / split))
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        pairs = [dataset[i] for i in order]
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{torch.randint(2**31, ()).item()}")
        torch.save((torch.stack([pil_to_tensor(x) for x, _ in pairs]), torch.tensor([y for _, y in pairs])), partial)
        partial.replace(file)
    return torch.load(file, weights_only=True)


def normalise(images: Tensor) -> Tensor:
    """uint8 ``(n, 3, h, w)`` to the float32 that the models take."""
    return (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def build(name: str) -> nn.Module:
    """The untrained architecture, in plain timm."""
    architecture, settings = ARCHITECTURES[name]
    return timm.create_model(architecture, **settings)


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """A trained model in eval mode; ``weights`` where it does not ship with the benchmarks."""
    file = weights or MODELS / f"{name}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: `python benchmarks/models/train.py {name} DATA` makes it")
    model = build(name)
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(file).items()}
    )
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    hits = sum(
        int((model(normalise(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * hits / len(images)
