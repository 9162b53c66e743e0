"""The launch scripts: what they hand to Python, wherever they are started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

RESEARCH = Path(__file__).resolve().parents[2] / "research"
ECHO = '#!/usr/bin/env bash\n[ "$1" = -c ] && { echo 1; exit; }\nprintf "%s\\n" "$@"\n'


def words(script: str, place: Path, *more: str, **variables: str) -> list[str]:
    """The command line that a script builds, from a stand-in for Python."""
    (place / "echo").write_text(ECHO)
    (place / "echo").chmod(0o755)
    environment = os.environ | {"PYTHON": str(place / "echo"), "DATA_DIR": "data"} | variables
    line = ["bash", str(RESEARCH / script), *more]
    return subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


@pytest.mark.parametrize("script", ["run_gradual_pruning.sh", "run_one_shot_pruning.sh"])
def test_pretrained_weights_unless_a_checkpoint_is_given(script: str, tmp_path: Path) -> None:
    assert "--pretrained" in words(script, tmp_path)
    assert "--pretrained" in words(script, tmp_path, "--checkpoint-freq", "5")
    for given in (
        ["--checkpoint", "w.pth"],
        ["--checkpoint=w.pth"],
        ["--checkpoint_path", "w.pth"],
        ["--random-weights"],
    ):
        line = words(script, tmp_path, *given)
        assert "--pretrained" not in line
        assert line[-len(given) - 1 : -1] == given


@pytest.mark.parametrize("script", ["run_gradual_pruning.sh", "run_one_shot_pruning.sh"])
def test_paths_are_those_of_the_caller(script: str, tmp_path: Path) -> None:
    line = words(script, tmp_path)
    assert line[line.index("--data-dir") + 1] == "data"
    assert Path(line[0]).is_file()
    assert Path(line[line.index("--sparseml-recipe") + 1]).is_file()


def test_a_recipe_of_the_caller_and_one_of_the_repository(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("modifiers: []")
    for recipe, expected in (
        ("mine.yaml", "mine.yaml"),
        (
            "research/recipes/gradual_pruning/cap/vit_10ep.yaml",
            str(RESEARCH / "recipes/gradual_pruning/cap/vit_10ep.yaml"),
        ),
    ):
        line = words("run_gradual_pruning.sh", tmp_path, RECIPE=recipe)
        assert line[line.index("--sparseml-recipe") + 1] == expected
