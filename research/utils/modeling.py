"""timm models from a command line."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from research.utils.cli import UserError


def build_model(name: str, kwargs: dict[str, Any], checkpoint: str, pretrained: bool) -> nn.Module:
    """A timm model in eval mode.

    Raises:
        UserError: unknown model, missing or foreign checkpoint, arguments that it does not take.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=4)
        raise UserError(f"--model {name}: timm has no such model{f'; near: {chr(44).join(near)}' if near else ''}")
    if checkpoint and not Path(checkpoint).is_file():
        raise UserError(f"--checkpoint {checkpoint}: no such file")
    try:
        model = timm.create_model(name, pretrained=pretrained, checkpoint_path=checkpoint, **kwargs)
    except (RuntimeError, TypeError, KeyError, ValueError, OSError) as error:
        what = "--checkpoint" if checkpoint else "--pretrained" if pretrained else "--model-kwargs"
        raise UserError(f"{name} cannot be built ({what}): {str(error).strip().splitlines()[0][:300]}") from error
    return model.eval()


def pick_device(name: str) -> torch.device:
    """``auto``: the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu")
    return device
