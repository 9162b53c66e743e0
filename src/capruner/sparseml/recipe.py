"""SparseML recipes: load one, find its pruning modifier, apply it at another sparsity."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import capruner
from capruner.cli.arguments import UserError
from capruner.models.selection import check_time
from capruner.planning import Plan
from capruner.recipes import checked_text
from capruner.recipes.arithmetic import OPERATIONS
from capruner.recipes.one_shot import NEAREST, general_refusal, refusal
from capruner.recipes.text import modifier_names
from capruner.recipes.values import CONVERT
from capruner.result import PruningResult
from capruner.sparseml.base import CorrelationAwareModifier  # first: importing it registers our modifiers
from capruner.sparseml.modifiers import CAPruningModifier
from capruner.sparseml.sampling import GradSamplerBatches
from capruner.vision import engines
from capruner.vision.output import folder_inside

# isort: split
import torch
from sparseml.pytorch.optim import ScheduledModifierManager
from sparseml.pytorch.sparsification.pruning import BasePruningModifier, MFACPruningModifier
from sparseml.pytorch.utils import GradSampler, PythonLogger
from torch import Tensor, nn

if TYPE_CHECKING:
    from capruner.calibrated import CalibratedModel
    from capruner.vision.data import CalibrationBatches

restricted_eval = importlib.import_module("sparseml.utils.restricted_eval")  # a function of the package has its name

_UNKNOWN_MODIFIER = re.compile(r"for the tag '!(\w+\.)?(\w+)'")
_UNKNOWN_PARAMETER = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")

# Without a logger of ours SparseML writes sparse_logs/<date>.log into the current folder.
_QUIET = logging.getLogger("capruner.sparseml.quiet")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
logging.getLogger("sparseml").setLevel(os.environ.get("SPARSEML_LOG_LEVEL", "WARNING"))


def quiet_loggers() -> list[PythonLogger]:
    """What to hand to a manager as ``loggers``."""
    return [PythonLogger(logger=_QUIET)]


def load_manager(path: str) -> ScheduledModifierManager:
    """The manager of a recipe file; raise ``UserError`` if SparseML cannot read or run it."""
    text = checked_text(path)
    for name in modifier_names(text):
        if "Distillation" in name:
            raise UserError(f"{path}: {general_refusal(name)}")
    try:
        # Not the path, which it would read in the locale's encoding. Line breaks tell it that this is none.
        manager = ScheduledModifierManager.from_yaml(f"\n{text}\n")
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{path}: {_unknown_modifier(str(error.problem))}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except Exception as error:  # whatever SparseML trips over, it is the recipe's
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        if unknown := _UNKNOWN_PARAMETER.search(reason):
            reason = f"{unknown[1]} has no parameter {unknown[2]}{CONVERT}"
        if "mask_type not supported" in reason:
            reason = f"{reason} by SparseML's own modifier; --engine native carries it out"
        raise UserError(f"{path} does not load: {reason}") from error
    quantizing = [type(m).__name__ for m in manager.iter_modifiers() if "Quantization" in type(m).__name__]
    if quantizing:
        raise UserError(
            f"{path}: {quantizing[0]} does not work with torch {torch.__version__}: it fails when its epoch comes; take it out, and quantize the exported model"
        )
    return manager


def _unknown_modifier(problem: str) -> str:
    """What YAML's reader has to say about a tag, in the words of who wrote the recipe."""
    tag = _UNKNOWN_MODIFIER.search(problem)
    if tag and not tag[1]:  # a line with a dot in it has no modifier, it thinks
        return f"{tag[2]}: SparseML reads parameters from the lines below a modifier's name; no number with a dot may stand behind it"
    said = f"there is no {tag[2]}" if tag else problem
    nearest = [NEAREST[tag[2]]] if tag and tag[2] in NEAREST else []
    return "; ".join([said, *nearest, f"pruning modifiers that exist: {', '.join(known_modifiers())}"])


