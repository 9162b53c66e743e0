"""Checkpoints of a training: weights for others to load, and all that a stopped run needs to resume.

``last.pt`` holds tensors and plain values only and is read with ``weights_only=True``, so a foreign file cannot run code. Files are written in one
step: after a kill or a power cut either the old or the new one is complete.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.vision import output
from capruner.vision.training_recipe import check_zeros

FORMAT = "capruner-training-2"
_SOME_DICT = (dict, type(None))
CONTENT: dict[str, Any] = {
    **{"epoch": int, "steps": int, "model": dict, "optimizer": dict, "scaler": dict, "manager": dict, "best": dict},
    **{"rows": list, "updates": list, "arguments": dict, "ema": _SOME_DICT, "scheduler": _SOME_DICT},
    "wandb_id": (str, type(None)),
    **{"recipe": str, "steps_per_epoch": int, "processes": int},
}
"""Keys and types of a checkpoint."""


def save_weights(path: Path, model: nn.Module, masks: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a file that ``timm.create_model(..., checkpoint_path=path)`` loads; raise ``RuntimeError`` if a pruned weight is not zero."""
    check_zeros(model, masks, path.name)
    output.save_weights(path, model, {"capruner": json.dumps(metadata)})  # one key: several would come in random order


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` for :func:`load_state`."""

    def write(partial: Path) -> None:
        try:
            torch.save(state | {"format": FORMAT}, partial)
        except RuntimeError as error:  # raised by torch for a full disk
            raise OSError(f"{str(error).splitlines()[0]}; is there room on the disk?") from error

    output.write_atomically(path, write)


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state`, tensors on the CPU.

    Raises:
        UserError: the file is missing, damaged (the checksum of every part is verified), or something else.
    """
    if not path.is_file():
        raise UserError(f"--resume {path}: no such file")
    only_weights = f"--resume {path}: not a checkpoint of sparse_training.py, such as last.pt; to start from weights, use --checkpoint {path}"
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":  # safetensors: the header's length, then JSON
            raise UserError(only_weights)
    try:
        with zipfile.ZipFile(path) as parts:
            bad = parts.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(
            f"--resume {path}: cut short, or not a checkpoint ({error}); resume from an older one, or start another --experiment"
        ) from error
    if bad is not None:
        raise UserError(
            f"--resume {path}: damaged, the checksum of {bad} is wrong; resume from an older one, or start another --experiment"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises anything for foreign files, with escape codes in the message
        raise UserError(
            f"--resume {path}: not a checkpoint of sparse_training.py, which hold tensors and plain values only"
        ) from error
    found = str(state.get("format", "")) if isinstance(state, dict) else ""
    if found.startswith("capruner-training-") and found != FORMAT:
        raise UserError(f"--resume {path}: written by another version of sparse_training.py ({found}, not {FORMAT})")
    if found != FORMAT:
        raise UserError(only_weights)
    return state


def load_training(path: Path) -> dict[str, Any]:
    """:func:`load_state` of a whole training; raise ``UserError`` if something is missing."""
    state = load_state(path)
    wrong = [key for key, kind in CONTENT.items() if key not in state or not isinstance(state[key], kind)]
    if wrong:
        raise UserError(
            f"--resume {path}: {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} missing or of another kind, so it was not written by this "
            "version of sparse_training.py; resume with the version that wrote it, or start again"
        )
    return state
