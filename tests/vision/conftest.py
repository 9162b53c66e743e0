"""Fixtures for the scripts: a tiny folder of images, and command lines that train on it for seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from image_folders import write_images
from training_case import KWARGS, MODEL, RECIPES, Line


@pytest.fixture(scope="session")
def training_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train (24 images), data/val (9) and recipes."""
    root = tmp_path_factory.mktemp("training")
    write_images(root / "data", train=8, val=3, tinted=True)
    for name, modifiers in RECIPES.items():
        (root / f"{name}.yaml").write_text("modifiers:\n" + modifiers)
    return root


@pytest.fixture
def line(training_place: Path, tmp_path: Path) -> Line:
    """``line(recipe, flag=value)``: arguments that train for seconds."""

    def build(recipe: str = "cap", **changes: Any) -> list[str]:
        given: dict[str, Any] = {
            "data_dir": training_place / "data",
            "model": MODEL,
            "random_weights": True,
            "model_kwargs": [f"{key}={value}" for key, value in KWARGS.items()],
            "sparseml_recipe": training_place / f"{recipe}.yaml",
            "experiment": "trial",
            "output": tmp_path,
            "batch_size": 4,
            "gs_batch_size": 4,
            "workers": 0,
            "device": "cpu",
            "opt": "adamw",
            "lr": 1e-3,
        } | changes
        words: list[str] = []
        for flag, value in given.items():
            if value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{flag.replace('_', '-')}", *map(str, values)]
        return words

    return build
