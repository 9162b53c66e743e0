"""timm architectures without weights: what is prunable in them and what a forward pass costs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capruner.macs import MultiplyAdds, multiply_adds

BUILD_ERRORS = (RuntimeError, TypeError, KeyError, ValueError, AssertionError, AttributeError, NotImplementedError)


def architecture(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device: shapes and names, no numbers, in milliseconds.

    Raises:
        ValueError: timm has no such model, or it does not take these arguments.
        ModuleNotFoundError: timm is not installed.
    """
    import timm

    if not timm.is_model(name):
        there = timm.list_models()
        # A name cut short is the likelier slip: what it begins comes before what is spelled alike.
        begun = sorted((other for other in there if other.startswith(name)), key=len)
        near = (begun + [other for other in difflib.get_close_matches(name, there, n=4) if other not in begun])[:4]
        raise ValueError(f"--model {name}: timm has no such model{'; near: ' if near else ''}{', '.join(near)}")
    try:
        with torch.device("meta"):
            return timm.create_model(name, **kwargs).eval()
    except BUILD_ERRORS as error:
        raise ValueError(f"{name} cannot be built with --model-kwargs {dict(kwargs)}: {error}") from error


def architecture_macs(model: nn.Module, kwargs: Mapping[str, Any], img_size: int | None = None) -> MultiplyAdds:
    """Multiply-adds of :func:`architecture` at the input size of its configuration, or that of ``kwargs`` or ``img_size``.

    Raises:
        RuntimeError: the model does not take such an input, or cannot run without numbers.
    """
    from timm.data import resolve_data_config

    size = img_size or kwargs.get("img_size")
    given = {"img_size": size, "in_chans": kwargs.get("in_chans")}
    config = resolve_data_config({key: value for key, value in given.items() if value is not None}, model=model)
    try:
        return multiply_adds(model, config["input_size"])
    except BUILD_ERRORS as error:
        raise RuntimeError(
            f"a forward pass at {config['input_size']} fails: {' '.join(str(error).split())[:160]}"
        ) from error