# What SparseML calculates in eval(...).
restricted_eval._VALID_BINOPS_TO_EVAL.update(OPERATIONS)


def known_modifiers() -> list[str]:
    """Names of the pruning modifiers that recipes can use here."""
    found, todo = set(), [BasePruningModifier]
    while todo:
        for child in todo.pop().__subclasses__():
            todo.append(child)
            if not child.__abstractmethods__ and not child.__name__.startswith(("Base", "_", "CorrelationAware")):
                found.add(child.__name__)
    return sorted(found)


def pruning_modifier(manager: ScheduledModifierManager, path: str) -> Any:
    """The one modifier of a one-shot recipe, staged or not; raise ``UserError`` for none, several, or others without effect in one shot."""
    found = [modifier for modifier in manager.iter_modifiers() if isinstance(modifier, BasePruningModifier)]
    if len(found) != 1:
        names = ", ".join(type(m).__name__ for m in found) or "none"
        raise UserError(
            f"{path}: one-shot pruning takes a recipe with exactly one pruning modifier, this one has {names}"
        )
    for modifier in manager.iter_modifiers():
        if modifier is not found[0] and type(modifier).__name__ != "EpochRangeModifier":  # which changes nothing
            raise UserError(f"{path}: {refusal(type(modifier).__name__)}")
    return found[0]


def keep_inside(modifier: Any, folder: Path) -> None:
    """Move a recipe's ``traces_backup_dir`` into ``folder``; raise ``UserError`` if it leads out of it."""
    named = getattr(modifier, "traces_backup_dir", None)
    if isinstance(modifier, CorrelationAwareModifier) and named:
        modifier._traces_backup_dir = str(folder_inside(folder, named))


def check_sparsities(modifier: Any, model: nn.Module, sparsities: Sequence[float], path: str) -> None:
    """Raise ``UserError`` unless this recipe can prune ``model`` to these sparsities."""
    if getattr(modifier, "final_sparsity", None) is None:
        raise UserError(
            f"{path}: {type(modifier).__name__} has no final_sparsity, so it cannot prune in one shot; it acts in a training, "
            "capruner train. One-shot pruning takes CAPruningModifier, OBSPruningModifier or GlobalMagnitudePruningModifier, for example"
        )
    once = isinstance(modifier, CorrelationAwareModifier)
    engines.check_sparsities(
        modifier.final_sparsity, selected_names(modifier, model), model, sparsities, path, dict_is_fine=once
    )


def apply_at(path: str, model: nn.Module, sparsity: float, grad_sampler: dict[str, Any]) -> None:
    """Apply a recipe in one shot, in place, with its pruning modifier's sparsity replaced."""
    manager = load_manager(path)
    modifier = pruning_modifier(manager, path)
    modifier.init_sparsity = sparsity
    modifier.final_sparsity = sparsity
    if isinstance(modifier, MFACPruningModifier):
        # In one shot SparseML prunes before it takes the grad_sampler, and then has no gradient.
        batches = grad_sampler["data_loader_builder"](modifier.grad_sampler_kwargs)
        modifier._grad_sampler = GradSampler(batches, grad_sampler["loss_function"])
    manager.apply(model, loggers=quiet_loggers(), finalize=True, grad_sampler=grad_sampler)


def check_patterns(manager: ScheduledModifierManager, model: nn.Module) -> None:
    """Raise ``SelectionError`` for a pattern that takes forever: SparseML's own modifiers match names without a time limit."""
    for modifier in manager.iter_modifiers():
        params = getattr(modifier, "params", None)
        for entry in [params] if isinstance(params, str) else params or ():
            if isinstance(entry, str) and entry.startswith("re:"):
                check_time(entry, [name for name, _ in model.named_parameters()])


