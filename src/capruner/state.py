"""A folder from which a killed calibration goes on, to the same bits.

    STATE_DIR/rank-0-of-1/lock                        held by the process that works here
                          manifest-00000007.json     what is done, where the drawing of gradients stands, the sha256 of each file
                          feed-00000007-00003.safetensors   what the gradients so far have left of one layer
                          step-00000002-00000.safetensors   the outcome of a calibration that is finished

Files come into being beside their place, are flushed to disk, and are renamed; a manifest is written when all its files are there, and only then the files
of the one before it go. So there is a whole state at any moment, and for a while two: on disk that takes up to twice the bytes of the Fisher blocks.

Every process has a folder of its own. They write in lockstep, and delete an older state only when all have the newer one; so there is one that all have.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from capruner.distributed import Shards, world
from capruner.files import digest, file_digest, is_leftover, remove, replacing
from capruner.lock import LOCK, FolderLock

FORMAT, VERSION = "capruner-state", 2
_LOGGER = logging.getLogger(__name__)
SAVE_EVERY = 120.0
"""Seconds between two saves, at least. Where saving takes long, ten times what the last one took, but at most five times this."""

_FOLDER = re.compile(r"rank-(\d{1,5})-of-(\d{1,5})")
_MANIFEST = re.compile(r"manifest-(\d{8})\.json")
_KINDS = (("versions", dict), ("configuration", dict), ("notes", dict), ("steps", list))
_TENSORS = re.compile(r"(feed|step)-\d{8}-\d{5}\.safetensors")


class StateError(ValueError):
    """A state folder that this run cannot go on from; the message names the file and the remedy."""


class State:
    """What one process has saved of a run, and will save.

    Args:
        folder: made where it is missing. The same on every process.
        configuration: JSON values by keyword; a state with others is refused.

    Attributes:
        notes: JSON values that go into each manifest and come back: seconds by stage, counts for the report.

    Raises:
        StateError: a file that is foreign, torn, stale, or from a newer version.
        OSError: the folder cannot be written, or another process works with it.
    """

    def __init__(self, folder: str | Path, configuration: Mapping[str, Any]) -> None:
        self.root = Path(folder)
        self._lock: FolderLock | None = None
        self.rank, self.ranks = world()
        self.folder = self.root / f"rank-{self.rank}-of-{self.ranks}"
        self._configuration = json.loads(json.dumps(configuration))
        self._shards = Shards({})
        with self._shards.together("opening the state folder"):
            found = self._open()
        # All processes have their newest in common, or some were killed just before they could write it: then it is the one before.
        self.generation = self._shards.least(max(found, default=0))
        with self._shards.together("opening the state folder"):
            if self.generation and self.generation not in found:
                raise StateError(
                    f"{self.folder} has no state {self.generation}, which other processes have; {self.remedy}"
                )
            body = found.get(self.generation, {})
            self.steps: list[dict[str, Any]] = body.get("steps", [])
            self.feed: dict[str, Any] | None = body.get("feed")
            self.notes: dict[str, Any] = body.get("notes", {})
            self._done = 0
            self._sweep()
        self._saved, self._took = time.monotonic(), 0.0

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock is not None:
            self._lock.release()

    @property
    def remedy(self) -> str:
        return f"delete the folder {self.root}, or choose another"

    def next_step(self) -> tuple[dict[str, Tensor], list[str]] | None:
        """The outcome of the next calibration if an earlier run has finished it, on the CPU, and the digests of its batches; None: it has to be done."""
        if self._done == len(self.steps):
            return None
        step = self.steps[self._done]
        self._done += 1
        return {key: t for tensors in self._load(step["files"]) for key, t in tensors.items()}, step["batches"]

    def finish_step(self, outcome: Mapping[str, Tensor], batches: Sequence[str]) -> None:
        """Save the outcome of a calibration, and the digests of the batches that it drew."""
        name = f"step-{self._done:08d}"
        self.steps.append({"files": self._write(name, [outcome]), "batches": list(batches)})
        self._done += 1
        self.feed = None
        self._commit()

    def due(self) -> bool:
        """Whether it is time to save; the same answer on every process."""
        elapsed = time.monotonic() - self._saved
        return self._shards.any(elapsed >= max(SAVE_EVERY, min(10 * self._took, 5 * SAVE_EVERY)))

    def save_feed(self, layers: Sequence[Mapping[str, Tensor]], position: Mapping[str, Any]) -> None:
        """Save what the gradients so far have left of each layer, and where their drawing stands."""
        began = time.monotonic()
        files = self._write(f"feed-{self.generation + 1:08d}", layers)
        self.feed = {"files": files, "position": dict(position)}
        self._commit()
        self._saved = time.monotonic()
        self._took = self._saved - began

    def load_feed(self) -> tuple[list[dict[str, Tensor]], dict[str, Any]] | None:
        """What :meth:`save_feed` saved, if the present calibration was stopped in the midst of its gradients."""
        if self.feed is None or self._done < len(self.steps):
            return None
        return self._load(self.feed["files"]), self.feed["position"]

    def check_space(self, size: int) -> None:
        """Refuse to start if this process's Fisher blocks, ``size`` bytes, do not fit on the disk twice: the old state and the new one.

        Raises:
            OSError: not enough free disk space.
        """
        free = shutil.disk_usage(self.folder).free
        names = (self.feed or {"files": {}})["files"]
        there = sum((self.folder / name).stat().st_size for name in names if (self.folder / name).is_file())
        if free + there < 2 * size:
            raise OSError(
                f"state_dir={self.root}: saving takes up to {2 * size / 2**30:.2f} GiB and {(free + there) / 2**30:.2f} GiB are free or in use by "
                "this state already; choose a folder on another disk, or a smaller fisher_block_size"
            )

    # Files

    def _open(self) -> dict[int, dict[str, Any]]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"state_dir={self.root} cannot be made: {error.strerror}; choose another") from error
        for entry in self.root.iterdir():
            match = _FOLDER.fullmatch(entry.name)
            if match is None:
                raise StateError(f"{entry} is no part of a state of capruner; choose an empty or a new folder")
            if int(match[2]) != self.ranks:
                raise StateError(
                    f"{entry} is of a run with {match[2]} processes, this one has {self.ranks}; {self.remedy}"
                )
        for entry in self.folder.iterdir():
            if not _is_ours(entry):
                raise StateError(f"{entry} is no part of a state of capruner; choose an empty or a new folder")
        self._lock = FolderLock(self.folder)
        manifests = {int(m[1]): path for path in self.folder.iterdir() if (m := _MANIFEST.fullmatch(path.name))}
        return {number: self._manifest(path) for number, path in manifests.items()}

    def _manifest(self, path: Path) -> dict[str, Any]:
        body = read_manifest(path, self.remedy)
        if (body["rank"], body["ranks"]) != (self.rank, self.ranks):
            raise StateError(
                f"{path} is of process {body['rank']} of {body['ranks']}, this one is {self.rank} of {self.ranks}; {self.remedy}"
            )
        self._compare_versions(path, body["versions"])
        then, now = body["configuration"], self._configuration
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if changed:
            shown = (_changed(key, then.get(key), now.get(key)) for key in changed)
            raise StateError(
                f"{path} is of another run ({', '.join(shown)}); start again with the same arguments, or {self.remedy}"
            )
        return body

    def _compare_versions(self, path: Path, then: Mapping[str, Any]) -> None:
        now = versions()
        if then.get("capruner") != now["capruner"]:
            raise StateError(
                f"{path} was saved by capruner {then.get('capruner')}, this is {now['capruner']}, which may compute something else; "
                f"finish the run with that version, or {self.remedy}"
            )
        if changed := [f"{name} {then.get(name)} then, {now[name]} now" for name in now if then.get(name) != now[name]]:
            _LOGGER.warning("%s: %s; the result may differ in its last bits", self.folder, ", ".join(changed))

    def _load(self, files: Mapping[str, str]) -> list[dict[str, Tensor]]:
        found = []
        for name, checksum in files.items():
            path = self.folder / name
            try:
                if file_digest(path) != checksum:
                    raise StateError(f"{path} is damaged (its checksum is wrong); {self.remedy}")
                found.append(load_file(path))
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise StateError(f"{path} cannot be read: {error}; {self.remedy}") from error
        return found

    def _write(self, name: str, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
        files = {}
        for index, tensors in enumerate(parts):
            path = self.folder / f"{name}-{index:05d}.safetensors"
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            with _saving(path) as partial:
                save_file(on_cpu, partial)
            files[path.name] = file_digest(path)
        return files

    def _commit(self) -> None:
        assert self._lock is not None
        self._lock.check()
        self.generation += 1
        body = {
            "format": FORMAT,
            "version": VERSION,
            "rank": self.rank,
            "ranks": self.ranks,
            "versions": versions(),
            "configuration": self._configuration,
            "steps": self.steps,
            "feed": self.feed,
            "notes": self.notes,
        }
        with _saving(self.folder / f"manifest-{self.generation:08d}.json") as partial:
            partial.write_text(json.dumps({"sha256": digest([body]), "state": body}, indent=1) + "\n")
        self._shards.any(False)  # all have it: the one before can go
        self._sweep()

    def _sweep(self) -> None:
        """Delete what the present state does not name: older states, and what a kill has left half done."""
        named = {file for part in (*self.steps, self.feed or {"files": {}}) for file in part["files"]}
        named.add(f"manifest-{self.generation:08d}.json")
        # Manifests first: one without its files would be a torn state.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix != ".json"):
            if path.name not in named and path.name != LOCK:
                remove(path)


@contextmanager
def _saving(path: Path) -> Iterator[Path]:
    """Write a file of the state in one step, see :func:`capruner.files.replacing`."""
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise OSError(
            f"the state cannot be saved to {path.parent}: {error}; what was saved before is whole: make room there and start again"
        ) from error


def read_manifest(path: Path, remedy: str = "choose another folder") -> dict[str, Any]:
    """The content of a manifest, checked against its checksum and in its form.

    Raises:
        StateError: torn, foreign, or from a newer version.
    """
    try:
        whole = json.loads(path.read_bytes())
        body = whole["state"]
        if body["format"] != FORMAT:
            raise StateError(f"{path} is no state of capruner; {remedy}")
        if type(body["version"]) is not int or body["version"] > VERSION:
            raise StateError(
                f"{path} is from a newer capruner (format {body['version']}, this one reads {VERSION}); update capruner, or {remedy}"
            )
        if body["version"] < VERSION:
            raise StateError(
                f"{path} is from an older capruner (format {body['version']}, this one reads {VERSION}); finish the run with that version, or {remedy}"
            )
        if whole["sha256"] != digest([body]):
            raise StateError(f"{path} is damaged (its checksum is wrong); {remedy}")
        if body["feed"] is not None and not isinstance(body["feed"]["position"], dict):
            raise StateError(f"{path} is damaged (position is no dict); {remedy}")
        for part in (*body["steps"], *([] if body["feed"] is None else [body["feed"]])):
            if not isinstance(part["files"], dict):
                raise StateError(f"{path} is damaged (files is no dict); {remedy}")
            bad = [name for name in part["files"] if not _TENSORS.fullmatch(name)]
            if bad:
                raise StateError(f"{path} names {bad[0]!r}, which is no file of a state; {remedy}")
        if not all(
            isinstance(step["batches"], list) and all(type(d) is str for d in step["batches"]) for step in body["steps"]
        ):
            raise StateError(f"{path} is damaged; {remedy}")
        for key, kind in (("rank", int), ("ranks", int), *_KINDS):
            if not isinstance(body[key], kind):
                raise StateError(f"{path} is damaged ({key} is no {kind.__name__}); {remedy}")
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}") from error
    return body


def versions() -> dict[str, str]:
    """Of what computes the result."""
    from capruner import __version__

    return {"capruner": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def remove_state(folder: str | Path) -> None:
    """Delete a state folder's files, this process's alone; and the folder, when it is empty then.

    Raises:
        OSError: another process works with it.
    """
    rank, size = world()
    own = Path(folder) / f"rank-{rank}-of-{size}"
    if own.is_dir():
        lock = FolderLock(own)
        for path in sorted(own.iterdir(), key=lambda path: path.suffix != ".json"):
            if _is_ours(path):
                remove(path)
        lock.release()
    for empty in (own, Path(folder)):
        with suppress(OSError):  # not empty, or another process was first
            empty.rmdir()


def _is_ours(path: Path) -> bool:
    ours = _MANIFEST.fullmatch(path.name) or _TENSORS.fullmatch(path.name) or path.name == LOCK
    return bool(ours) or is_leftover(path)


def _changed(key: str, then: Any, now: Any) -> str:
    values = f" was {then}, is {now}"
    return key + (values if len(values) < 80 else " differs")
