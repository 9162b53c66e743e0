"""``capruner report``: the page read as a browser and a screen reader would, and the counts behind it."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from training_case import KWARGS, MODEL, ROOT

from capruner.cli.main import main
from capruner.models.macs import multiply_adds
from capruner.report import write_report
from capruner.report.charts import nice_ticks
from capruner.report.heatmap import place

HOSTILE = "<script>alert('x')</script>\"&"
WORDS = ["--model", MODEL, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
VOID = {"meta", "wbr", "br", "line", "circle", "polyline", "rect"}
LAYERS = [
    f"blocks.{block}.{kind}.weight" for block in range(2) for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]


class Page(HTMLParser):
    """Tags with their attributes and the text inside; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")


def check(path: Path) -> Page:
    """What holds for every page."""
    raw = path.read_text()
    page = Page(raw)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "background"} & attributes.keys(), tag
        assert not any(key.startswith("on") for key in attributes), tag
        href = attributes.get("href")
        if href and href.startswith("#"):
            assert any(other.get("id") == href[1:] for _, other in page.tags), href
        elif href:
            assert ":" not in href
            assert not href.startswith("/")
            assert (path.parent / unquote(href)).is_file(), href
    for outside in ("http:", "https:", "url(", "@import", "@font-face"):
        assert outside not in raw
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for picture in [*page.all("svg"), *[a for a in page.all("span") if a.get("role") == "img"]]:
        assert picture["role"] == "img"
        named = picture.get("aria-labelledby", "").split()
        assert all(name in ids for name in named)
        assert named or picture["aria-label"]
    assert all(len(text.strip()) > 3 for tag, text in page.texts if tag in ("title", "desc"))
    assert len(page.all("figure")) == len(page.all("figcaption"))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(header.get("scope") in ("row", "col") for header in page.all("th"))
    headings = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert "prefers-color-scheme: dark" in raw
    return page


def one_shot_summary(**changes: Any) -> dict[str, Any]:
    def row(requested: float | None, top1: float, loss: float, **more: Any) -> dict[str, Any]:
        share = requested or 0.0
        common = {"reached_prunable": share, "reached_all": share / 2, "top5": 100.0, "images": 50, "seconds": 1.0}
        return {"method": "CAP", "requested": requested, "top1": top1, "loss": loss, **common, **more}

    def layers(share: float) -> list[dict[str, Any]]:
        return [{"name": name, "numel": 100, "zeros": round(100 * share), "sparsity": share} for name in LAYERS]

    return {
        "arguments": {"model": MODEL, "model_kwargs": KWARGS, "checkpoint": "a.pth", "data_dir": "data"},
        "recipe": "modifiers: []\n",
        "versions": {"torch": "2"},
        "device": "cpu",
        "rows": [
            row(None, 90.0, 0.5),
            row(0.5, 89.5, 0.52, predicted_loss=0.01, macs_left=600),
            row(0.75, 80.0, 0.9, predicted_loss=0.1, macs_left=300),
        ],
        "stages": [{"stage": "calibrate", "seconds": 3.0, "peak_memory_gib": 1.5, "parts": {"gradients": 2.0}}],
        "macs": {"input_size": [3, 16, 16], "weights": {name: 125 for name in LAYERS}, "activations": 200},
        "layers": [{"requested": s, "layers": layers(s)} for s in (0.5, 0.75)],
    } | changes


