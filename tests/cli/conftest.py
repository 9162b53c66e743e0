"""What the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_folders import write_images
from safetensors.torch import save_file
from training_case import KWARGS, MODEL


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train, data/val and dense.safetensors."""
    timm = pytest.importorskip("timm")
    root = tmp_path_factory.mktemp("place")
    write_images(root / "data", train=6, val=3)
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, **KWARGS).state_dict(), root / "dense.safetensors")
    return root
