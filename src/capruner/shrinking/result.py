"""A shrunk model, its report, and its file: the small weights with what was removed in the metadata."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from capruner.files import digest, read_header, reading, save_tensors
from capruner.models.wrappers import unwrap
from capruner.shrinking.surgery import Removal
from capruner.shrinking.units import LeftAlone
from capruner.text import text_table

FORMAT = "capruner-shrunk"
VERSION = 1


@dataclass(repr=False)
class Shrunk:
    """The outcome of :func:`capruner.shrink`.

    Attributes:
        model: the smaller model; the layers are those of the dense one with fewer rows and columns. Train it, export it, save it.
        removal: what was removed.
        rows: one per group of units: ``name, kind, units, left``.
        left_alone: modules whose units could not be removed, and why.
        costs: dense and now: ``macs`` (of the example inputs), ``parameters``, and ``seconds`` where the latency was the target.
    """

    model: nn.Module
    removal: Removal
    rows: list[dict[str, Any]]
    left_alone: list[LeftAlone]
    costs: dict[str, tuple[float, float]]

    def __repr__(self) -> str:
        return f"Shrunk({', '.join(f'{what}={now / dense:.1%} of dense' for what, (dense, now) in self.costs.items())})"

    def report(self) -> str:
        """What was removed and what that saves, as text."""
        rows = [
            [row["name"], row["kind"], str(row["units"]), str(row["left"]), f"{row['left'] / row['units']:.0%}"]
            for row in self.rows
        ]
        lines = [text_table(["units of", "kind", "dense", "now", "left"], rows), ""]
        lines += [_cost(what, *values) for what, values in self.costs.items()]
        if self.left_alone:
            lines += ["", "left alone:", *(f"  {item.name}: {item.reason}" for item in self.left_alone)]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the model as it is now (trained on, for example) as safetensors; :func:`load_shrunk` reads it.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.model.state_dict().items()}
        header: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self.removal)}
        header = json.loads(json.dumps(header))
        header["sha256"] = _checksum(header, tensors)
        save_tensors(path, tensors, header)


def _cost(what: str, dense: float, now: float) -> str:
    values = [f"{1000 * value:.2f} ms" if what == "seconds" else f"{value:,.0f}" for value in (dense, now)]
    return f"{what:<10}  {values[0]} -> {values[1]}, {now / dense:.1%}"


def load_shrunk(path: str | Path, model: nn.Module) -> nn.Module:
    """Read what :meth:`Shrunk.save` wrote.

    >>> model = capruner.load_shrunk("small.safetensors", timm.create_model("deit_small_patch16_224"))

    Args:
        path: the file.
        model: the dense architecture, with any weights; not changed.

    Returns:
        A smaller copy of ``model`` with the weights of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a shrunk model, is damaged, or belongs to another architecture.
    """
    path = Path(path)
    with reading(path, FORMAT, VERSION, "model shrunk by capruner") as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if header["sha256"] != _checksum(header, tensors):
            raise ValueError(f"{path} is damaged: its checksum is wrong")
    removal = Removal(header["layers"], header["heads"], header["sizes"])
    small = copy.deepcopy(unwrap(model))
    removal.check(small)
    removal.apply(small)
    try:
        small.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another architecture than {type(small).__name__}: {error}") from error
    return small


def is_shrunk(path: str | Path) -> bool:
    """Whether a file was written by :meth:`Shrunk.save`; False if it is damaged or missing."""
    return read_header(path).get("format") == FORMAT


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return digest(
        [rest, *(part for name in sorted(tensors) for part in (name, str(tensors[name].dtype), tensors[name]))]
    )
