"""The files of a checkpoint.

    STATE_DIR/rank-0-of-1/lock                        held by the process that works here
                          manifest-00000007.json     what is done, where the stream stands, the sha256 of each file
                          progress-00000007-00003.safetensors   the stage in progress, for example the Fisher blocks of one layer
                          step-00000002-00000.safetensors       the outcome of a finished stage

Files are written under a temporary name, flushed to disk and renamed. A manifest is written once all its files exist, and only then are the files of the one
before deleted. So there is always one complete checkpoint, and for a moment two: up to twice the bytes of the Fisher blocks.

Each process has its own folder. Processes save in lockstep and delete an older checkpoint only when all have the newer one, so there is one that all have.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from capruner.checkpoint.lock import LOCK, FolderLock
from capruner.distributed import processes
from capruner.files import digest, file_digest, is_leftover, remove, replacing

FORMAT, VERSION = "capruner-state", 3
_LOGGER = logging.getLogger(__name__)

_FOLDER = re.compile(r"rank-(\d{1,5})-of-(\d{1,5})")
_MANIFEST = re.compile(r"manifest-(\d{8})\.json")
_TENSORS = re.compile(r"(progress|step)-\d{8}-\d{5}\.safetensors")
_KINDS = {"rank": int, "world_size": int, "versions": dict, "configuration": dict, "notes": dict, "steps": list}


class StateError(ValueError):
    """A checkpoint that this run cannot resume from; the message names the file and the remedy."""


class Store:
    """The checkpoint folder of one process, locked.

    Args:
        folder: created if missing. The same on every process.
        configuration: JSON values by keyword; a checkpoint with others is refused.

    Attributes:
        generation: number of the newest manifest that all processes have; 0: none.
        content: what that manifest says of the run, see :meth:`commit`.

    Raises:
        StateError: a file that is foreign, damaged, from different arguments, or from a newer version.
        OSError: the folder cannot be written, or another process uses it.
    """

    def __init__(self, folder: str | Path, configuration: Mapping[str, Any]) -> None:
        self.root = Path(folder)
        self.processes = processes()
        self._identity = {"rank": self.processes.rank, "world_size": self.processes.world_size}
        self.folder = self.root / "rank-{rank}-of-{world_size}".format(**self._identity)
        self.remedy = f"delete the folder {self.root}, or choose another"
        self._configuration = json.loads(json.dumps(configuration))
        with self.processes.together("opening the checkpoint"):
            manifests = self._open()
        # The newest is the same on all processes, unless some were killed just before they could write it: then it is the one before.
        self.generation = self.processes.min(max(manifests, default=0), "opening the checkpoint")
        with self.processes.together("opening the checkpoint"):
            if self.generation and self.generation not in manifests:
                raise StateError(
                    f"{self.folder} has no manifest {self.generation}, which other processes have; {self.remedy}"
                )
            self.content = manifests.get(self.generation, {"steps": [], "progress": None, "notes": {}})
            self._sweep()

    def close(self) -> None:
        """Release the lock."""
        self._lock.release()

    def load(self, files: Mapping[str, str]) -> list[dict[str, Tensor]]:
        """The tensors of each file, on the CPU; raise ``StateError`` if one is missing or damaged."""
        loaded = []
        for name, checksum in files.items():
            path = self.folder / name
            try:
                if file_digest(path) != checksum:
                    raise StateError(f"{path} is damaged (its checksum is wrong); {self.remedy}")
                loaded.append(load_file(path))
            except (SafetensorError, OSError, KeyError, TypeError) as error:
                raise StateError(f"{path} cannot be read: {error}; {self.remedy}") from error
        return loaded

    def write(self, name: str, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
        """Write one file per part; returns their digests by file name, for :meth:`commit`."""
        files = {}
        for index, tensors in enumerate(parts):
            path = self.folder / f"{name}-{index:05d}.safetensors"
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            with _saving(path) as partial:
                save_file(on_cpu, partial)
            files[path.name] = file_digest(path)
        return files

    def commit(self, content: dict[str, Any]) -> None:
        """Write the next manifest and delete the files that it does not name.

        Args:
            content: ``steps`` and ``progress`` (a dict or None), whose ``files`` :meth:`write` returned; ``notes``.
        """
        self._lock.check()
        self.generation += 1
        self.content = content
        header = {"format": FORMAT, "version": VERSION, "versions": versions(), "configuration": self._configuration}
        body = header | self._identity | content
        with _saving(self.folder / f"manifest-{self.generation:08d}.json") as partial:
            partial.write_text(json.dumps({"sha256": digest([body]), "state": body}, indent=1) + "\n")
        self.processes.any(False)  # all have it: the one before can be deleted
        self._sweep()

    def check_space(self, size: int) -> None:
        """Raise ``OSError`` unless ``size`` bytes fit on the disk twice: the old checkpoint and the new one."""
        free = shutil.disk_usage(self.folder).free
        names = (self.content["progress"] or {"files": {}})["files"]
        used = sum((self.folder / name).stat().st_size for name in names if (self.folder / name).is_file())
        if free + used < 2 * size:
            raise OSError(
                f"state_dir={self.root}: saving takes up to {2 * size / 2**30:.2f} GiB, and {(free + used) / 2**30:.2f} GiB are free or in use by "
                "this checkpoint already; choose a folder on another disk, or a smaller fisher_block_size"
            )

    def _open(self) -> dict[int, dict[str, Any]]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"state_dir={self.root} cannot be created: {error.strerror}; choose another") from error
        size = self.processes.world_size
        for entry in self.root.iterdir():
            match = _FOLDER.fullmatch(entry.name)
            if match is None:
                raise StateError(f"{entry} is not part of a capruner checkpoint; choose an empty or a new folder")
            if int(match[2]) != size:
                raise StateError(f"{entry} was saved by {match[2]} processes, this run has {size}; {self.remedy}")
        for entry in self.folder.iterdir():
            if not _is_ours(entry):
                raise StateError(f"{entry} is not part of a capruner checkpoint; choose an empty or a new folder")
        self._lock = FolderLock(self.folder)
        manifests = {int(m[1]): path for path in self.folder.iterdir() if (m := _MANIFEST.fullmatch(path.name))}
        return {number: self._manifest(path) for number, path in manifests.items()}

    def _manifest(self, path: Path) -> dict[str, Any]:
        body = read_manifest(path, self.remedy)
        if any(body[key] != value for key, value in self._identity.items()):
            raise StateError(
                f"{path} was saved by rank {body['rank']} of {body['world_size']}, this is rank {self.processes.rank} of {self.processes.world_size}; "
                f"{self.remedy}"
            )
        self._compare_versions(path, body["versions"])
        then, now = body["configuration"], self._configuration
        changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if changed:
            shown = (_changed(key, then.get(key), now.get(key)) for key in changed)
            raise StateError(
                f"{path} was created with different arguments ({', '.join(shown)}); pass the same arguments, or {self.remedy}"
            )
        return {key: body[key] for key in ("steps", "progress", "notes")}

    def _compare_versions(self, path: Path, then: Mapping[str, Any]) -> None:
        now = versions()
        if then.get("capruner") != now["capruner"]:
            raise StateError(
                f"{path} was saved by capruner {then.get('capruner')}, this is {now['capruner']}, which may compute something else; "
                f"finish the run with that version, or {self.remedy}"
            )
        if changed := [f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name]]:
            _LOGGER.warning("%s: %s; the result may differ in its last bits", self.folder, ", ".join(changed))

    def _sweep(self) -> None:
        """Delete what the manifest does not name: older checkpoints, and incomplete files of a killed process."""
        named = {
            file
            for part in (*self.content["steps"], self.content["progress"] or {"files": {}})
            for file in part["files"]
        }
        named.add(f"manifest-{self.generation:08d}.json")
        # Manifests first: one without its files would be damaged.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix != ".json"):
            if path.name not in named and path.name != LOCK:
                remove(path)


@contextmanager
def _saving(path: Path) -> Iterator[Path]:
    """Write a file of the checkpoint in one step, see :func:`capruner.files.replacing`."""
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise OSError(
            f"the checkpoint cannot be saved to {path.parent}: {error}; the one before is complete: free some space and start again"
        ) from error


def read_manifest(path: Path, remedy: str = "choose another folder") -> dict[str, Any]:
    """The content of a manifest; raise ``StateError`` if it is damaged, foreign, or from another version."""
    try:
        whole = json.loads(path.read_bytes())
        body = whole["state"]
        if body["format"] != FORMAT:
            raise StateError(f"{path} is not a capruner checkpoint; {remedy}")
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
        for key, kind in _KINDS.items():
            if not isinstance(body[key], kind):
                raise StateError(f"{path} is damaged ({key} is not of type {kind.__name__}); {remedy}")
        for part in (*body["steps"], *([] if body["progress"] is None else [body["progress"]])):
            for key in ("files", "state"):
                if not isinstance(part[key], dict):
                    raise StateError(f"{path} is damaged ({key} is not of type dict); {remedy}")
            if bad := [name for name in part["files"] if not _TENSORS.fullmatch(name)]:
                raise StateError(f"{path} names {bad[0]!r}, which is not a file of a checkpoint; {remedy}")
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} cannot be read ({type(error).__name__}: {error}); {remedy}") from error
    return body


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    from capruner import __version__

    return {"capruner": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def remove_state(folder: str | Path) -> None:
    """Delete the checkpoint of this process in a ``state_dir``, and the folder if it is then empty.

    Raises:
        OSError: another process uses it.
    """
    everybody = processes()
    own = Path(folder) / f"rank-{everybody.rank}-of-{everybody.world_size}"
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
