"""Every knob of a calibration, declared once: name, type, default, check, conversion, help, and the methods that read it.

:func:`capruner.prune`, :func:`capruner.calibrate` and :func:`capruner.plan` take the knobs as keywords or as a :class:`PruneConfig`. The flags of
``capruner prune``, the parameters of recipe modifiers, the linter and the reference of the documentation derive from :func:`knobs`.
"""

# ruff: noqa: RUF009 - each default is a dataclasses.field

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict, get_args

import torch

from capruner import kinds
from capruner.calibration.gradients import GradientMode, OnBadBatch
from capruner.calibration.labels import Labels
from capruner.checks import refuse_unknown, show
from capruner.core.allocation import Score
from capruner.core.fisher import Solver
from capruner.core.memory import parse_bytes
from capruner.core.patterns import Pattern, parse_mask_type
from capruner.kinds import Kind, one_of, optional
from capruner.methods import METHODS, Method, MethodName, Settings
from capruner.models.modes import Mode
from capruner.recomputation import INTERPOLATIONS, Interpolation

ALL: tuple[MethodName, ...] = get_args(MethodName)
SECOND_ORDER: tuple[MethodName, ...] = ("cap", "fast_cap", "obs")
COMPETING: tuple[MethodName, ...] = ("cap", "obs")


@dataclass(frozen=True)
class Knob:
    """One field of :class:`PruneConfig`.

    Attributes:
        type: source text of its annotation.
        kind: how values are checked and converted.
        help: its description; the first sentence says what it is.
        methods: the methods that read it.
        recipe: whether recipe modifiers have it as a parameter, under the same name.
    """

    name: str
    type: str
    default: Any
    kind: Kind
    help: str
    methods: tuple[MethodName, ...]
    recipe: bool


