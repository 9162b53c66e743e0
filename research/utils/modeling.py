"""timm models from a command line."""

from __future__ import annotations

import difflib
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from torch import nn

from research.utils.cli import UserError

_BUILD_ERRORS = (RuntimeError, TypeError, KeyError, ValueError, AssertionError, AttributeError, OSError)


def build_model(name: str, kwargs: dict[str, Any], checkpoint: str, pretrained: bool) -> nn.Module:
    """A timm model in eval mode.

    Raises:
        UserError: unknown model, missing or foreign checkpoint, arguments that it does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise UserError(f"--model {name}: timm has no such model{'; near: ' if near else ''}{', '.join(near)}")
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"--checkpoint {checkpoint}: no such file")
    try:
        model = timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint, **kwargs)
    except (*_BUILD_ERRORS, SafetensorError, pickle.UnpicklingError) as error:
        what = f"--checkpoint {checkpoint}" if checkpoint else "--pretrained" if pretrained else "--model-kwargs"
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} cannot be built ({what}): {reason[:300]}{' ...' if len(reason) > 300 else ''}"
        ) from error
    if not checkpoint and not pretrained:
        print(f"warning: {name} has random weights; give --checkpoint or --pretrained", file=sys.stderr)
    return model.eval()


def seed_everything(seed: int) -> None:
    """Seed all generators that models, transforms and loaders draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (it is the global generator that others draw from)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: torch knows no such device; auto, cpu, cuda, cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: torch sees {torch.cuda.device_count() or 'no'} GPU here; use --device cpu or auto"
        )
    return device
