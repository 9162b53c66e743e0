"""timm architectures without weights: what is prunable in them and what a forward pass costs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from capruner.cli.arguments import describe
from capruner.models.macs import MultiplyAdds, multiply_adds
from capruner.vision import huggingface


def build(name: str, kwargs: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm model in eval mode, on the current default device.

    Args:
        name: anything that ``timm.create_model`` takes: an architecture, ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``; or ``hf:NAME_OR_FOLDER``, see
            :mod:`capruner.vision.huggingface`.

    Raises:
        ValueError: timm has no such model, does not take these arguments, or cannot get its weights.
        ModuleNotFoundError: timm is not installed.
    """
    if huggingface.is_huggingface(name):
        return huggingface.build(name, kwargs, pretrained)
    import timm
    from timm.models import parse_model_name

    try:
        source, _ = parse_model_name(name)
    except ValueError as error:
        raise ValueError(f"--model {name}: {describe(error)}") from error
    if source is None and not timm.is_model(name):
        there = timm.list_models()
        # A name cut short is the likelier slip: what it begins comes before what is spelled alike.
        begun = sorted((other for other in there if other.startswith(name)), key=len)
        near = (begun + [other for other in difflib.get_close_matches(name, there, n=4) if other not in begun])[:4]
        raise ValueError(f"--model {name}: timm has no such model{'; near: ' if near else ''}{', '.join(near)}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs).eval()
    except Exception as error:  # whatever the architecture, or the hub, trips over
        flags = [f"--model-kwargs {dict(kwargs)}"] * bool(kwargs) + ["--pretrained"] * pretrained
        with_ = f" with {' and '.join(flags)}" if flags else ""
        raise ValueError(f"{name} cannot be built{with_}: {describe(error)}") from error


def architecture(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """:func:`build` on the meta device: shapes and names, no numbers, in milliseconds."""
    with torch.device("meta"):
        return build(name, kwargs)


def input_size(model: nn.Module, img_size: int | Sequence[int] | None = None) -> tuple[int, int, int]:
    """``(channels, height, width)``: ``img_size``, or what a timm model was built for, or its configuration's."""
    built: Mapping[str, Any] = getattr(model, "_model_args", {})
    channels, height, width = (getattr(model, "pretrained_cfg", None) or {}).get("input_size") or (3, 224, 224)
    size = img_size or built.get("img_size") or (height, width)
    height, width = (size, size) if isinstance(size, int) else size
    return int(built.get("in_chans") or channels), int(height), int(width)


def architecture_macs(model: nn.Module, img_size: int | None = None) -> MultiplyAdds:
    """Multiply-adds of :func:`architecture` at :func:`input_size`; raise ``RuntimeError`` if the model does not run there."""
    size = input_size(model, img_size)
    try:
        return multiply_adds(model, size)
    except Exception as error:
        raise RuntimeError(f"a forward pass at {size} fails: {describe(error)}") from error