def selected_names(modifier: Any, model: nn.Module) -> list[str]:
    """Names of the parameters that a modifier prunes."""
    return [f"{p.layer_name}.{p.param_name}" for p in modifier._create_named_layers_and_params(model)]


class BySparseML:
    """A one-shot recipe in SparseML's hands; see :mod:`capruner.vision.engines`."""

    name = "sparseml"

    def __init__(self, path: str, folder: Path) -> None:
        self._path = path
        self._manager = load_manager(path)  # kept: SparseML empties a manager that is collected
        self._modifier = pruning_modifier(self._manager, path)
        keep_inside(self._modifier, folder)
        self.once = isinstance(self._modifier, CorrelationAwareModifier)
        self.modifier = type(self._modifier).__name__
        self.method = self._modifier.method if self.once else None
        self.final_sparsity = self._modifier.final_sparsity if hasattr(self._modifier, "final_sparsity") else None
        self.distill_passes = self._modifier.distill_passes if self.once else 0.0

    def override(self, values: Mapping[str, Any]) -> None:
        """Override the recipe's knobs and ``state_dir``; ``costs`` are only checked. Raise ``UserError`` for a parameter that the modifier lacks."""
        for name, value in values.items():
            parameter = "traces_backup_dir" if name == "state_dir" else name
            if name == "distill_passes":
                self.distill_passes = value
            if name == "costs" and isinstance(self._modifier, CAPruningModifier):
                continue
            if self.once and hasattr(self._modifier, parameter):
                setattr(self._modifier, parameter, value)
            elif name != "distill_passes":
                raise engines.unsupported(name, self.modifier)

    def names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that are pruned."""
        check_patterns(self._manager, model)
        return selected_names(self._modifier, model)

    def check_sparsities(self, model: nn.Module, sparsities: Sequence[float]) -> None:
        """See :func:`check_sparsities`."""
        check_sparsities(self._modifier, model, sparsities, self._path)

    def prune(
        self, model: nn.Module, sparsities: list[float], batches: CalibrationBatches, costs: Any = None
    ) -> PruningResult:
        """One calibration for the whole list; ``model`` is not changed."""
        return self._modifier.one_shot(model, sparsities, _sampler(batches), costs=costs)

    def plan(self, model: nn.Module, batches: CalibrationBatches) -> Plan:
        """What :meth:`prune` would do. Draws two of ``batches``."""
        return self._modifier.one_shot_plan(model, _sampler(batches))

    def calibrate(self, model: nn.Module, batches: CalibrationBatches, costs: Any = None) -> CalibratedModel:
        """Raise ``UserError``: SparseML prunes to a sparsity that is known beforehand."""
        raise UserError("--engine sparseml prunes to given sparsities; --max-drop needs --engine native")

    def apply_at(self, path: str, model: nn.Module, sparsity: float, builder: Callable[[], CalibrationBatches]) -> None:
        """Prune in place with the recipe of ``path`` (the same, where it lies now), and distil where asked for."""
        dense = copy.deepcopy(model) if self.distill_passes else None
        apply_at(path, model, sparsity, _sampler(builder(), finite_cross_entropy))
        if dense is not None:
            batches = GradSamplerBatches(_sampler(builder(), finite_cross_entropy))
            capruner.distill(model, dense, batches, passes=self.distill_passes)

    def remove_state(self) -> None:
        """Delete the state of a killed calibration: the result is safe."""
        self._modifier.remove_state()


def _sampler(batches: CalibrationBatches, loss: Callable[..., Tensor] = nn.functional.cross_entropy) -> dict[str, Any]:
    return {"data_loader_builder": batches, "loss_function": loss}


def finite_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """For SparseML's own modifiers, which would prune on NaN without a word; ours check, and differentiate what has no branches."""
    loss = nn.functional.cross_entropy(outputs, labels)
    if not torch.isfinite(loss):
        raise ValueError(f"the calibration loss is {loss.item()}: look at the images, or at the checkpoint's weights")
    return loss
