"""What README and guide tell a reader to run, runs; and how they say it."""

from __future__ import annotations

import copy
import re
import shlex
import tokenize
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import capruner

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDE = [page for page in PAGES if page.parent.name in ("guide", "reference") or page.name in ("README.md", "index.md")]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "import lightning": "tests/test_examples.py",
    "from transformers": "tests/test_examples.py",
    "import capruner.sparseml": "tests/sparseml",
    "init_process_group": "tests/distributed/test_distributed.py",
    "accelerator": "tests/training/test_gradual.py",
    "load_training": "tests/recipes/test_training.py",
    'mode="train"': "tests/test_any_model.py",
}
"""What a block needs that is not here, and where the same is tested."""


class Model(nn.Module):
    """The reader's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc1(x)))


def train_one_epoch(model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def names() -> dict[str, Any]:
    """What a page takes for granted."""
    model = Model()
    x = torch.randn(64, 16)
    loader = list(zip(x.split(4), model(x).argmax(1).split(4), strict=True))
    return {
        "torch": torch,
        "capruner": capruner,
        "model": model,
        "dense": copy.deepcopy(model),
        "loader": loader,
        "loss_fn": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "train_one_epoch": train_one_epoch,
        "accuracy": lambda model: 100 * (model(x).argmax(1) == torch.cat([y for _, y in loader])).float().mean(),
    }


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def identify(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.filterwarnings("ignore:.*ended after:UserWarning", "ignore:.*is started again:UserWarning")
@pytest.mark.parametrize("page", [page for page in GUIDE if blocks(page, "python")], ids=identify)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = names()
    for number, source in enumerate(blocks(page, "python"), 1):
        code = compile(re.sub(r"num_grads=\d+", "num_grads=16", source), f"{page.name}, block {number}", "exec")
        if not any(word in source for word in ELSEWHERE):
            exec(code, scope)
        if "mask_model(model)" in source:
            assert (scope["model"].fc1.weight == 0).any()


def commands() -> dict[str, set[str]]:
    """``{command line without its prompt: pages that have it}``."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.MULTILINE):
                found.setdefault(line, set()).add(identify(page))
    return found


@pytest.mark.parametrize("line", sorted(commands()))
def test_commands_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for script in [word for word in words if word.endswith(".py") and "/" in word]:
        assert (ROOT / script).is_file()
    for recipe in [word for word in words if word.startswith("research/") and "." in word]:
        assert (ROOT / recipe).is_file()
    scripts = {"research/sparse_training.py": "train", "research/one_shot_pruning.py": "prune"}
    start = next((index for index, word in enumerate(words) if word in scripts), 0)
    command = words[1] if words[0] == "capruner" else scripts.get(words[start])
    if not command:
        return
    pytest.importorskip("timm")
    from capruner.cli.main import main

    with pytest.raises(SystemExit):
        main([command, "--help"])
    known = re.findall(r"--?[a-z][a-z0-9-]*", capsys.readouterr().out)
    for flag in [word for word in words[start:] if re.match(r"--?[a-z]", word)]:
        assert flag in known, f"{command} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_paths_exist(page: Path) -> None:
    paths = re.findall(
        r"(?<![\w/.])((?:src|tests|benchmarks|qa|docs|examples|research)/[\w/.+-]*\w)", page.read_text("utf-8")
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_is_short_and_its_links_are_absolute() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    links = [target for bang, target in re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text) if not bang]
    assert all(link.startswith("https://") for link in links)
    assert all(f"make {target}" in text for target in ("demo", "test"))


# Phrases that read as if translated, and what to write instead.
BANNED = {
    r"\bgoes on\b|\bgo on\b": "resumes, continues",
    r"\banew\b": "again",
    r"\bthe same bits\b|\bsame bits\b": "bit-identical",
    r"\b(is|are) no (y|[a-z]+) any ?more\b": "is no longer",
    r"\bso many\b": "N",
    r", say[,.;)]|, say$| say\)": "for example",
    r"\bcannot be,|\bthat cannot be[,.;]": "is invalid",
    r"\bmeans? nothing to\b": "is not supported by",
    r"\bis of another (run|model)\b": "was created with different arguments",
    r"\b(is|are|was|were) passed over\b": "skipped",
    r"\bheld against\b": "compared with",
    r"\bin words\b": "with a message",
}

PROSE = ("COMMENT", "STRING", "FSTRING_MIDDLE")


def phrases(text: str) -> list[str]:
    """The banned phrases in a text, with what to write."""
    plain = " ".join(text.split())
    return [
        f"{match[0]!r}: write {better}" for pattern, better in BANNED.items() for match in re.finditer(pattern, plain)
    ]


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_documents_have_no_banned_phrases(page: Path) -> None:
    assert phrases(page.read_text(encoding="utf-8")) == []


def prose(path: Path) -> str:
    """Comments, docstrings and messages of a module."""
    with tokenize.open(path) as file:
        tokens = tokenize.generate_tokens(file.readline)
        return "\n".join(token.string for token in tokens if tokenize.tok_name[token.type] in PROSE)


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=identify)
def test_sources_have_no_banned_phrases(path: Path) -> None:
    assert phrases(prose(path)) == []


def test_banned_phrases_are_seen() -> None:
    assert len(phrases("It goes on from there\nto the same bits, 8GiB say.")) >= 2
    assert phrases("Training resumes with bit-identical results.") == []
