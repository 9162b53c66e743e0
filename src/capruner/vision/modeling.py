"""Models from a command line: timm's, and Hugging Face's image classifiers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capruner.cli.arguments import UserError, describe
from capruner.models.modes import eval_mode
from capruner.report.architecture import build
from capruner.report.checkpoint import load_weights


def build_model(name: str, kwargs: dict[str, Any], checkpoint: str, pretrained: bool) -> Any:
    """Build a model in eval mode, with the weights of ``checkpoint`` if it is given; raise ``UserError`` if that fails."""
    try:
        model = build(name, kwargs, pretrained and not checkpoint)
        if checkpoint:
            load_weights(model, checkpoint, name)
    except (ValueError, OSError) as error:
        flag = f"--checkpoint {checkpoint}: " if checkpoint and checkpoint in str(error) else ""
        raise UserError(f"{flag}{error}") from error
    return model


@torch.no_grad()
def check_forward(model: nn.Module, input_size: Sequence[int], name: str, training: bool = False) -> None:
    """Run ``model`` once on blank images, in training mode if ``training``. Buffers, modes and random states are restored.

    Raises:
        UserError: it does not accept images of that size, or does not return one tensor of class scores.
    """
    some = next(model.parameters())
    images = torch.zeros(2, *input_size, device=some.device, dtype=some.dtype)
    devices = [some.device] if some.device.type == "cuda" else []
    try:
        with eval_mode(model), torch.random.fork_rng(devices):
            output = model.train(training)(images)
    except Exception as error:  # whatever the architecture trips over
        raise UserError(
            f"{name} does not take images of {tuple(input_size)}: {describe(error)}. "
            f"--img-size sets the size of the images, --model-kwargs img_size={input_size[1]} that of a model that is built for one size"
        ) from error
    if not isinstance(output, Tensor):
        raise UserError(
            f"{name} returns a {type(output).__name__} {'in training mode ' * training}but one tensor of class scores is needed; "
            "switch its other outputs off, --model-kwargs aux_logits=False for an Inception"
        )


def seed_everything(seed: int, *place: int) -> None:
    """Seed all generators that models, transforms and loaders draw from.

    Args:
        seed: of the run.
        place: epoch and rank of a training. Equal numbers give equal states, so a resumed run has no random state to restore; worker processes take
            their seeds from torch's.
    """
    state = int(np.random.SeedSequence([seed, *place]).generate_state(1)[0]) if place else seed
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002 (it is the global generator that others draw from)
    torch.manual_seed(state)


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one; raise ``UserError`` for a device that torch does not have."""
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