def _knob(default: Any, kind: Kind, text: str, methods: tuple[MethodName, ...] = ALL, recipe: bool = True) -> Any:
    return field(default=default, metadata={"kind": kind, "help": text, "methods": methods, "recipe": recipe})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """All knobs of a calibration.

    ``help(capruner.prune)`` explains each.

    Raises:
        ValueError: an invalid value, or values that exclude each other.
        TypeError: an unknown name; the message suggests the nearest.
    """

    method: MethodName = _knob(
        "cap",
        one_of(METHODS),
        '"cap", "fast_cap", and for comparison "obs" (WoodFisher) and "magnitude".',
        recipe=False,
    )
    exclude: str | Sequence[str] = _knob(
        (),
        kinds.NAMES,
        'Names of parameters or modules, or "re:" patterns, that stay dense. result.settings["left_dense"] lists all weights of two or more dimensions '
        "that are left dense, with the reason.",
    )
    mask_type: str | int = _knob(
        "unstructured",
        kinds.MASK_TYPE,
        '"unstructured", "2:4" (2 of 4 remain) or any other N:M, "block4"; see capruner.core.patterns.',
    )
    global_sparsity: bool = _knob(
        True, kinds.FLAG, "Apply the target to all layers together; False: to each layer separately."
    )
    num_grads: int | Literal["auto"] = _knob(
        "auto",
        kinds.or_auto(kinds.COUNT),
        'Gradients that the Fisher matrix is estimated from: batches, or samples with gradients="sample". "auto": 64, 128, ... up to 4,096, until a sample of '
        "Fisher blocks predicts gradients that it has not seen, but no more batches than the loader has; see capruner.calibration.enough. "
        'result.settings["num_grads"] has the number.',
        SECOND_ORDER,
    )
    fisher_block_size: int | None = _knob(
        None,
        optional(kinds.BLOCK_SIZE),
        "Weights per Fisher block B; memory is weights x B x 4 bytes. None: in each layer the largest size that cuts its rows evenly, up to 192, or up to "
        "512 as long as 4 GiB hold all blocks; see capruner.core.blocks.fitting.",
        SECOND_ORDER,
    )
    damp: float | None = _knob(
        None,
        optional(kinds.DAMP),
        "Added to the diagonal of the Fisher matrix; absolute (a squared gradient) unless relative_damp, always relative to the mean diagonal for "
        "fast_cap. None: the method's default, relative, 0.01.",
        SECOND_ORDER,
    )
    shrinkage: float | None = _knob(
        None,
        optional(kinds.SHARE),
        "Share of the layer's common Fisher matrix in each block, from 0 (the empirical Fisher matrix) to 1. None: for cap with damp=None estimated from "
        "the noise of the gradients, near 0.5 for few gradients and near 0 for many; 0 for obs and where damp is given. "
        'result.settings["shrinkage_by_layer"] has the shares.',
        COMPETING,
    )
    num_recomputations: int = _knob(
        1,
        kinds.COUNT,
        "Reach each sparsity in N steps, each with a fresh calibration at the weights reached.",
        SECOND_ORDER,
    )
    recomputation_inter_func: Interpolation = _knob(
        "linear",
        one_of(INTERPOLATIONS),
        'How sparsity rises over the recomputations: "linear", "cubic", "inverse_cubic", "geometric".',
        SECOND_ORDER,
    )
    distill_passes: float = _knob(
        0,
        kinds.at_least(0),
        "Train each level towards the outputs of the dense network for N passes (a fraction is fine) over the first 4,096 samples of batches, which are "
        'held in memory; see capruner.distill. Masks do not change. For models that return logits. result.settings["distill"] has the divergence before '
        "and after; predicted losses are those before. 0: off.",
    )
    gradients: GradientMode = _knob(
        "batch", one_of(get_args(GradientMode)), 'One gradient from each "batch", or from each "sample".', SECOND_ORDER
    )
    labels: Labels = _knob(
        "data",
        one_of(get_args(Labels)),
        '"data": the targets of the batches. "model": the model\'s own softmax, see capruner.calibration.labels; the data then needs no labels, and few '
        "images say more. For losses of logits and int64 labels.",
        SECOND_ORDER,
    )
    score: Score = _knob(
        "marginal",
        one_of(get_args(Score)),
        '"marginal" or "cumulative" losses compete; see capruner.core.allocation.',
        COMPETING,
    )
    costs: Mapping[str, float] | None = _knob(
        None,
        optional(kinds.COSTS),
        "{parameter name: cost of one of its weights}: prune by loss per cost instead of loss. "
        "capruner.multiply_adds(model, input_size).per_weight(model) gives a network with fewer multiply-adds at the same accuracy.",
        COMPETING,
        recipe=False,
    )
    relative_damp: bool = _knob(False, kinds.FLAG, "damp is a fraction of the mean diagonal of each block.", COMPETING)
    solver: Solver = _knob(
        "auto", one_of(get_args(Solver)), 'How Fisher blocks are inverted: "auto", "woodbury", "accumulate".', COMPETING
    )
    blocks_in_parallel: int | None = _knob(
        None,
        optional(kinds.PARALLEL_BLOCKS),
        "Blocks worked on at once. None: from the block size. No influence on the result.",
        COMPETING,
    )
    fisher_inv_device: str | None = _knob(
        None,
        optional(kinds.DEVICE),
        'Where inverse Fisher blocks are kept, for example "cpu". None: beside the model.',
        SECOND_ORDER,
    )
    block_size: int | None = _knob(
        None,
        optional(kinds.COUNT),
        "Columns per mask decision of one sweep, as published. None: all of a block, in several steps.",
        ("fast_cap",),
    )
    skip_unsupported: bool = _knob(
        False, kinds.FLAG, "Leave parameters dense that cannot hold the mask type, instead of raising."
    )
    memory_budget: str | int | None = _knob(
        None,
        optional(kinds.BYTES),
        'Bytes, or "8GiB", for the Fisher blocks and gradients of one process. Layers are then calibrated in groups that fit, with one pass over batches '
        "for each group, two with a target over all layers. batches must be an iterable that can be started again.",
        COMPETING,
    )
    on_bad_batch: OnBadBatch = _knob(
        "raise",
        one_of(get_args(OnBadBatch)),
        'For a batch whose data, loss or gradient holds NaN or Inf: "raise", or "skip": draw another one instead (with gradients="sample" only the bad '
        'samples are left out). result.settings["skipped_batches"] counts them. If most batches are bad, that is an error too.',
        SECOND_ORDER,
    )
    mode: Mode = _knob(
        "eval",
        one_of(get_args(Mode)),
        'Mode of the model during a calibration. "eval". "train": for models that compute their loss in training mode only, such as torchvision\'s detection '
        'models; normalization and dropout stay in eval mode, so that statistics do not move. "as_is": each module in the mode that it is in. Modes and '
        "buffers are as before afterwards.",
        SECOND_ORDER,
    )

    def __post_init__(self) -> None:
        if isinstance(self.fisher_inv_device, torch.device):
            object.__setattr__(self, "fisher_inv_device", str(self.fisher_inv_device))
        for knob in knobs().values():
            knob.kind.check(knob.name, getattr(self, knob.name))
        object.__setattr__(self, "exclude", (self.exclude,) if isinstance(self.exclude, str) else tuple(self.exclude))
        _check_together(self)

    @property
    def kind(self) -> type[Method]:
        """The method's class."""
        return METHODS[self.method]

    @property
    def pattern(self) -> Pattern:
        """The mask type, parsed."""
        return parse_mask_type(self.mask_type)

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    def settings(self, costs: Mapping[str, float] | None = None, shrinks: bool | None = None) -> Settings:
        """What the method itself reads, with the method's defaults filled in.

        Args:
            costs: relative costs, as :func:`capruner.core.allocation.checked_costs` returns them.
            shrinks: estimate the shrinkage when it and ``damp`` are None; None: as the method does.
        """
        estimated = (self.kind.shrinks if shrinks is None else shrinks) and self.damp is None
        return Settings(
            num_grads=self.num_grads,
            fisher_block_size=self.fisher_block_size,
            damp=self.kind.default_damp if self.damp is None else float(self.damp),
            relative_damp=self.relative_damp or self.damp is None,
            shrinkage=0.0 if self.shrinkage is None and not estimated else self.shrinkage,
            # Woodbury would have to know the number.
            solver="accumulate" if self.num_grads == "auto" and self.solver == "auto" else self.solver,
            score=self.score,
            blocks_in_parallel=self.blocks_in_parallel,
            fisher_inv_device=self.fisher_inv_device,
            block_size=self.block_size,
            costs=costs,
            pattern=self.pattern,
        )

    def to_dict(self) -> dict[str, Any]:
        """All knobs as JSON values."""
        found = {name: getattr(self, name) for name in knobs()}
        return found | {"exclude": list(self.exclude), "costs": None if self.costs is None else dict(self.costs)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneConfig:
        """The inverse of :meth:`to_dict`; knobs that are absent have their defaults.

        Raises:
            TypeError: an unknown name.
            ValueError: an invalid value.
        """
        return cls(**values)


class Knobs(TypedDict, total=False):
    """The fields of :class:`PruneConfig` as keywords, for type checkers."""

    method: MethodName
    exclude: str | Sequence[str]
    mask_type: str | int
    global_sparsity: bool
    num_grads: int | Literal["auto"]
    fisher_block_size: int | None
    damp: float | None
    shrinkage: float | None
    num_recomputations: int
    recomputation_inter_func: Interpolation
    distill_passes: float
    gradients: GradientMode
    labels: Labels
    score: Score
    costs: Mapping[str, float] | None
    relative_damp: bool
    solver: Solver
    blocks_in_parallel: int | None
    fisher_inv_device: str | None
    block_size: int | None
    skip_unsupported: bool
    memory_budget: str | int | None
    on_bad_batch: OnBadBatch
    mode: Mode


def _check_together(config: PruneConfig) -> None:
    """Raise ``ValueError`` for values that exclude each other."""
    pattern = config.pattern
    if config.num_grads == "auto" and config.solver == "woodbury":
        raise ValueError(
            "num_grads='auto' needs solver='accumulate' or 'auto': woodbury has to know the number before the first gradient"
        )
    if config.shrinkage is not None and not config.kind.competing:
        raise ValueError(f"shrinkage is for the Fisher blocks of method cap or obs, got method={config.method!r}")
    for name in ("fisher_block_size", "block_size"):
        size = getattr(config, name)
        if size is not None and size % pattern.group:
            raise ValueError(f"{name} must be a multiple of {pattern.group} for mask_type {pattern}, got {size}")
    if config.num_recomputations > 1 and pattern.n_m is not None:
        raise ValueError(
            f"mask_type {pattern} is reached in one step; num_recomputations must be 1, got {config.num_recomputations}"
        )
    if config.costs is not None:
        check_competition(config)


def check_competition(config: PruneConfig, per_layer: bool = False) -> None:
    """Raise ``ValueError`` where layers do not compete for one target, so that costs would decide nothing."""
    if per_layer or not config.global_sparsity or config.pattern.n_m is not None or not config.kind.competing:
        raise ValueError(
            "costs say how layers compete for one target over all of them: they need global_sparsity=True, no sparsities per layer, no N:M mask "
            f"type, and method cap or obs (got global_sparsity={config.global_sparsity}, mask_type={config.pattern}, method={config.method!r})"
        )


@functools.cache
def knobs() -> Mapping[str, Knob]:
    """The fields of :class:`PruneConfig` by name."""
    return {f.name: Knob(f.name, str(f.type), f.default, **f.metadata) for f in dataclasses.fields(PruneConfig)}


def recipe_knobs(method: MethodName) -> dict[str, Knob]:
    """The knobs that a recipe modifier for ``method`` has as parameters; ``global_sparsity`` is not among them, which the modifiers declare themselves."""
    return {
        name: knob
        for name, knob in knobs().items()
        if knob.recipe and method in knob.methods and name != "global_sparsity"
    }


def problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that is invalid in ``values``, where :class:`PruneConfig` raises for the first."""
    found = []
    for name, value in values.items():
        try:
            knobs()[name].kind.check(name, value)
        except ValueError as error:
            found.append(str(error))
    if not found:
        try:
            PruneConfig(**values)
        except ValueError as error:
            found.append(str(error))
    return found


def resolve(config: PruneConfig | None, keywords: Mapping[str, Any]) -> PruneConfig:
    """``config`` with the keywords that were passed, which win; raise ``ValueError`` for an invalid value."""
    if config is not None and not isinstance(config, PruneConfig):
        raise ValueError(f"config must be a capruner.PruneConfig, got {show(config)}; make one with from_dict")
    return replace(config or PruneConfig(), **keywords)


def _suggesting(create: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(create)
    def __init__(self: PruneConfig, *args: Any, **values: Any) -> None:
        refuse_unknown(values, knobs(), "PruneConfig")
        create(self, *args, **values)

    return __init__


PruneConfig.__init__ = _suggesting(PruneConfig.__init__)  # type: ignore[method-assign]
