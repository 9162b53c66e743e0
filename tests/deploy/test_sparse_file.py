"""Checkpoints with a bit per zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import capruner
from capruner.deploy.sparse_file import is_sparse, save_sparse, sparse_bytes
from capruner.report.experiment import checkpoint_facts


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 50, generator=generator)
    matrix[torch.rand(40, 50, generator=generator) < 0.9] = 0
    return {
        "a.weight": matrix,
        "a.bias": torch.randn(40, generator=generator),
        "dense": torch.randn(8, 8, generator=generator),
        "bf16": matrix.bfloat16(),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "all": torch.zeros(3, 5),
        "transposed": matrix.T,
    }


def test_what_is_read_is_what_was_written(weights: dict[str, Tensor], tmp_path: Path) -> None:
    size = capruner.save_sparse(weights, tmp_path / "w.safetensors")
    loaded = capruner.load_sparse(tmp_path / "w.safetensors")
    assert list(loaded) == list(weights)
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
    assert size == (tmp_path / "w.safetensors").stat().st_size
    assert is_sparse(tmp_path / "w.safetensors")


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    odd = torch.zeros(4, 8)
    odd[0, 0], odd[1, 1], odd[2, 2] = float("nan"), float("inf"), -1e-45
    save_sparse({"odd": odd}, tmp_path / "w.safetensors")
    torch.testing.assert_close(
        capruner.load_sparse(tmp_path / "w.safetensors")["odd"], odd, equal_nan=True, rtol=0, atol=0
    )


def test_size_at_87_percent_zeros(tmp_path: Path) -> None:
    model = nn.Linear(512, 512, bias=False)
    with torch.no_grad():
        model.weight.view(-1, 8)[:, 1:] = 0
    exact, half = tmp_path / "exact.safetensors", tmp_path / "half.safetensors"
    dense = 512 * 512 * 4
    # One bit per weight, and an eighth of the values in four or two bytes.
    assert save_sparse(model, exact) == pytest.approx(dense * (1 / 32 + 1 / 8), rel=0.01)
    assert save_sparse(model, half, half=True) == pytest.approx(dense * (1 / 32 + 1 / 16), rel=0.01)
    assert sparse_bytes(model.state_dict()) == dense // 32 + dense // 8
    loaded = capruner.load_sparse(half)["weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, model.weight.detach().half().float())


def test_half_leaves_vectors_exact_and_refuses_overflow(tmp_path: Path) -> None:
    state = {"running_var": torch.tensor([1e5, 1e-9]), "weight": torch.full((2, 2), 1e5)}
    with pytest.raises(ValueError, match=r"weight holds values up to 100000, more than float16"):
        save_sparse(state, tmp_path / "w.safetensors", half=True)
    assert list(tmp_path.iterdir()) == []
    save_sparse({"running_var": state["running_var"]}, tmp_path / "w.safetensors", half=True)
    assert torch.equal(capruner.load_sparse(tmp_path / "w.safetensors")["running_var"], state["running_var"])


def test_other_files_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"dense": weights["dense"]}, plain)
    with pytest.raises(ValueError, match="is not a sparse checkpoint"):
        capruner.load_sparse(plain)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        capruner.load_sparse(tmp_path / "missing.safetensors")


def test_facts_are_read_by_the_report(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_sparse(weights, tmp_path / "w.safetensors", facts={"top1": 71.5})
    assert checkpoint_facts(tmp_path / "w.safetensors") == {"top1": 71.5}
    save_sparse(weights, tmp_path / "w.safetensors")
    assert checkpoint_facts(tmp_path / "w.safetensors") == {}


@pytest.mark.parametrize("damage", ["values", "mask", "dtype", "missing"])
def test_damaged_files_are_named(weights: dict[str, Tensor], damage: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_sparse(weights, path)
    stored = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["capruner"])
    if damage == "values":
        stored["a.weight.values"] = stored["a.weight.values"][1:].clone()
    elif damage == "mask":
        stored["a.weight.mask"] = stored["a.weight.mask"][1:].clone()
    elif damage == "dtype":
        header["tensors"]["dense"]["dtype"] = "float33"
    else:
        del stored["a.bias"]
    save_file(stored, path, metadata={"capruner": json.dumps(header)})
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        capruner.load_sparse(path)
