"""A tiny network that tells three colours apart, pruned, and images of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from training_case import KWARGS, MODEL

import capruner


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/<colour>`` (8 images each) and ``val/<colour>`` (6 each)."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for channel, colour in enumerate(("red", "green", "blue")):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 120, (16, 16, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny ViT, trained for seconds on colours and 75 % sparse."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODEL, **KWARGS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        labels = torch.randint(3, (32,))
        # blue, green, red in the order of the class folders
        colours = 2 * nn.functional.one_hot(2 - labels, 3).float()[:, :, None, None] - 1
        loss = nn.functional.cross_entropy(model(colours + 0.5 * torch.randn(32, 3, 16, 16)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    capruner.prune(model, None, sparsity=0.75, method="magnitude", progress=False).apply(model)
    path = tmp_path_factory.mktemp("trained") / "sparsity_0.75.safetensors"
    save_file(model.state_dict(), path)
    return path
