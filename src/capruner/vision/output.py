"""Experiment folders: checked to be writable before the work, filled atomically after each step."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from capruner.cli.arguments import UserError
from capruner.files import remove_leftovers, replacing
from capruner.text import text_table


def make_folder(output: str, experiment: str) -> Path:
    """Create ``output/experiment``, check that it is writable, and delete incomplete files of killed runs: no process writes there yet.

    Raises:
        UserError: the name leads out of ``output``, or the folder is not writable.
    """
    folder = Path(output) / experiment
    if not experiment or Path(experiment).is_absolute() or ".." in Path(experiment).parts:
        raise UserError(f"--experiment {experiment!r} must be a name inside --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        remove_leftovers(folder)
        remove_leftovers(folder / "checkpoints")
    except OSError as error:
        raise UserError(f"nothing can be written to {folder}: {error.strerror}; choose another --output") from error
    return folder


ONE_SHOT = (
    "summary.json",
    "summary.csv",
    "report.html",
    "accuracy_vs_sparsity.png",
    "layer_sparsity.png",
    "result.safetensors",
    "checkpoints/sparsity_*.safetensors",
)
"""Files of one-shot pruning in the folder of an experiment, except the recipe."""


def check_unused(folder: Path, overwrite: bool, checkpoint: str) -> None:
    """Raise ``UserError`` for a folder with a finished run (unless ``overwrite``), a training, or the weights to start from."""
    if (folder / "last.pt").exists() or (folder / "arguments.yaml").exists():
        raise UserError(f"{folder} holds a run of sparse_training.py; choose another --experiment")
    if checkpoint and folder.resolve() in Path(checkpoint).resolve().parents:
        raise UserError(
            f"--checkpoint {checkpoint} lies in {folder}, which this run will fill; choose another --experiment"
        )
    if (folder / "summary.json").exists() and not overwrite and _is_finished(folder / "summary.json"):
        raise UserError(f"{folder} holds a finished run; choose another --experiment, or replace it with --overwrite")


def _is_finished(summary: Path) -> bool:
    try:
        return bool(json.loads(summary.read_text(encoding="utf-8")).get("finished", True))
    except (OSError, ValueError, AttributeError):  # not ours, or edited: never deleted unless asked for
        return True


def remove_earlier(folder: Path) -> None:
    """Delete the files of an earlier run of one-shot pruning."""
    for pattern in ONE_SHOT:
        for path in folder.glob(pattern):
            path.unlink()


def model_label(name: str) -> str:
    """A model name as part of a folder name: ``hf-hub:OWNER/NAME`` and ``local-dir:FOLDER`` lose their source and separators."""
    return re.sub(r"[^\w.-]+", "_", name.partition(":")[2] or name).strip("_.")


@contextmanager
def new_folder(output: str, experiment: str) -> Iterator[Path]:
    """:func:`make_folder`; if the block raises, new folders that are still empty are removed."""
    folder = Path(output) / experiment
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield make_folder(output, experiment)
    except BaseException:
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()
        raise


def folder_inside(folder: Path, named: str) -> Path:
    """A recipe's ``traces_backup_dir`` inside ``folder``; raise ``UserError`` if it leads out of it: a recipe must not write elsewhere."""
    place = (folder / named).resolve()
    if Path(named).is_absolute() or folder.resolve() not in place.parents:
        raise UserError(
            f"traces_backup_dir: {named} leads out of the experiment's folder; a recipe names a folder inside it (for example state); the one-shot script's "
            "--state-dir may lie anywhere"
        )
    return place


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` create a file and move it into place in one step; raise ``UserError`` if the disk is full or the folder is gone."""
    try:
        with replacing(path) as partial:
            write(partial)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error}; what was written before is whole: make room there and start again"
        ) from error


def save_weights(path: Path, model: nn.Module, header: dict[str, str] | None = None) -> None:
    """Write a safetensors file that ``timm.create_model(..., checkpoint_path=path)`` loads."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lambda partial: save_file(state, partial, header))


def write_json(path: Path, content: Any) -> None:
    """Indented JSON."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line per row; columns in order of appearance, absent values empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)

    write_atomically(path, write)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A text table: ``columns`` maps keys to headings; absent values are a dash."""
    return text_table(list(columns.values()), [[_cell(row.get(key)) for key in columns] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
