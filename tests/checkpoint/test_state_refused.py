"""A state folder that is foreign, torn, stale, newer or of another run is refused by name, and neither the model nor the folder is changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interruptions import ARGUMENTS, Data, Killed, net
from torch import Tensor, nn
from untouched import same, snapshot

import capruner
from capruner.checkpoint import StateError, store
from capruner.checkpoint import run as checkpoint_run
from capruner.files import digest


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state of a run that was killed in the midst of its gradients."""
    monkeypatch.setattr(checkpoint_run, "SAVE_EVERY", 0.0)
    with pytest.raises(Killed):
        run(tmp_path / "state", Data(kill_at=20))
    return tmp_path / "state"


def run(folder: Path, data: Data | None = None, **more: Any) -> capruner.PruningResult:
    data = data or Data()
    arguments: dict[str, Any] = ARGUMENTS | {"sparsity": 0.5, "state_dir": folder} | more
    return capruner.prune(net(), data, data.loss, **arguments)


def rank(folder: Path) -> Path:
    return folder / "rank-0-of-1"


def manifest(folder: Path) -> Path:
    (found,) = rank(folder).glob("manifest-*.json")
    return found


def feed(folder: Path) -> Path:
    return sorted(rank(folder).glob("progress-*.safetensors"))[0]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest whose checksum is right: what only somebody who means it can write."""
    whole = json.loads(manifest(folder).read_text())
    change(whole["state"])
    whole["sha256"] = digest([whole["state"]])
    manifest(folder).write_text(json.dumps(whole))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file of somebody else's": (lambda f: (f / "thesis.tex").write_text("x"), r"thesis.tex is not part of a capruner checkpoint; choose"),
    "a foreign file in a process's folder": (lambda f: (rank(f) / "notes.txt").write_text("x"), r"notes.txt is not part of a capruner checkpoint"),
    "a torn manifest": (lambda f: manifest(f).write_bytes(manifest(f).read_bytes()[:200]), r"manifest-\d+.json cannot be read"),
    "an empty manifest": (lambda f: manifest(f).write_bytes(b""), r"manifest-\d+.json cannot be read"),
    "a manifest that is a list": (lambda f: manifest(f).write_text("[]"), r"manifest-\d+.json cannot be read"),
    "a changed manifest": (lambda f: manifest(f).write_text(manifest(f).read_text().replace('"taken": 18', '"taken": 12')), r"manifest-\d+.json is damaged"),
    "another program's": (lambda f: rewrite(f, lambda b: b.update(format="other")), r"is not a capruner checkpoint"),
    "a newer version": (lambda f: rewrite(f, lambda b: b.update(version=store.VERSION + 1)), r"is from a newer capruner .* update capruner"),
    "an older version": (lambda f: rewrite(f, lambda b: b.update(version=1)), r"is from an older capruner .* finish the run with that version"),
    "a path in place of a file": (lambda f: rewrite(f, lambda b: b["progress"].update(files={"../../up.safetensors": "0"})), "names '../../up"),
    "another rank's": (lambda f: rewrite(f, lambda b: b.update(rank=1)), r"was saved by rank 1 of 1, this is rank 0 of 1"),
    "a damaged tensor file": (lambda f: flip(feed(f)), r"progress-\d+-00000.safetensors is damaged"),
    "a tensor file cut short": (lambda f: feed(f).write_bytes(feed(f).read_bytes()[:100]), r"progress-\d+-00000.safetensors is damaged"),
    "a missing tensor file": (lambda f: feed(f).unlink(), r"progress-\d+-00000.safetensors cannot be read"),
    "a run of two processes": (lambda f: (f / "rank-1-of-2").mkdir(), r"rank-1-of-2 was saved by 2 processes, this run has 1"),
    "a place that is no number": (lambda f: rewrite(f, lambda b: b["progress"]["state"]["stream"].update(taken="many")), r"has no gradients of this run"),
    "a place without a number": (lambda f: rewrite(f, lambda b: b["progress"]["state"]["stream"].pop("used")), r"has no gradients of this run"),
    "no place at all": (lambda f: rewrite(f, lambda b: b["progress"].pop("state")), r"manifest-\d+.json cannot be read"),
    "a place that is a list": (lambda f: rewrite(f, lambda b: b["progress"].update(state=[])), r"state is not of type dict"),
    "files that are a word": (lambda f: rewrite(f, lambda b: b["progress"].update(files="")), r"files is not of type dict"),
    "a skipped batch that never came": (lambda f: rewrite(f, lambda b: b["progress"]["state"]["stream"].update(skipped=[99])), r"has no gradients of this run"),
    "a place of negative size": (lambda f: rewrite(f, lambda b: b["progress"]["state"]["stream"].update(drawn=-3)), r"has no gradients of this run"),
    "more gradients than there are": (lambda f: rewrite(f, lambda b: b["progress"]["state"]["stream"].update(taken=4000)), r"has no gradients of this run"),
    "a layer too few": (lambda f: rewrite(f, lambda b: b["progress"]["files"].popitem()), r"has no gradients of this run"),
    "notes that are none": (lambda f: rewrite(f, lambda b: b["notes"]["report"].update(damped_blocks=3)), r"damped_blocks"),
}  # fmt: skip


@pytest.mark.promise("Resume", "A foreign folder and a torn or changed file are refused before any gradient")
@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_state_is_refused_by_name(case: str, half: Path) -> None:
    spoil, message = SPOILED[case]
    spoil(half)
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    model, data = net(), Data()
    untouched = snapshot(model)
    with pytest.raises(StateError, match=message) as caught:
        capruner.prune(model, data, data.loss, 0.5, state_dir=half, **ARGUMENTS)
    assert any(word in str(caught.value) for word in ("delete the folder", "choose"))  # what to do
    assert same(snapshot(model), untouched)
    assert data.seen == 0  # refused before any work
    after = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    if case == "a layer too few":  # what no manifest names any more is what a kill leaves: it goes
        assert len(before) == len(after) + 1
    else:
        assert after == before


@pytest.mark.promise("Resume", "Other arguments are refused by name")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"damp": 1e-2}, "damp was 0.001, is 0.01"),
        ({"num_grads": 41}, "num_grads was 40, is 41"),
        ({"sparsity": 0.6}, r"sparsity was \[0.5\], is \[0.6\]"),
        ({"method": "fast_cap", "num_grads": 40}, "method was cap, is fast_cap"),
        ({"params": ["0.weight"]}, "parameters"),
        ({"masks": "zeros", "sparsity": 0.5}, "masks"),
        ({"labels": "model"}, "labels was data, is model"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[0],
)
def test_other_arguments_are_named(more: dict[str, Any], said: str, half: Path) -> None:
    if "masks" in more:  # the model of the fixture has no zeros, so there must be one mask that differs
        more = more | {"masks": {"0.weight": torch.arange(31 * 20).view(31, 20) % 9 != 0}}
    with pytest.raises(StateError, match=f"was created with different arguments .*{said}.*pass the same arguments"):
        run(half, **more)


@pytest.mark.promise("Resume", "Other weights are refused")
def test_other_weights_are_another_run(half: Path) -> None:
    model, data = net(), Data()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    with pytest.raises(StateError, match=r"was created with different arguments \(weights"):
        capruner.prune(model, data, data.loss, 0.5, state_dir=half, **ARGUMENTS)


def test_other_data_are_found_by_the_first_batch_that_differs(half: Path) -> None:
    data = Data()
    data.generator.manual_seed(4)
    with pytest.raises(StateError, match=r"batch 0 of the calibration data differs .*seed what shuffles .*or delete"):
        run(half, data)


class Changed(Data):
    """One value of one batch is another; which pass over the data it is does not matter."""

    def __init__(self, at: int, part: int) -> None:
        super().__init__()
        self.at, self.part = at, part

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index, batch in enumerate(super().__iter__()):
            if index == self.at:
                batch[self.part][0] += 1
            yield batch


@pytest.mark.promise("Resume", "Data that differ in any batch drawn so far are refused")
@pytest.mark.parametrize(("at", "part"), [(5, 0), (5, 1), (17, 0)])
def test_any_batch_that_was_drawn_is_compared(at: int, part: int, half: Path) -> None:
    with pytest.raises(StateError, match=f"batch {at} of the calibration data differs from the one recorded"):
        run(half, Changed(at, part))
    run(half, Changed(99, part))


@pytest.mark.parametrize("more", [{}, {"num_recomputations": 2, "num_grads": 20}])
def test_data_replaced_after_the_calibration_are_found(more: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path / "state", **more)
    with pytest.raises(StateError, match="batch 5 of the calibration data differs from the one recorded"):
        run(tmp_path / "state", Changed(5, 0), **more)
    few = [batch for batch, _ in zip(Data(), range(7))]
    with pytest.raises(StateError, match="batch 7 of the calibration data differs"):  # started again
        capruner.prune(net(), few, Data().loss, 0.5, state_dir=tmp_path / "state", **ARGUMENTS | more)


def half_of(loss: Callable[[Any, Any], Tensor], folder: Path) -> None:
    """A state of a run with this loss, killed in the midst."""

    class Stops(Data):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(super().__iter__()):
                if index == 20:
                    raise Killed
                yield batch

    with pytest.raises(Killed):
        capruner.prune(net(), Stops(), loss, 0.5, state_dir=folder, **ARGUMENTS)


@pytest.mark.promise("Resume", "Another loss or another model code is refused")
def test_another_loss_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_run, "SAVE_EVERY", 0.0)
    half_of(lambda o, y: nn.functional.cross_entropy(o, y), tmp_path)
    with pytest.raises(StateError, match=r"was created with different arguments \(loss"):
        capruner.prune(
            net(), Data(), lambda o, y: 2 * nn.functional.cross_entropy(o, y), 0.5, state_dir=tmp_path, **ARGUMENTS
        )
    capruner.prune(net(), Data(), lambda o, y: nn.functional.cross_entropy(o, y), 0.5, state_dir=tmp_path, **ARGUMENTS)


def test_another_architecture_with_the_same_weights_is_another_run(half: Path) -> None:
    model, data = net(), Data()
    model[1] = nn.ReLU()
    with pytest.raises(StateError, match=r"was created with different arguments \(model"):
        capruner.prune(model, data, data.loss, 0.5, state_dir=half, **ARGUMENTS)


def test_data_that_have_become_fewer(half: Path) -> None:
    stream = iter(Data())
    few = [next(stream) for _ in range(9)]
    with pytest.raises(StateError, match="batch 9 of the calibration data differs"):
        capruner.prune(net(), few, Data().loss, 0.5, state_dir=half, **ARGUMENTS)


@pytest.mark.promise(
    "Resume",
    "Too little disk space for a state is reported before the work; space taken by an earlier state counts as free",
)
def test_too_little_room_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = store.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    data = Data()
    with pytest.raises(OSError, match="choose a folder on another disk, or a smaller fisher_block_size"):
        run(tmp_path / "state", data)
    assert data.seen == 0


@pytest.mark.promise(
    "Resume",
    "Too little disk space for a state is reported before the work; space taken by an earlier state counts as free",
)
def test_what_the_state_takes_already_is_no_reason_to_refuse_it(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage, there = store.shutil.disk_usage(half), sum(path.stat().st_size for path in rank(half).glob("progress-*"))
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=there))
    run(half)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=there // 2))
    with pytest.raises(OSError, match="are free or in use by this checkpoint already"):
        run(half.with_name("another"))


@pytest.mark.promise("Resume", "A state of another capruner version is refused; another version of torch is a warning")
def test_another_capruner_is_refused_and_another_torch_is_noted(half: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(half, lambda body: body["versions"].update(torch="1.0"))
    run(half)
    assert "torch was 1.0" in caplog.text
    assert "may differ in its last bits" in caplog.text
    rewrite(half, lambda body: body["versions"].update(capruner="0.0.1"))
    with pytest.raises(StateError, match=r"was saved by capruner 0.0.1, this is .* finish the run with that version"):
        run(half)


HOLDER = """
import sys
from pathlib import Path
from capruner.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.promise(
    "Resume", "A second process that uses the same state folder is refused, and told which process holds it"
)
def test_two_processes_do_not_write_one_state(half: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(rank(half))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    before = {path: path.read_bytes() for path in rank(half).iterdir() if path.name != "lock"}
    for call in (lambda: run(half), lambda: capruner.remove_state(half)):
        with pytest.raises(
            OSError, match=f"rank-0-of-1 is in use by process {other.pid} on .*; wait until that run has"
        ):
            call()
    assert {path: path.read_bytes() for path in rank(half).iterdir() if path.name != "lock"} == before
    other.kill()  # however it ends
    other.communicate()
    run(half)
    capruner.remove_state(half)
    assert not half.exists()


def test_of_two_runs_in_one_process_the_earlier_one_stops(half: Path) -> None:
    class Twice(Data):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(super().__iter__()):
                if index == 20:
                    run(half)
                yield batch

    with pytest.raises(OSError, match="was taken over by another run in this process"):
        run(half, Twice())


@pytest.mark.promise("Resume", "When the disk fills up while a state is saved, the previous state remains whole")
def test_a_disk_that_fills_up_leaves_the_state_before_whole(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"torn")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(OSError, match=r"cannot be saved to .*No space left .* the one before is complete"):
        run(half)
    monkeypatch.undo()
    assert not list(rank(half).glob(".*"))
    continued = Data()
    run(half, continued)
    assert continued.seen == ARGUMENTS["num_grads"] - 18


@pytest.mark.promise("Resume", "Files that a killed process left half-written are recognised and deleted")
def test_what_a_killed_writer_left_does_not_stop_a_run(half: Path) -> None:
    (rank(half) / ".tmpAbCdEf").write_text("safetensors writes here before it renames")
    private = rank(half) / ".capruner-abcd1234.partial"
    private.mkdir()
    (private / "progress-00000099-00000.safetensors").write_text("torn")
    continued = Data()
    run(half, continued)
    assert continued.seen == ARGUMENTS["num_grads"] - 18
    assert not list(rank(half).glob(".*"))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"state_dir=.*file/state cannot be created: Not a directory; choose another"):
        run(tmp_path / "file" / "state")


def test_removing_leaves_what_is_not_ours(half: Path) -> None:
    (half / "thesis.tex").write_text("x")
    capruner.remove_state(half)
    assert [path.name for path in half.iterdir()] == ["thesis.tex"]
    capruner.remove_state(half / "nowhere")
