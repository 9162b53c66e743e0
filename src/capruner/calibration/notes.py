"""What a run reports about its calibrations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Notes:
    """Report of all calibrations of a run; part of ``result.settings``.

    Attributes:
        num_grads: gradients of each calibration, once that is decided; 0 before.
        skipped_batches: batches left out, in whole or in part, for NaN or Inf.
        layers_without_gradient: layers all of whose gradients were zero in a calibration.
        damped_blocks: by layer, the most Fisher blocks of one calibration that needed more damping.
        shrinkage_by_layer: of the last calibration.
        distill: by level, its sparsity and what :class:`capruner.Distillation` reports.
    """

    num_grads: int = 0
    skipped_batches: int = 0
    layers_without_gradient: list[str] = field(default_factory=list)
    damped_blocks: dict[str, int] = field(default_factory=dict)
    shrinkage_by_layer: dict[str, float] = field(default_factory=dict)
    distill: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore notes; raise ``KeyError`` or ``TypeError`` for anything else."""
        saved = copy.deepcopy(dict(state))
        for note in fields(self):
            if type(saved[note.name]) is not type(getattr(self, note.name)):
                raise TypeError(f"{note.name} is {saved[note.name]!r}")
        counts = [saved["num_grads"], saved["skipped_batches"], *saved["damped_blocks"].values()]
        if not all(map(is_count, counts)) or not all(isinstance(level, dict) for level in saved["distill"]):
            raise TypeError(f"{saved} has values of other types")
        if not all(isinstance(name, str) for name in saved["layers_without_gradient"]):
            raise TypeError(f"layers_without_gradient is {saved['layers_without_gradient']!r}")
        vars(self).update({note.name: saved[note.name] for note in fields(self)})


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number, at least 0."""
    return type(value) is int and value >= 0
