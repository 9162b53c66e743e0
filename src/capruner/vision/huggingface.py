"""Hugging Face's image classifiers, used like timm's: images in, class scores out.

``--model hf:NAME`` takes a name on the hub or a folder of ``save_pretrained``. Preprocessing follows the image processor's configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from capruner.cli.arguments import UserError, describe

PREFIX = "hf:"
PROCESSOR = "preprocessor_config.json"
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def is_huggingface(name: str) -> bool:
    """Whether ``--model`` names a Hugging Face model."""
    return name.startswith(PREFIX)


def build(name: str, kwargs: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Build a classifier in eval mode that maps a tensor of images to logits. Parameter names are those of ``transformers``.

    Args:
        name: ``hf:NAME`` or ``hf:FOLDER``.
        kwargs: fields of its configuration to change, such as ``num_labels``.
        pretrained: load its weights; otherwise they are random.

    Raises:
        ValueError: no such classifier, or preprocessing that is not supported.
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--model {name} needs Hugging Face's transformers: pip install transformers"
        ) from error

    source = name.removeprefix(PREFIX)
    auto = transformers.AutoModelForImageClassification
    try:
        config = transformers.AutoConfig.from_pretrained(source, **kwargs)
        model = auto.from_pretrained(source, config=config) if pretrained else auto.from_config(config)
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    except Exception as error:  # whatever the hub, the configuration or the architecture trips over
        raise ValueError(
            f"--model {name}: transformers has no such image classifier with an image processor: {describe(error)}"
        ) from error
    model.__class__ = _logits_of(type(model))
    model.num_classes = config.num_labels
    model.pretrained_cfg = preprocessing(name, processor, config)
    model.image_processor = processor
    built: nn.Module = model.eval()
    return built


def _logits_of(kind: Any) -> Any:
    """A subclass of ``kind`` with the same name, whose forward takes a tensor of images and returns logits."""

    def forward(self: Any, pixel_values: Tensor, **more: Any) -> Tensor:
        logits: Tensor = kind.forward(self, pixel_values=pixel_values, **more).logits
        return logits

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def preprocessing(name: str, processor: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """timm's data configuration for an image processor; raise ``ValueError`` if there is no equivalent."""
    if processor.get("do_rescale", True) and abs(255 * processor.get("rescale_factor", 1 / 255) - 1) > 1e-6:
        raise ValueError(
            f"--model {name}: its image processor scales pixels by {processor['rescale_factor']:g}, not by 1/255; use capruner.prune"
        )
    resized = _sides(processor.get("size")) or _sides(getattr(config, "image_size", 224)) or (224, 224)
    cropped = _sides(processor.get("crop_size")) if processor.get("do_center_crop") else None
    height, width = cropped or resized
    squash = isinstance(processor.get("size"), Mapping) and "height" in processor["size"] and cropped is None
    share = processor.get("crop_pct") or (cropped[0] / resized[0] if cropped else 1.0)
    normal = processor.get("do_normalize", True)
    channels = getattr(config, "num_channels", 3)
    return {
        "input_size": (channels, height, width),
        "crop_pct": float(share),
        "crop_mode": "squash" if squash else "center",
        "interpolation": _RESAMPLING.get(processor.get("resample", 2), "bicubic"),
        "mean": tuple(processor["image_mean"]) if normal else (0.0,) * channels,
        "std": tuple(processor["image_std"]) if normal else (1.0,) * channels,
    }


def _sides(size: Any) -> tuple[int, int] | None:
    """Height and width from a processor's size: a number, ``{"height", "width"}`` or ``{"shortest_edge"}``."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
        return (int(size["height"]), int(size["width"])) if "height" in size else None
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and size else None


def save(model: nn.Module, folder: Path) -> None:
    """Write ``folder`` in one step, for ``from_pretrained``: model and image processor. Raise ``UserError`` if it cannot be written."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)  # type: ignore[operator]
        (partial / PROCESSOR).write_text(json.dumps(model.image_processor, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {describe(error)}; is there room on the disk?") from error
