"""One writer, one digest, one broom."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import capruner
from capruner import files
from capruner.files import digest, file_digest, is_leftover, remove_leftovers, replacing
from capruner.report.contents import Contents
from capruner.report.experiment import write_page
from capruner.result import Level, PruningResult


def result() -> PruningResult:
    weight = torch.ones(2, 2)
    return PruningResult("cap", [Level(0.0, {"w": weight}, {"w": weight.bool()}, {"w": 0.0})], 4)


WRITERS = {
    "a text": lambda path: path.write_text("new"),
    "safetensors, which writes a temporary file itself": lambda path: save_file({"a": torch.ones(3)}, path),
}


@pytest.mark.promise("Files", "Files have the permissions of the umask")
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_a_new_file_has_the_permissions_of_the_umask(kind: str, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as partial:
            WRITERS[kind](partial)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_result_can_be_read_by_the_group(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        result().save(tmp_path / "r.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.safetensors").stat().st_mode) == 0o644


@pytest.mark.promise(
    "Files", "Files are written to a private place and renamed: after an error the old file is there, and nothing else"
)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(error: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def write() -> None:
        with replacing(tmp_path / "file") as partial:
            partial.write_text("ha")
            (partial.parent / ".tmpAbCdEf").write_text("what safetensors had begun")
            raise error

    with pytest.raises(error):
        write()
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_predictable_names_are_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    place = tmp_path / "folder"
    place.mkdir()
    for name in (".report.html.partial", "report.html.partial", "r.safetensors.partial", ".r.safetensors.partial"):
        (place / name).symlink_to(precious)
    write_page(Contents("t", "m", []), place / "report.html")
    result().save(place / "r.safetensors")
    assert precious.read_text() == "precious"
    assert capruner.load_result(place / "r.safetensors").method == "cap"


@pytest.mark.promise("Files", "Links are replaced, never followed")
def test_a_link_in_the_target_s_place_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "file").symlink_to(tmp_path / "precious")
    with replacing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: it exists and is not a file"), replacing(tmp_path / "pipe"):
        raise AssertionError("not reached")
    with (
        pytest.raises(OSError, match=r"cannot write to .*nowhere: No such file"),
        replacing(tmp_path / "nowhere" / "x"),
    ):
        raise AssertionError("not reached")


def test_leftovers_of_killed_writers_are_recognised_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # killed in the midst of writing: nothing cleans up
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with suppress(KeyboardInterrupt), replacing(tmp_path / "file") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt
    (tmp_path / ".tmpAbCdEf").write_text("")
    kept = [".git", ".tmp", "tmpAbCdEf", "best.safetensors", "notes.partial"]
    for name in kept:
        (tmp_path / name).write_text("")
    assert sum(is_leftover(path) for path in tmp_path.iterdir()) == 2
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_leftover_that_is_a_link_goes_without_its_target(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("")
    (tmp_path / ".x.partial").symlink_to(tmp_path / "precious")
    remove_leftovers(tmp_path)
    assert (tmp_path / "precious" / "file").exists()
    assert not (tmp_path / ".x.partial").is_symlink()


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest() == digest(["a", "bc"])
    for tensor in (
        torch.arange(6.0).view(2, 3).T,
        torch.tensor(True),
        torch.zeros(0),
        torch.ones(2, dtype=torch.bfloat16),
    ):
        content = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        assert digest([tensor]) == hashlib.sha256(content).hexdigest()
    assert digest([{"b": 1, "a": 2}]) == digest([{"a": 2, "b": 1}]) != digest([{"a": 1, "b": 2}])
