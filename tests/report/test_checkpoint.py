"""The one reader of checkpoints: every command takes what it takes, with the same answer, and no code of a file runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_case import KWARGS, MODEL

import capruner
from capruner.cli.main import main
from capruner.report.checkpoint import is_result, load_weights, read_weights

timm = pytest.importorskip("timm")
WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
ARGUMENTS = argparse.Namespace(model=MODEL, lr=0.1, betas=(0.9, 0.99), config=None)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in timm.create_model(MODEL, **KWARGS).state_dict().items()}
    state["blocks.0.mlp.fc1.weight"].view(-1, 4)[:, 1:3] = 0
    return state


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


other = {"head.bias": torch.full((3,), 7.0)}
LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "a state dict": lambda w: w,
    "timm's model_best": lambda w: {
        "epoch": 3,
        "arch": MODEL,
        "state_dict": w,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": ARGUMENTS,
        "metric": np.float64(81.5),
    },
    "timm's with a moving average": lambda w: {"args": ARGUMENTS, "state_dict": other, "state_dict_ema": w},
    "no moving average after all": lambda w: {"state_dict": w, "state_dict_ema": None},
    "DeiT's": lambda w: {"model": w, "args": ARGUMENTS, "epoch": 3},
    "compiled": lambda w: {"state_dict": prefixed(w, "_orig_mod.")},
    "distributed": lambda w: prefixed(w, "module."),
    "both": lambda w: prefixed(w, "module._orig_mod."),
    "both the other way": lambda w: {"state_dict": prefixed(w, "_orig_mod.module.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_training_scripts_write(weights: dict[str, Tensor], layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](weights), tmp_path / "model_best.pth.tar")
    found = read_weights(tmp_path / "model_best.pth.tar")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_safetensors_of_a_compiled_model(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(prefixed(weights, "_orig_mod."), tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").keys() == weights.keys()


def test_every_command_takes_timms_checkpoint(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model_best.pth.tar"
    torch.save(LAYOUTS["timm's model_best"](prefixed(weights, "_orig_mod.")) | {"metric": 81.5}, path)
    assert main(["verify", str(path), *WORDS]) == 0
    assert main(["report", str(path), *WORDS]) == 0
    copied = tmp_path / "copy.safetensors"
    assert main(["export", str(path), *WORDS, "--output", str(copied)]) == 0
    assert torch.equal(read_weights(copied)["head.bias"], weights["head.bias"])
    capsys.readouterr()
    assert main(["bench", str(path), *WORDS, "--engines", "torch", "--rounds", "1", "--seconds", "0.01"]) == 0
    assert "torch" in capsys.readouterr().out
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from capruner.vision.modeling import build_model

    model = build_model(MODEL, KWARGS, str(path), pretrained=True)  # no download: the checkpoint replaces all weights
    assert torch.equal(model.state_dict()["head.bias"], weights["head.bias"])


def test_every_command_takes_a_sparse_file(
    weights: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sparse.safetensors"
    capruner.save_sparse(weights, path)
    assert all(torch.equal(read_weights(path)[name], value) for name, value in weights.items())
    assert main(["verify", str(path), *WORDS]) == 0
    assert "ok    loads: capruner.load_sparse expands it" in capsys.readouterr().out
    assert main(["report", str(path), *WORDS]) == 0
    page = path.with_suffix(".report.html").read_text()
    assert "bit mask" in page
    assert "capruner-sparse" not in page  # the format's own header
    assert main(["export", str(path), *WORDS, "--output", str(tmp_path / "plain.safetensors")]) == 0
    assert torch.equal(read_weights(tmp_path / "plain.safetensors")["head.bias"], weights["head.bias"])


class Foreign:
    """Something that unpickling would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


@pytest.mark.promise("Hostile input", "No code runs from a weights file")
@pytest.mark.parametrize("place", ["args", "inside"])
def test_code_is_not_run(weights: dict[str, Tensor], place: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    args: Any = Foreign() if place == "args" else argparse.Namespace(x=Foreign())
    torch.save({"state_dict": weights, "args": args}, "evil.pth")
    with pytest.raises(
        ValueError, match=r"evil.pth is damaged, or holds more than tensors, plain values and arguments"
    ):
        read_weights("evil.pth")
    assert not Path("was_run").exists()


def test_weights_of_another_architecture_are_one_line(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w.safetensors does not fit the model: .*more\)$") as caught:
        load_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)


def test_a_result_is_called_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(8, 4)
    batches = [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(4)]
    path = tmp_path / "result.safetensors"
    capruner.prune(model, batches, sparsity=0.5, num_grads=4).save(path)
    assert is_result(path)
    with pytest.raises(ValueError, match="is a pruning result, not a checkpoint"):
        read_weights(path)
    for words in ([], WORDS):
        assert main(["report", str(path), *words]) == 2
        assert "is a pruning result, not a checkpoint" in capsys.readouterr().err
    for command in ("verify", "bench"):
        assert main([command, str(path), *WORDS]) == 2
        assert "is a pruning result, not a checkpoint" in capsys.readouterr().err


def test_arguments_with_paths_and_numpy_values(weights: dict[str, Tensor], tmp_path: Path) -> None:
    args = argparse.Namespace(output=Path("out"), seed=np.int64(3), flag=np.bool_(True))
    torch.save({"model": weights, "args": args}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == weights.keys()
    assert isinstance(args.output, PurePosixPath)
