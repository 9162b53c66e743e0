"""``capruner shrink`` as a user types it: what it prints and writes, and what reads its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_case import KWARG_WORDS, KWARGS, MODEL

import capruner
from capruner.cli import shrink as shrink_command
from capruner.cli.arguments import Parser
from capruner.cli.main import main

timm = pytest.importorskip("timm")


def words(place: Path, *more: Any) -> list[str]:
    model = ["--model", MODEL, "--model-kwargs", *KWARG_WORDS, "--checkpoint", place / "dense.safetensors"]
    data = [
        "--data-dir",
        place / "data",
        "--workers",
        0,
        "-gb",
        4,
        "-vb",
        9,
        "--num-grads",
        4,
        "--mean",
        *[0.5] * 3,
        "--std",
        *[0.5] * 3,
    ]
    return [str(word) for word in ("shrink", *model, *data, "--output", place / "small.safetensors", *more)]


def test_it_writes_a_smaller_model_that_export_reads(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, "--macs", 0.6, "--distill-passes", 1, "--exclude", "blocks.0.attn")) == 0
    shown = capsys.readouterr().out
    assert "blocks.0.mlp.fc1  neurons" in shown
    assert "blocks.0.attn: excluded" in shown
    summary = json.loads((place / "small.json").read_text())
    assert list(summary["top1"]) == ["dense", "shrunk", "distilled"]
    dense, now = summary["costs"]["macs"]
    assert now <= 0.6 * dense
    assert f"macs        {dense:,} -> {now:,}" in shown
    page = (place / "small.report.html").read_text(encoding="utf-8")
    assert f"{summary['top1']['distilled']:.2f} %" in page
    assert "excluded" in page
    assert page.count('class="bar"') == len(summary["units"])
    small = capruner.load_shrunk(place / "small.safetensors", timm.create_model(MODEL, **KWARGS))
    assert capruner.multiply_adds(small, (3, 16, 16)).dense == now
    pytest.importorskip("onnxruntime")
    export = [
        "export",
        place / "small.safetensors",
        "--model",
        MODEL,
        "--model-kwargs",
        *KWARG_WORDS,
        "--output",
        place / "small.onnx",
    ]
    assert main(list(map(str, export))) == 0
    assert "onnxruntime against torch" in capsys.readouterr().out


def test_without_output_it_writes_into_the_folder_output_and_replaces_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = words(place, "--macs", 0.6)
    at = line.index("--output")
    line = line[:at] + line[at + 2 :]
    assert main(line) == 0
    label = MODEL.replace("/", "_")
    assert {path.name for path in (tmp_path / "output").iterdir()} == {
        f"{label}-macs-0.6.safetensors",
        f"{label}-macs-0.6.json",
        f"{label}-macs-0.6.report.html",
    }
    assert main(line) == 2
    assert "exists already" in capsys.readouterr().err


def test_its_knobs_have_the_defaults_of_the_function() -> None:
    parser = Parser()
    shrink_command.add_arguments(parser)
    args = parser.parse_args(["--model", MODEL, "--macs", "0.5", "--data-dir", "DATA"])
    assert (args.exclude, args.num_grads, args.damp, args.distill_passes) == ((), 512, 0.01, 0)
    assert "(default 512)" in parser.format_help()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--distill-passes", "-1"], "distill_passes must be a number, at least 0"),
        (["--num-grads", "auto"], "'auto' is invalid"),
        (["--damp", "0"], "damp must be a positive number"),
    ],
)
def test_its_knobs_are_checked_as_those_of_prune(
    more: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words(place, "--macs", "0.5", *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--macs", "50"], "write 0.5 for half"),
        (["--macs", "0.5", "--units", "weights"], "units must be some of"),
        (["--macs", "0.001"], "out of reach"),
        (["--macs", "0.5", "--output", "small.pth"], "ends in .safetensors"),
        (["--macs", "0.5", "--output", "nowhere/small.safetensors"], "there is no folder nowhere"),
    ],
)
def test_mistakes(more: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(place, *more)) == 2
    assert message in capsys.readouterr().err
