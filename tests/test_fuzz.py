"""A short stretch of benchmarks/fuzz.py; and what it has found, one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_case import ROOT

import capruner
from capruner import state

pytest.importorskip("sparseml")
assert ROOT  # it puts the repository on the path
from benchmarks import fuzz  # noqa: E402
from research.utils import recipe  # noqa: E402
from research.utils.cli import UserError  # noqa: E402


@pytest.mark.parametrize(("name", "executions"), [("result", 300), ("state", 300), ("recipe", 100)])
def test_spoiled_files_are_refused(name: str, executions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SAVE_EVERY", 0.0)
    found = fuzz.fuzz(name, executions, minutes=1)
    assert found["details"] == []
    assert (found["crashes"], found["hangs"], found["code"]) == (0, 0, 0)
    assert found["refused"] > 0.5 * found["executions"]


def test_the_fuzzer_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rotten(fuzz.Target):
        calls = 0

        def one(self) -> None:
            Rotten.calls += 1
            if Rotten.calls == 1:
                raise TypeError("a crash")
            if Rotten.calls == 2:
                while True:
                    pass
            if Rotten.calls == 3:
                Path("PWNED").write_text("")
            if Rotten.calls == 4:
                open("/nowhere/outside", "w")  # noqa: SIM115

    monkeypatch.setitem(fuzz.TARGETS, "rotten", Rotten)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    found = fuzz.fuzz("rotten", 5, minutes=1)
    assert (found["crashes"], found["hangs"], found["refused"], found["accepted"]) == (1, 1, 1, 2)
    assert found["code"] >= 2  # the planted file, and the attempt to write outside


@pytest.fixture
def result(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    capruner.prune(model, fuzz.DATA, sparsity=[0.5, 0.8], **fuzz.ARGUMENTS).save(tmp_path / "result")
    return tmp_path / "result"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with another header; its tensors as they are."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + size])
    ours = json.loads(outer["__metadata__"]["capruner"])
    change(ours)
    outer["__metadata__"]["capruner"] = json.dumps(ours)
    text = json.dumps(outer).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_one_bit_of_a_weight_is_found_by_the_checksum(result: Path) -> None:
    content = bytearray(result.read_bytes())
    content[-40] ^= 1
    result.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum is wrong|weights that are not 0"):
        capruner.load_result(result)


def test_a_result_of_an_earlier_version_has_no_checksum(result: Path) -> None:
    rewrite(result, lambda header: header.pop("sha256"))
    assert capruner.load_result(result).sparsities == [0.5, 0.8]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(total_weights=0),
        lambda h: h.update(total_weights="many"),
        lambda h: h.update(levels=[]),
        lambda h: h.update(levels={}),
        lambda h: h["levels"][0].update(sparsity="0.5"),
        lambda h: h["levels"][0].update(sparsity=float("nan")),
        lambda h: h["levels"][0].update(losses={}),
        lambda h: h["levels"][0]["losses"].update({"0.weight": None}),
        lambda h: h.update(settings=[]),
        lambda h: h.update(method=3),
        lambda h: h.update(timings={"fisher": "long"}),
    ],
)
def test_headers_that_cannot_be(change: Callable[[dict[str, Any]], object], result: Path) -> None:
    rewrite(result, change)
    with pytest.raises(ValueError, match="is damaged or not a pruning result"):
        capruner.load_result(result)


HEAD = "modifiers:\n  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: "
LAUGHS = "a0: &a0 [0, 0]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
RECIPES: dict[str, tuple[bytes, str]] = {
    "a power without end": (f"{HEAD}eval(9**9**9**9)\n".encode(), r"\*\* is not calculated here"),
    "references to references": (f"{LAUGHS}{HEAD}3.0\n".encode(), "78 references"),
    "no text": (b"\xff\xfe\x00modifiers", "it is no text"),
    "very long": (b"#" * 1_000_001, "more than 1,000,000 bytes"),
    "a division by zero": (f"{HEAD}eval(1 / 0)\n".encode(), "does not load: .*zero"),
    "python": (b"modifiers: !!python/object/apply:os.system ['touch PWNED']\n", "does not load|could not determine"),
    "a call": (f"{HEAD}eval(__import__('os').system('touch PWNED'))\n".encode(), "does not load"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_mean_harm(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = RECIPES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        recipe.load_manager(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "PWNED").exists()


def test_what_sparseml_calculates_is_still_calculated(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"epochs: 3.0\n{HEAD}eval(epochs * 2 + 1)\n")
    assert recipe.load_manager(str(tmp_path / "recipe.yaml")).max_epochs == 7
