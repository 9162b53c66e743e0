"""What happens around a script while it runs: survived, or one clear line and what was written before left whole."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_case import Line

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
from capruner.cli import arguments as cli  # noqa: E402
from capruner.vision import one_shot_pruning, sparse_training  # noqa: E402
from capruner.vision.image_folders import Images  # noqa: E402

NOT_HERE = dict.fromkeys(("sparseml_recipe", "batch_size", "opt", "lr"))
FLAGS: dict[str, Any] = NOT_HERE | {"num_grads": 12, "fisher_block_size": 48, "damp": 1e-4, "sparsities": [0.5]}


@pytest.fixture
def data(training_place: Path, tmp_path: Path) -> Path:
    """A copy that may be spoiled."""
    return Path(shutil.copytree(training_place / "data", tmp_path / "data"))


def ends(words: list[str], capsys: pytest.CaptureFixture[str], main: Callable[..., Any] = one_shot_pruning.main) -> str:
    """The one line that a script ends with."""
    capsys.readouterr()
    assert cli.run(main, words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [text for text in error.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    assert error.splitlines()[-1] == "(--debug shows where)"
    return lines[0]


@pytest.mark.promise(
    "Scripts",
    "A data folder that vanishes, unreadable images, a killed loader worker and a full disk are one line each",
)
def test_a_full_disk(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # more than a summary, less than the weights
    try:
        said = ends(line(**FLAGS), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "result.safetensors cannot be written" in said
    assert "what was written before is whole: make room there and start again" in said
    assert [row["requested"] for row in json.loads((tmp_path / "trial" / "summary.json").read_text())["rows"]] == [None]
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_full_disk_leaves_the_state_to_go_on_from(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = line(**FLAGS, state_dir=tmp_path / "state")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _full(os.replace, "result.safetensors"))
        assert "No space left on device" in ends(words, capsys)
    assert (tmp_path / "state").is_dir()
    assert cli.run(one_shot_pruning.main, words) == 0
    assert not (tmp_path / "state").exists()


def _full(replace: Callable[..., None], name: str) -> Callable[..., None]:
    def full(source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    return full


@pytest.mark.promise(
    "Scripts",
    "A data folder that vanishes, unreadable images, a killed loader worker and a full disk are one line each",
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_folder_that_vanishes(
    workers: int, line: Line, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = one_shot_pruning.Run.record
    monkeypatch.setattr(
        one_shot_pruning.Run, "record", lambda self, *a: (record(self, *a), shutil.rmtree(data / "train"))
    )
    said = ends(line(**FLAGS | {"data_dir": data, "workers": workers}), capsys)
    assert "10 images in a row cannot be read" in said
    assert "the lines above name them and say why. Is their folder still there" in said


@pytest.mark.promise("Scripts", "An image that cannot be decoded is replaced by another and named in the log")
def test_an_unreadable_image_is_passed_over_with_its_name(
    line: Line, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "train" / "class1" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    assert cli.run(one_shot_pruning.main, line(**FLAGS | {"data_dir": data})) == 0
    assert "class1/3.png" in caplog.text


def test_images_that_are_all_unreadable(line: Line, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data / "train").rglob("*.png"):
        path.write_text("no image")
    assert "10 images in a row cannot be read" in ends(line(**FLAGS | {"data_dir": data}), capsys)


@pytest.mark.promise(
    "Scripts",
    "A data folder that vanishes, unreadable images, a killed loader worker and a full disk are one line each",
)
def test_a_loader_s_worker_that_dies(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Any, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Images, "__getitem__", dies)
    said = ends(line(**FLAGS | {"workers": 1}), capsys)
    assert "DataLoader worker" in said
    assert "Killed" in said or "exited unexpectedly" in said


class Wandb(types.ModuleType):
    """A service that stops to answer after so many calls."""

    def __init__(self, calls: int) -> None:
        super().__init__("wandb")
        self.calls, self.id = calls, "abc"

    def _call(self, *_: Any, **__: Any) -> Wandb:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError("api.wandb.ai:\n unreachable")
        return self

    init = log = finish = _call


@pytest.mark.promise("Scripts", "When Weights & Biases does not answer, the run warns once and continues")
@pytest.mark.parametrize("calls", [0, 1, 2, 100])
@pytest.mark.parametrize("script", ["one_shot", "training"])
def test_without_weights_and_biases_it_goes_on(
    calls: int, script: str, line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Wandb(calls)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    if script == "one_shot":
        assert cli.run(one_shot_pruning.main, line(**FLAGS, log_wandb=True)) == 0
    else:
        assert cli.run(sparse_training.main, line("oneshot", log_wandb=True)) == 0
    warned = capsys.readouterr().err.count(
        "Weights & Biases does not answer (ConnectionError: api.wandb.ai: unreachable)"
    )
    assert warned == (0 if wandb.calls >= 0 else 1)


def test_without_its_package_weights_and_biases_is_one_line(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in ends(line(**FLAGS, log_wandb=True), capsys)
