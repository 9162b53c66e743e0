"""Engines for one-shot recipes, capruner itself (:class:`Native`) and SparseML, behind one interface.

``modifier``, ``method`` (None for SparseML's own modifiers), ``final_sparsity``, ``names(model)``, ``override(values)``, ``prune`` if ``once`` (one
calibration serves the whole list of sparsities) and ``apply_at`` otherwise, ``remove_state()``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from capruner import recipes
from capruner.calibrated import CalibratedModel
from capruner.checkpoint import remove_state
from capruner.cli.arguments import UserError, flag
from capruner.config import SECOND_ORDER, knobs
from capruner.distributed import processes
from capruner.planning import Plan, plan
from capruner.pruning import calibrate
from capruner.recipes.one_shot import OURS, OneShot
from capruner.recipes.text import modifier_names
from capruner.result import PruningResult
from capruner.vision.data import CalibrationBatches, PlainBatches
from capruner.vision.output import folder_inside


class Native:
    """A recipe, or the flags that replace one, as a call of :func:`capruner.prune`."""

    name = "native"
    once = True

    def __init__(self, one_shot: OneShot, folder: Path, path: str) -> None:
        self._recipe = one_shot
        self._path = path
        self._state_dir: str | Path | None = None
        if one_shot.traces_backup_dir:
            self._state_dir = folder_inside(folder, one_shot.traces_backup_dir)
        self.modifier, self.method = one_shot.modifier, one_shot.method
        self.final_sparsity = one_shot.final_sparsity

    @property
    def distill_passes(self) -> float:
        """Passes of distillation, from the recipe or ``--distill-passes``."""
        return float(self._recipe.knobs.get("distill_passes", 0.0))

    def override(self, values: Mapping[str, Any]) -> None:
        """Override the recipe's knobs and ``state_dir``; ``costs`` are only checked. Raise ``UserError`` for a knob that the method lacks."""
        for name, value in values.items():
            methods = SECOND_ORDER if name == "state_dir" else knobs()[name].methods
            if self.method not in methods:
                raise unsupported(name, self.modifier)
            if name == "state_dir":
                self._state_dir = value
            elif name == "global_sparsity":
                self._recipe.global_sparsity = value
            elif name != "costs":
                self._recipe.knobs[name] = value

    def names(self, model: nn.Module) -> list[str]:
        """Names of the parameters to prune."""
        return list(self._recipe.selected(model))

    def check_sparsities(self, model: nn.Module, sparsities: Sequence[float]) -> None:
        """See :func:`check_sparsities`."""
        check_sparsities(self.final_sparsity, self.names(model), model, sparsities, self._path, dict_is_fine=True)

    def prune(
        self, model: nn.Module, sparsities: Sequence[float], batches: CalibrationBatches, costs: Any = None
    ) -> PruningResult:
        """One calibration for the whole list; ``model`` is not changed."""
        data = PlainBatches(batches, self._recipe.grad_sampler_kwargs)
        return self._recipe.prune(model, data, cross_entropy, sparsities, state_dir=self._state_dir, costs=costs)

    def plan(self, model: nn.Module, batches: CalibrationBatches) -> Plan:
        """What :meth:`prune` would do. Draws two of ``batches``."""
        data = PlainBatches(batches, self._recipe.grad_sampler_kwargs)
        return plan(model, data, cross_entropy, **self._recipe.keywords)

    def calibrate(self, model: nn.Module, batches: CalibrationBatches, costs: Any = None) -> CalibratedModel:
        """Calibrate once for any sparsity; raise ``UserError`` with a state folder or with per-layer sparsities."""
        if self._state_dir is not None:
            raise UserError(
                "--max-drop searches within one calibration, which is not saved; leave --state-dir (traces_backup_dir) out"
            )
        if isinstance(self.final_sparsity, dict):
            raise UserError(
                f"{self._path}: final_sparsity is a dict, one sparsity per layer, so there is nothing for --max-drop to choose"
            )
        data = PlainBatches(batches, self._recipe.grad_sampler_kwargs)
        return calibrate(model, data, cross_entropy, **self._recipe.keywords, costs=costs)

    def remove_state(self) -> None:
        """Delete the state of an interrupted calibration, once its result is safe."""
        if self._state_dir is not None:
            remove_state(self._state_dir)


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of the logits, or of the first of a tuple of outputs."""
    return nn.functional.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs, labels)


def unsupported(name: str, modifier: str) -> UserError:
    """The error for a value of the command line that a modifier does not support."""
    shown = "--allocate-by macs" if name == "costs" else flag(name)
    return UserError(f"{shown} is not supported by {modifier}; leave it out")


def open_recipe(path: str, engine: str | None, folder: Path) -> Any:
    """A one-shot recipe, carried out by :class:`Native` or :class:`capruner.sparseml.recipe.BySparseML`; see :func:`by_engine`."""
    return by_engine(
        path, engine, OURS, lambda: Native(recipes.load(path), folder, path), "capruner.sparseml.recipe", folder
    )


def by_engine(
    path: str, engine: str | None, ours: Container[str], native: Callable[[], Any], sparseml: str, *arguments: Any
) -> Any:
    """A recipe with the engine that was asked for. None: SparseML for recipes with modifiers that are not ``ours``, if it can be imported.

    Args:
        native: opens the recipe for capruner itself.
        sparseml: the module whose ``BySparseML(path, *arguments)`` opens it for SparseML.

    Raises:
        UserError: the recipe is invalid, or the engine cannot carry it out.
    """
    foreign = [name for name in modifier_names(recipes.checked_text(path)) if name not in ours]
    if engine == "native" or (engine is None and not foreign):
        return native()
    try:
        module = importlib.import_module(sparseml)
    except ImportError as error:
        if engine == "sparseml":
            raise UserError(f"--engine sparseml: SparseML cannot be imported here ({error})") from error
        opened = native()
        if processes().rank == 0:
            names = ", ".join(sorted(set(foreign)))
            print(
                f"note: SparseML cannot be imported here, so {names} is carried out by capruner's own methods",
                file=sys.stderr,
            )
        return opened
    return module.BySparseML(path, *arguments)


def check_sparsities(
    final: Any, names: Sequence[str], model: nn.Module, sparsities: Sequence[float], path: str, dict_is_fine: bool
) -> None:
    """Raise ``UserError`` if the recipe has per-layer sparsities, or the model is already sparser than one of ``sparsities``."""
    if isinstance(final, dict) and (sparsities or not dict_is_fine):
        raise UserError(
            f"{path}: final_sparsity is a dict, one sparsity per layer, so --sparsities cannot replace it; "
            "leave --sparsities out (CAP, FastCAP), or write one number into the recipe"
        )
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    zeros, total = sum(int((p == 0).sum()) for p in chosen), sum(p.numel() for p in chosen)
    low = [s for s in sparsities if round(s * total) < zeros]
    if low:
        raise UserError(
            f"--sparsities {' '.join(map(str, low))}: {zeros:,} of the {total:,} weights that {path} prunes are zero already "
            f"({zeros / total:.4f}), and pruned weights do not come back; ask for more"
        )