def test_one_shot(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sparsity_0.5.safetensors").write_text("")
    (tmp_path / "summary.json").write_text(json.dumps(one_shot_summary()))
    page = check(write_report(tmp_path))
    text = page.text
    assert "Top-1 accuracy is 90.00 % dense, 89.50 % at 50 % and 80.00 % at 75 %" in text
    assert "25.000" in text  # half of 50 %: of all weights
    assert "dense model does 0.0012 million (2.4e-06 GFLOPs) for one 3×16×16 input" in text
    assert "At 50 % every layer loses the same share, 50 %." in text
    assert "at 75 % predicted 0.1, measured 0.4" in text
    assert "4×" in text
    assert "calibrate" in text
    assert "3.0 seconds in all" in text
    assert "modifiers: []" in text
    assert len(page.all("svg")) == 2
    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert links.count("checkpoints/sparsity_0.5.safetensors") == 2
    assert "checkpoints/sparsity_0.75.safetensors" not in links


def test_a_loss_that_fell_has_no_point_and_no_ratio(tmp_path: Path) -> None:
    summary = one_shot_summary()
    for row in summary["rows"][1:]:
        row["loss"] = 0.4
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check(write_report(tmp_path))
    assert "Where the loss did not rise there is no point." in page.text
    assert "-0.1" in page.text
    assert "×" not in page.text.split("measured / predicted")[1].split("Time and memory")[0]
    shown = [data for tag, data in page.texts if tag == "text"]
    assert "measured" not in shown  # a legend for what is not drawn
    assert "Increase of the loss by pruning, predicted; both axes" in page.text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    summary = one_shot_summary()
    summary["arguments"] |= {HOSTILE: HOSTILE, "model": HOSTILE, "data_dir": [HOSTILE], "model_kwargs": {HOSTILE: 1}}
    summary["recipe"] = HOSTILE
    summary["versions"] = {HOSTILE: HOSTILE}
    summary["stages"] = [{"stage": HOSTILE, "seconds": 1.0, "parts": {HOSTILE: 1.0}}]
    for row in summary["rows"]:
        row["method"] = HOSTILE
    for level in summary["layers"]:
        level["layers"][0]["name"] = HOSTILE
        level["layers"][1]["name"] = f"blocks.0.{HOSTILE}.weight"
        level["layers"][2]["zeros"], level["layers"][2]["sparsity"] = 99, 0.99
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check(write_report(tmp_path))
    assert page.text.count(HOSTILE) >= 12


def test_an_older_summary_without_counts(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    summary = one_shot_summary()
    del summary["macs"], summary["stages"]
    summary["rows"] = [
        {k: v for k, v in row.items() if k not in ("predicted_loss", "macs_left")} for row in summary["rows"]
    ]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = check(write_report(tmp_path))
    assert "one 3×16×16 input" in page.text  # counted from the architecture
    assert "Predicted and measured" not in page.text
    summary["arguments"]["model"] = "no_such_model"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert (
        "Multiply-adds are not counted: --model no_such_model: timm has no such model"
        in check(write_report(tmp_path)).text
    )


def test_training(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    yaml = pytest.importorskip("yaml")
    arguments = {"model": MODEL, "model_kwargs": KWARGS, "sparseml_recipe": "x/ladder.yaml"}
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    sparsities, accuracies = [0.0, 0.5, 0.5, 0.75], [80.0, 70.0, 78.0, 60.0]
    rows = [
        {"epoch": i, "sparsity": s, "train_loss": "", "top1": a, "top5": 100, "loss": 1.0, "ema_top1": "", "seconds": 2}
        for i, (s, a) in enumerate(zip(sparsities, accuracies))
    ]
    with (tmp_path / "summary.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    updates = [
        {
            "epoch": e,
            "sparsity": s,
            "layers": [{"name": n, "numel": 8, "zeros": int(8 * s), "sparsity": s} for n in LAYERS],
        }
        for e, s in ((0.0, 0.5), (2.0, 0.75))
    ]
    (tmp_path / "layer_sparsity.json").write_text(json.dumps(updates))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best_sparsity_0.5000.safetensors").write_text("")
    page = check(write_report(tmp_path))
    assert "80.00 % before training, 78.00 % at 50 % and 60.00 % at 75 %" in page.text
    assert "epoch 2" in [data for tag, data in page.texts if tag == "a"]
    assert "trained sparse by ladder" in page.text


def test_a_checkpoint_as_a_user_types_it(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model(MODEL, **KWARGS).state_dict()
    for name in LAYERS:
        state[name][: len(state[name]) // 4] = 0
    save_file(state, tmp_path / "my weights #1.safetensors")
    line = ["report", "my weights #1.safetensors", *WORDS, "--params", "blocks"]
    done = subprocess.run([sys.executable, "-m", "capruner", *line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = check(tmp_path / "my weights #1.report.html")
    assert "25.00 % of the prunable weights are zero" in page.text
    assert "Accuracy and sparsity" not in page.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is nothing at nowhere"),
        (["empty"], "empty holds no summary.json"),
        (["w.safetensors"], "say which architecture"),
        (["w.safetensors", *WORDS], "w.safetensors is damaged"),
        (["w.safetensors", *WORDS, "--html", "no/page.html"], "there is no folder no"),
        (["other.safetensors", *WORDS], "other.safetensors holds no weights of "),
        (["empty", "--model", MODEL], "leave --model and --html out"),
        (["broken"], "is not what one-shot pruning writes"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/summary.json").write_text("{}")
    Path("w.safetensors").write_bytes(b"not a tensor")
    save_file({"a": torch.ones(1)}, "other.safetensors")
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


class Twice(nn.Module):
    """A linear layer that is called twice, a grouped convolution, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.shared = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(torch.relu(self.shared(self.conv(x))))
        return x @ x.mT


def test_multiply_adds_by_hand() -> None:
    model = Twice().train()
    counted = multiply_adds(model, (4, 5, 8))
    assert counted.weights == {"conv.weight": 6 * 2 * 9 * 5 * 8, "shared.weight": 2 * 64 * 6 * 5}
    assert counted.activations == 6 * 5 * 5 * 8
    assert counted.left({"conv.weight": 0.25}) == counted.dense - 6 * 2 * 9 * 5 * 8 // 4
    assert model.training


def test_multiply_adds_of_a_transformer() -> None:
    timm = pytest.importorskip("timm")
    tokens, width, patches = 17, 16, 16
    expected = 2 * 12 * width**2 * tokens + patches * 48 * width + 3 * width
    for device in ("cpu", "meta"):
        with torch.device(device):
            counted = multiply_adds(timm.create_model(MODEL, **KWARGS), (3, 16, 16))
        assert sum(counted.weights.values()) == expected
        assert counted.activations == 2 * 2 * tokens**2 * width  # queries by keys, and by values, in both blocks


def test_places_and_ticks() -> None:
    assert place("blocks.3.attn.qkv.weight") == ("blocks.3", "attn.qkv")
    assert place("layers.0.blocks.1.mlp.fc1.weight") == ("layers.0.blocks.1", "mlp.fc1")
    assert place("layer1.0.downsample.1.weight") == ("layer1.0", "downsample.1")
    assert place("head.weight") == ("", "head")
    assert nice_ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    for low, high in ((96.3, 98.1), (0.0, 0.0), (3, 4000)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 8


@pytest.mark.promise("Scripts", "`capruner report` on an edited experiment gives a page or one line")
@pytest.mark.parametrize("seed", range(4))
def test_edited_summaries_are_a_page_or_one_message(seed: int, tmp_path: Path) -> None:
    assert ROOT  # it puts the repository on the path
    from qa.fuzz import spoiled

    random.seed(seed)
    outcomes = set()
    for _ in range(60):
        (tmp_path / "summary.json").write_text(json.dumps(spoiled(one_shot_summary())))
        try:
            write_report(tmp_path)
            outcomes.add("page")
        except ValueError as error:
            known = str(tmp_path) in str(error) or "report.html cannot be made" in str(error)
            outcomes.add("refused" if known else str(error))
    assert outcomes == {"page", "refused"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_edited_training_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "arguments.yaml").write_text("model: [1")
    (tmp_path / "layer_sparsity.json").write_text("[]")
    for rows in ("epoch,top1\n0,many\n", "", "epoch\n\0\n", "epoch,sparsity,top1,loss,seconds\n0,0,1,1,1\n"):
        for arguments in ("model: [1", "model: 3\nsparseml_recipe: x", "- 1", "model: a\nsparseml_recipe: x"):
            (tmp_path / "summary.csv").write_text(rows)
            (tmp_path / "arguments.yaml").write_text(arguments)
            with pytest.raises(ValueError, match="is not what sparse training writes"):
                write_report(tmp_path)
