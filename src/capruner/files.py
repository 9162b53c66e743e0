"""Files: written in one step, recognised by a digest, and cleaned up after writers that were killed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_LEFTOVER = re.compile(r"\..*\.partial|\.tmp[A-Za-z0-9]{6}")
"""Temporary names of this module, and those that safetensors writes beside its target."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file in one step: whatever happens, ``path`` holds its old content or all of the new one.

    Yields the path at which to write. It has the file's own name and lies in a new private folder beside the target, so that no foreign
    link is followed and nothing that the writer creates beside it is left over. On success the file is flushed to disk and renamed.

    Raises:
        OSError: ``path`` cannot be written, or is something other than a file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it exists and is not a file")
    try:
        private = Path(tempfile.mkdtemp(prefix=".capruner-", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise OSError(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        partial = private / path.name
        try:
            yield partial
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        os.chmod(partial, _permissions(private))
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file with a header of JSON values in one step; raise ``FileNotFoundError`` if there is no such folder."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"capruner": json.dumps(header)})


def is_leftover(path: Path) -> bool:
    """Whether ``path`` is what a killed writer left: it is incomplete, and nothing refers to it."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in ``folder``. Call it only when nobody else writes there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link (not its target), or a leftover folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(parts: Iterable[Any]) -> str:
    """Sha256 of texts, values of tensors, and anything else as JSON, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            values: Any = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            sha.update(values)  # no second copy of weights on a CPU
        else:
            sha.update((part if isinstance(part, str) else json.dumps(part, sort_keys=True)).encode())
    return sha.hexdigest()


def _header(file: Any) -> Any:
    return json.loads((file.metadata() or {}).get("capruner", "{}"))


def read_header(path: str | Path) -> dict[str, Any]:
    """What capruner wrote into the header of a safetensors file; empty for other files."""
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file)
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


@contextmanager
def reading(path: Path, written_as: str, version: int, what: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open a safetensors file of capruner's; yields its header, with format and version checked, and the open file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, a newer version, or damaged: an error while it is open says so too.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _header(file)
            if header.get("format") != written_as:
                raise ValueError(f"{path} is a safetensors file, but not a {what}")
            if header["version"] > version:
                raise ValueError(
                    f"{path} was written by a newer capruner (format {header['version']}, this one reads {version})"
                )
            yield header, file
    except (SafetensorError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or not a {what}: {error}") from error


@contextmanager
def reading_state(state: Any, written_as: str, version: int, what: str) -> Iterator[None]:
    """Check format and version of a ``state_dict``; raise ``ValueError`` for others, or if it turns out damaged inside the block."""
    if not isinstance(state, Mapping) or state.get("format") != written_as:
        raise ValueError(f"this is not a state of a {what}; pass what its state_dict() returned")
    try:
        if state["version"] > version:
            raise ValueError(
                f"the state of the {what} is from a newer capruner (format {state['version']}, this one reads {version})"
            )
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of the {what} is damaged: {error!r}") from error


def file_digest(path: Path) -> str:
    """Sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _permissions(folder: Path) -> int:
    """Permissions of a new file, from the umask: writers such as safetensors create files that only their owner can read."""
    probe = os.open(folder / ".probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return os.fstat(probe).st_mode & 0o777
    finally:
        os.close(probe)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
