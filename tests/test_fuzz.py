"""A short stretch of qa/fuzz.py; and what it has found, one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from training_case import ROOT

import capruner
from capruner.files import digest

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
assert ROOT  # it puts the repository on the path
from capruner.checkpoint import run  # noqa: E402
from capruner.cli.arguments import UserError  # noqa: E402
from capruner.sparseml import recipe  # noqa: E402
from qa import fuzz  # noqa: E402


@pytest.mark.promise("Hostile input", "Damaged result files are refused with a message")
@pytest.mark.parametrize(("name", "executions"), [("result", 300), ("state", 300), ("recipe", 100), ("report", 150)])
def test_spoiled_files_are_refused(name: str, executions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)
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


@pytest.mark.promise("Files", "A result file has a checksum of everything in it")
def test_one_bit_of_a_weight_is_found_by_the_checksum(result: Path) -> None:
    content = bytearray(result.read_bytes())
    content[-40] ^= 1
    result.write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum is wrong|weights that are not 0"):
        capruner.load_result(result)


@pytest.mark.promise("Files", "A result file has a checksum of everything in it")
def test_a_changed_header_is_found_by_the_checksum(result: Path) -> None:
    for change in (
        lambda h: h["settings"].update(damp=0.5),
        lambda h: h["timings"].update(fisher=0.5),
        lambda h: h.update(total_weights=h["total_weights"] + 1),
        lambda h: h["levels"][0]["losses"].update({"0.weight": 0.25}),
        lambda h: h.update(method="obs"),
        lambda h: h.pop("sha256"),
    ):
        content = result.read_bytes()
        rewrite(result, change)
        with pytest.raises(ValueError, match="is damaged"):
            capruner.load_result(result)
        result.write_bytes(content)
    assert capruner.load_result(result).sparsities == [0.5, 0.8]


def test_results_of_the_first_version_are_read(result: Path) -> None:
    with safe_open(result, framework="pt") as file:
        checksum = digest(part for key in sorted(file.keys()) for part in (key, file.get_tensor(key)))
    rewrite(result, lambda header: header.update(version=1, sha256=checksum))
    assert capruner.load_result(result).sparsities == [0.5, 0.8]
    rewrite(result, lambda header: header.update(sha256=checksum[::-1]))
    with pytest.raises(ValueError, match="its checksum is wrong"):
        capruner.load_result(result)
    rewrite(result, lambda header: header.pop("sha256"))
    assert capruner.load_result(result).sparsities == [0.5, 0.8]


@pytest.mark.promise("Hostile input", "Damaged result files are refused with a message")
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
    "a power hidden in escapes": (f'{HEAD}"eval(9\\x2a\\x2a9\\x2a\\x2a9)"\n'.encode(), r"\*\* is not calculated here"),
    "squares of squares": (
        (
            "x0: 1000000\nx1: eval(x0 * x0)\n"
            + "".join(f"x{i}: eval(x{i - 1} * x{i - 1})\n" for i in range(2, 30))
            + f"{HEAD}3.0\n"
        ).encode(),
        "larger than 1e\\+18",
    ),
    "brackets in brackets": (b"a: " + b"[" * 400_000, "nests more than 30 levels"),
    "brackets in brackets, over lines": (b"a: " + b"[\n" * 400_000, "nests more than 30 levels"),
    "lists in lists": (b"- " * 400_000, "nests more than 30 levels"),
    "maps in maps": (b"? " * 400_000, "nests more than 30 levels"),
    "60,000 keys": ("".join(f"k{i}: {i}\n" for i in range(60_000)).encode(), "more than 1,000 keys"),
    "a list of 100,000 values": (
        f"a: [{'1, ' * 100_000}]\n{HEAD}3.0\n".encode(),
        "more than 1,000 keys or 20,000 YAML tokens",
    ),
    "references to references": (f"{LAUGHS}{HEAD}3.0\n".encode(), "more than 100,000 values"),
    "no text": (b"\xff\xfe\x00modifiers", "it is no text"),
    "very long": (b"#" * 1_000_001, "more than 1,000,000 bytes"),
    "a division by zero": (f"{HEAD}eval(1 / 0)\n".encode(), "does not load: .*zero"),
    "python": (b"modifiers: !!python/object/apply:os.system ['touch PWNED']\n", "does not load|could not determine"),
    "a call": (f"{HEAD}eval(__import__('os').system('touch PWNED'))\n".encode(), "does not load"),
}


@pytest.mark.promise(
    "Hostile input",
    "Powers, huge numbers, endless references, deep nesting, too many keys and large files are refused in recipes",
)
@pytest.mark.parametrize("case", RECIPES)
def test_recipes_that_mean_harm(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = RECIPES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        recipe.load_manager(str(tmp_path / "recipe.yaml"))
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.promise("Hostile input", "A pattern that takes longer than 10 s to match is refused")
@pytest.mark.parametrize("pattern", ["re:(.*)*x$", r"re:(\w|\w\w)+!$", "re:" + ".*" * 12 + "!$", "re:(.{0,50}){50}!$"])
def test_patterns_that_take_for_ever(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from capruner.models import selection

    monkeypatch.setattr(selection, "PATIENCE", 1.0)
    model = nn.ModuleDict({"a_layer_with_a_name_that_is_as_long_as_some_are": nn.Linear(2, 2)})
    with pytest.raises(selection.SelectionError, match=r"takes longer than 1 s; write it without repetitions"):
        selection.select_parameters(model, pattern)


def test_repeated_groups_that_are_quick_are_matched() -> None:
    from capruner.models.selection import select_parameters

    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)})})
    assert list(select_parameters(model, r"re:(\w+\.)+weight$")) == ["a.b.weight"]


@pytest.mark.promise("Hostile input", "A recipe with more than 10,000 pruning updates is refused")
def test_more_updates_than_any_training_has(tmp_path: Path) -> None:
    from capruner.recipes import load_training

    text = "modifiers:\n  - !CAPruningModifier\n      params: __ALL_PRUNABLE__\n      init_sparsity: 0.1\n      final_sparsity: 0.5\n"
    text += "      start_epoch: 0.0\n      end_epoch: 10.0\n      update_frequency: {}\n      num_grads: 8\n"
    for frequency in ("0.00001", "1.0e-300"):
        (tmp_path / "recipe.yaml").write_text(text.format(frequency))
        with pytest.raises(UserError, match=r"more than 10,000 updates; raise it"):
            load_training(tmp_path / "recipe.yaml")


def test_what_sparseml_calculates_is_still_calculated(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"epochs: 3.0\n{HEAD}eval(epochs * 2 + 1)\n")
    assert recipe.load_manager(str(tmp_path / "recipe.yaml")).max_epochs == 7
