"""A recipe with one pruning modifier, as a call of :func:`capruner.prune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from capruner.cli.arguments import UserError
from capruner.config import knobs
from capruner.core.patterns import parse_mask_type
from capruner.methods import METHODS, MethodName
from capruner.models.mask_types import supporting
from capruner.models.weights import linear_weights
from capruner.pruning import prune
from capruner.recipes import values
from capruner.recipes.document import Modifier, modifiers
from capruner.recipes.text import checked_text
from capruner.recomputation import INTERPOLATIONS
from capruner.result import PruningResult
from capruner.targets import selected

SCHEDULE: dict[str, values.Convert] = {
    "init_sparsity": values.init_sparsity,
    "start_epoch": values.number,
    "end_epoch": values.number,
    "update_frequency": values.number,
    "inter_func": values.one_of(*INTERPOLATIONS),
    "leave_enabled": values.flag,
}
"""When a modifier acts in a training, and how sparsity rises; one-shot pruning reads these only to find mistakes."""


@dataclass(frozen=True)
class Kind:
    """A modifier that can be carried out here.

    Attributes:
        method: of :func:`capruner.prune`.
        knobs: its parameters that are knobs of :class:`capruner.PruneConfig`, with their defaults.
        globally: one target over all layers, where the recipe does not say.
        says_globally: whether a recipe can say it.
        ours: the modifier is our own; the others are SparseML's, whose modifiers have no ``traces_backup_dir``.
    """

    method: MethodName
    knobs: Mapping[str, Any]
    globally: bool
    says_globally: bool
    ours: bool

    @property
    def parameters(self) -> set[str]:
        """All that a recipe can say."""
        found = {*self.knobs, *SCHEDULE, "params", "final_sparsity"}
        found |= {"global_sparsity"} if self.says_globally else set()
        found |= {"grad_sampler_kwargs"} if METHODS[self.method].uses_gradients else set()
        return found | ({"traces_backup_dir", "n", "m"} if self.ours else set())


KINDS = {
    "CAPruningModifier": Kind("cap", values.CAP, True, True, True),
    "FastCAPruningModifier": Kind("fast_cap", values.FAST_CAP, False, True, True),
    "OBSPruningModifier": Kind("obs", values.OBS, True, True, False),
    "GlobalMagnitudePruningModifier": Kind("magnitude", values.MAGNITUDE, True, False, False),
    "MagnitudePruningModifier": Kind("magnitude", values.MAGNITUDE, False, False, False),
}
OURS = frozenset(name for name, kind in KINDS.items() if kind.ours)
_TRAINING = ("EpochRange", "LearningRate", "WeightDecay", "TrainableParams", "ConstantPruning")
NEAREST = {
    "GWProdPruningModifier": "CAPruningModifier is the nearest method",
    "MFACPruningModifier": "OBSPruningModifier with fisher_block_size up to 192 scores weights with the same matrix",
}
"""What to use in the place of a modifier of the original repository."""


@dataclass
class OneShot:
    """What one pruning modifier asks for.

    Attributes:
        modifier: its name.
        params: what to prune; not looked at where ``final_sparsity`` is a dict.
        final_sparsity: a share, or ``{share: [params]}``.
        global_sparsity: one target over all layers.
        knobs: further keywords of :func:`capruner.prune`.
        grad_sampler_kwargs: for whoever loads calibration data, for example ``batch_size``.
        traces_backup_dir: the recipe's state folder.
        schedule: what the recipe says of epochs, ``init_sparsity``, ``inter_func`` and ``leave_enabled``; one-shot pruning does not use it.
    """

    modifier: str
    params: str | list[str]
    final_sparsity: float | dict[float, list[str]]
    global_sparsity: bool
    knobs: dict[str, Any]
    grad_sampler_kwargs: dict[str, Any] = field(default_factory=dict)
    traces_backup_dir: str | None = None
    schedule: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What the modifier is."""
        return KINDS[self.modifier]

    @property
    def method(self) -> MethodName:
        """The method of :func:`capruner.prune`."""
        return self.kind.method

    def selected(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters to prune; raise ``SelectionError`` if ``params`` or the mask type do not fit the model."""
        needs_gradients = METHODS[self.method].uses_gradients
        exclude = self.knobs.get("exclude", ())
        selection, _ = selected(model, self.params, self.final_sparsity, exclude, needs_gradients)
        skip = self.knobs.get("skip_unsupported", False)
        pattern = parse_mask_type(self.knobs["mask_type"])
        return supporting(pattern, selection.parameters, skip, linear_weights(model))[0]

    def targets(self, model: nn.Module) -> dict[str, float]:
        """The final sparsity of each parameter of :meth:`selected`."""
        needs_gradients = METHODS[self.method].uses_gradients
        _, own = selected(model, self.params, self.final_sparsity, (), needs_gradients)
        return {name: own[name] if own else self.final_sparsity for name in self.selected(model)}  # type: ignore[misc]

    def prune(
        self,
        model: nn.Module,
        batches: Iterable[Any] | None,
        loss_fn: Any,
        sparsities: Sequence[float] | Any = (),
        **more: Any,
    ) -> PruningResult:
        """:func:`capruner.prune` with what the recipe says; ``sparsities`` stand above its own, and ``more`` above its other arguments."""
        return prune(model, batches, loss_fn, sparsities or self.final_sparsity, **(self.keywords | more))

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of :func:`capruner.prune`, :func:`capruner.calibrate` and :func:`capruner.plan`."""
        return {"method": self.method, "params": self.params, "global_sparsity": self.global_sparsity, **self.knobs}


def read_modifiers(path: str | Path) -> list[Modifier]:
    """All modifiers of a recipe file, of any name; raise ``UserError`` for anything but a recipe."""
    text = checked_text(path)
    try:
        return modifiers(text)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{path}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} does not load: {error}") from error


