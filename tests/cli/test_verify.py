"""``capruner verify`` on checkpoints with known faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_case import KWARGS, MODEL

import capruner
from capruner.cli.main import main

timm = pytest.importorskip("timm")

WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
FC1 = "blocks.0.mlp.fc1.weight"


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """A model whose first MLP layer is 2:4, all others dense."""
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in timm.create_model(MODEL, **KWARGS).state_dict().items()}
    state[FC1].view(-1, 4)[:, 1:3] = 0
    return state


def verdicts(path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit status, checks by name, and the whole."""
    capsys.readouterr()
    status = main(["verify", str(path), *WORDS, "--json", *more])
    found = json.loads(capsys.readouterr().out)
    return status, {check["name"]: check for check in found["checks"]}, found


def test_as_a_user_types_it(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "good.safetensors")
    line = ["good.safetensors", *WORDS, "--pattern", "2:4"]
    done = subprocess.run(
        [sys.executable, "-m", "capruner", "verify", *line], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (row,) = [text.split() for text in done.stdout.splitlines() if text.startswith(FC1)]
    assert row == [FC1, "64×16", "1,024", "512", "50.00", "holds"]
    total = sum(w.numel() for w in weights.values())
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert f"{zeros:,} of {total:,} parameters are zero" in done.stdout
    assert "FAIL" not in done.stdout


def test_both_denominators(weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    _, _, found = verdicts(tmp_path / "w.safetensors", capsys, "--params", "re:.*mlp.*weight$")
    assert found["sparsity"]["prunable"] == 512 / 4096
    assert found["sparsity"]["count_prunable"] == 4 * 1024
    assert found["sparsity"]["count_all"] == sum(p.numel() for p in timm.create_model(MODEL, **KWARGS).parameters())
    assert found["ok"] is True


def test_a_broken_pattern_is_counted(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights[FC1].view(-1, 4)[7, 1] = 1.0
    save_file(weights, tmp_path / "w.safetensors")
    status, checks, found = verdicts(tmp_path / "w.safetensors", capsys, "--pattern", "2:4")
    assert status == 1
    assert f"{FC1} (1 of 256 groups)" in checks["pattern 2:4"]["detail"]
    assert {row["name"]: row["pattern"] for row in found["layers"]}["blocks.1.mlp.fc1.weight"] == "dense"
    weights[FC1].fill_(1.0)
    save_file(weights, tmp_path / "w.safetensors")
    status, checks, _ = verdicts(tmp_path / "w.safetensors", capsys, "--pattern", "2:4")
    assert (status, checks["pattern 2:4"]["detail"]) == (1, "no prunable layer has a zero")


def test_the_pattern_of_a_convolution_runs_along_its_input_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    name = "layer1.0.conv2.weight"
    kernel = torch.ones_like(state[name])
    kernel[:, 0::4] = kernel[:, 3::4] = 0  # as stored, groups of four along (in, kh, kw) would not fit
    state[name] = kernel
    save_file(state, tmp_path / "w.safetensors")
    line = ["verify", str(tmp_path / "w.safetensors"), "--model", "resnet10t", "--model-kwargs", "num_classes=3"]
    assert main([*line, "--pattern", "2:4"]) == 0
    state[name] = torch.ones_like(kernel)
    state[name][:, :32] = 0  # as many zeros, but whole groups of them
    save_file(state, tmp_path / "w.safetensors")
    assert main([*line, "--pattern", "2:4"]) == 1


def test_masks_of_a_result_and_of_a_plain_file(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(MODEL, **KWARGS)
    result = capruner.prune(
        model,
        None,
        nn.functional.cross_entropy,
        [0.25, 0.5],
        method="magnitude",
        params="re:.*mlp.*weight$",
        progress=False,
    )
    result.save(tmp_path / "result.safetensors")
    result.apply(model, 0.5)
    state = model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    status, checks, _ = verdicts(tmp_path / "w.safetensors", capsys, "--masks", str(tmp_path / "result.safetensors"))
    assert status == 0
    assert checks["masks"]["detail"] == "result.safetensors at 0.5: all 2,048 removed weights are zero"

    save_file({name: mask.to(torch.uint8) for name, mask in result.masks(0.5).items()}, tmp_path / "masks.safetensors")
    gone = (~result.masks(0.5)[FC1]).nonzero()[0]
    state[FC1][tuple(gone)] = 0.5
    save_file(state, tmp_path / "w.safetensors")
    status, checks, _ = verdicts(tmp_path / "w.safetensors", capsys, "--masks", str(tmp_path / "masks.safetensors"))
    assert status == 1
    assert f"1 of 2,048 removed weights are not zero, in {FC1}" in checks["masks"]["detail"]


def test_not_finite_another_architecture_missing(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights["blocks.0.norm1.weight"][3] = torch.nan
    weights["head.weight"] = weights["head.weight"][:2].clone()
    del weights["blocks.1.mlp.fc2.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    status, checks, found = verdicts(tmp_path / "w.safetensors", capsys)
    assert status == 1
    assert not checks["finite"]["ok"]
    assert "1 values are NaN or infinite, in blocks.0.norm1.weight" in checks["finite"]["detail"]
    assert "missing: blocks.1.mlp.fc2.bias" in checks["architecture"]["detail"]
    assert "head.weight (2, 16) for (3, 16)" in checks["architecture"]["detail"]
    assert not checks["loads in timm"]["ok"]
    assert found["ok"] is False


class Hostile:
    """Unpickled, it would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "w.pth")
    assert main(["verify", str(tmp_path / "w.pth"), *WORDS]) == 2
    assert "holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_torch_save(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": w for name, w in weights.items()}}, tmp_path / "w.pth")
    status, checks, _ = verdicts(tmp_path / "w.pth", capsys)
    assert (status, checks["architecture"]["ok"]) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.safetensors", *WORDS], "no checkpoint at nowhere.safetensors"),
        ([".", *WORDS], ". is a folder; give one of the checkpoints in it"),
        (["broken.safetensors", "--model", "vit_base"], "near: vit_base_"),
        (["cut.safetensors", *WORDS], "cut.safetensors is damaged, or no safetensors file"),
        (["broken.pth", *WORDS], "broken.pth is damaged, or holds more than tensors"),
        (["broken.safetensors", *WORDS], "broken.safetensors is damaged"),
        (["broken.safetensors", "--model", "vit_tinny"], "timm has no such model"),
        (["broken.safetensors", *WORDS, "--pattern", "block4"], "--pattern must be N:M"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("broken.safetensors", "broken.pth"):
        Path(name).write_bytes(b"not a tensor")
    save_file({"a": torch.ones(99)}, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-8])  # a copy that broke off
    assert main(["verify", *words]) == 2
    assert message in capsys.readouterr().err