def refuse_others(path: str | Path, found: Iterable[Modifier]) -> None:
    """Raise ``UserError`` unless all modifiers are of :data:`KINDS`; it says what to do."""
    for modifier in found:
        if modifier.name not in KINDS:
            raise UserError(f"{path}: {refusal(modifier.name)}")


def load(path: str | Path) -> OneShot:
    """The pruning modifier of a recipe file; raise ``UserError`` if it has others, or an invalid parameter."""
    found = read_modifiers(path)
    refuse_others(path, found)
    if len(found) != 1:
        names = ", ".join(m.name for m in found) or "none"
        raise UserError(
            f"{path}: one-shot pruning takes a recipe with exactly one pruning modifier, this one has {names}"
        )
    try:
        return one_shot(found[0])
    except ValueError as error:
        raise UserError(f"{path} does not load: {error}") from error


def one_shot(modifier: Modifier) -> OneShot:
    """Read a modifier of :data:`KINDS`; raise ``ValueError`` for a missing, unknown or invalid parameter."""
    kind, who, given = KINDS[modifier.name], modifier.name, dict(modifier.values)
    values.check_names(who, given, sorted(kind.parameters), ("params", "final_sparsity"))
    globally = given.pop("global_sparsity", kind.globally) if kind.says_globally else kind.globally
    values.converted(who, "global_sparsity", values.flag, globally)
    final = values.final_sparsity(who, given.pop("final_sparsity"), globally)
    params = _params(who, given.pop("params"))
    sampler = given.pop("grad_sampler_kwargs", None)
    folder = values.none_or(lambda v: v)(given.pop("traces_backup_dir", None))
    given["mask_type"] = parse_mask_type(
        given.get("mask_type", "unstructured"), given.pop("n", None), given.pop("m", None)
    )
    schedule = {
        name: values.converted(who, name, convert, given.pop(name))
        for name, convert in SCHEDULE.items()
        if name in given
    }
    values.check_schedule(who, schedule.get("leave_enabled", True), sampler, folder)
    said = {**kind.knobs, **given}
    read = {name: values.converted(who, name, knobs()[name].kind.convert, value) for name, value in said.items()}
    return OneShot(who, params, final, globally, read, dict(sampler or {}), folder, schedule)


def _params(who: str, given: Any) -> str | list[str]:
    if isinstance(given, str):
        return given
    flat = (
        [entry for item in given for entry in (item if isinstance(item, list) else [item])]
        if isinstance(given, list)
        else None
    )
    if flat is None or not all(isinstance(entry, str) for entry in flat):
        raise ValueError(f"{who}: params must be a list of names and patterns, got {given!r}")
    return flat


def refusal(name: str) -> str:
    """Why a modifier is not carried out by one-shot pruning, and what to do."""
    if any(word in name for word in _TRAINING):
        return f"{name} acts in a training; take it out for one-shot pruning, which has no epochs"
    return general_refusal(name)


def general_refusal(name: str) -> str:
    """Why a modifier is never carried out, and what to do."""
    if "Quantization" in name:
        return f"{name} does not run here; take it out, and quantize the exported model"
    if "Distillation" in name:
        return f"{name} has no effect here, as there is no teacher; take it out, and use distill_passes in CAPruningModifier or capruner.distill"
    instead = f"use one of them ({NEAREST[name]})" if name in NEAREST else "use one of them"
    return (
        f"{name} is none of the pruning modifiers that capruner carries out itself, {', '.join(KINDS)}; {instead}, or SparseML "
        "(Python 3.11, pip install 'capruner[sparseml]') with --engine sparseml, if it has that modifier"
    )
