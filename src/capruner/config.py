"""Every knob of a calibration, declared once: name, type, default, check and help.

:func:`capruner.prune`, :func:`capruner.calibrate` and :func:`capruner.plan` take the knobs as keywords or as a :class:`PruneConfig`; command lines, recipe
modifiers and reference tables derive from :func:`knobs`, :func:`help_of` and the defaults, which are class attributes (``PruneConfig.num_grads``).
"""

# ruff: noqa: RUF009 - each default is a dataclasses.field

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypedDict, TypeVar, get_args

import torch

from capruner.allocation import Score
from capruner.checks import check_count, check_flag, check_names, check_number, show
from capruner.fisher import Solver
from capruner.gradients import GradientMode, OnBadBatch
from capruner.labels import Labels
from capruner.layout import check_block_size
from capruner.memory import parse_bytes
from capruner.methods import METHODS, Method, MethodName, Settings
from capruner.patterns import Pattern, parse_mask_type
from capruner.recomputation import INTERPOLATIONS, Interpolation

_P = ParamSpec("_P")
_R = TypeVar("_R")
Check = Callable[[str, Any], object]
"""Of a knob's name and value; raises ``ValueError``."""


def _one_of(*words: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"{name} must be one of {sorted(words)}, got {show(value)}")

    return check


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _damp(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"damp must be a positive number, got {show(value)}; 1e-8 to 1e-4 are usual")


def _share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, or None to have it estimated, got {show(value)}")


def _device(name: str, value: Any) -> None:
    # Whether this machine has it is checked when it is used: a config may be written elsewhere.
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a device of this machine, for example 'cpu', got {show(value)}")


def _costs(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"costs must be {{parameter name: cost of one of its weights}}, got {show(value)}")


def _knob(default: Any, check: Check, text: str) -> Any:
    return field(default=default, metadata={"check": check, "help": text})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """All knobs of a calibration.

    ``help(capruner.prune)`` and :func:`capruner.config.help_of` explain each.

    Raises:
        ValueError: an invalid value, or values that exclude each other.
        TypeError: an unknown name; the message suggests the nearest.
    """

    method: MethodName = _knob(
        "cap", _one_of(*METHODS), '"cap", "fast_cap", and for comparison "obs" (WoodFisher) and "magnitude".'
    )
    exclude: str | Sequence[str] = _knob(
        (),
        check_names,
        'Names of parameters or modules, or "re:" patterns, that stay dense. result.settings["left_dense"] lists all weights of two or more dimensions '
        "that are left dense, with the reason.",
    )
    mask_type: str | int = _knob(
        "unstructured",
        lambda _, value: parse_mask_type(value),
        '"unstructured", "2:4" (2 of 4 remain) or any other N:M, "block4"; see capruner.patterns.',
    )
    global_sparsity: bool = _knob(
        True, check_flag, "Apply the target to all layers together; False: to each layer separately."
    )
    num_grads: int = _knob(
        4096,
        check_count,
        'Gradients that the Fisher matrix is estimated from: batches, or samples with gradients="sample".',
    )
    fisher_block_size: int | None = _knob(
        None,
        lambda _, value: check_block_size(value),
        "Weights per Fisher block B; memory is weights x B x 4 bytes. None: in each layer the largest size that cuts its rows evenly, up to 192, or up to "
        "512 as long as 4 GiB hold all blocks; see capruner.layout.fitting.",
    )
    damp: float | None = _knob(
        None,
        _or_none(_damp),
        "Added to the diagonal of the Fisher matrix; absolute (a squared gradient) unless relative_damp, always relative to the mean diagonal for "
        "fast_cap. None: the method's default, relative, 0.01, and 0.5 for fast_cap.",
    )
    shrinkage: float | None = _knob(
        None,
        _or_none(_share),
        "Share of the layer's common Fisher matrix in each block, from 0 (the empirical Fisher matrix) to 1. None: for cap with damp=None estimated from "
        "the noise of the gradients, near 0.5 for few gradients and near 0 for many; 0 for obs and where damp is given. "
        'result.settings["shrinkage_by_layer"] has the shares.',
    )
    num_recomputations: int = _knob(
        1, check_count, "Reach each sparsity in N steps, each with a fresh calibration at the weights reached."
    )
    recomputation_inter_func: Interpolation = _knob(
        "linear",
        _one_of(*INTERPOLATIONS),
        'How sparsity rises over the recomputations: "linear", "cubic", "geometric".',
    )
    distill_passes: float = _knob(
        0,
        functools.partial(check_number, least=0),
        "Train each level towards the outputs of the dense network for N passes (a fraction is fine) over the first 4,096 samples of batches, which are "
        'held in memory; see capruner.distill. Masks do not change. For models that return logits. result.settings["distill"] has the divergence before '
        "and after; predicted losses are those before. 0: off.",
    )
    gradients: GradientMode = _knob(
        "batch", _one_of(*get_args(GradientMode)), 'One gradient from each "batch", or from each "sample".'
    )
    labels: Labels = _knob(
        "data",
        _one_of(*get_args(Labels)),
        '"data": the targets of the batches. "model": the model\'s own softmax, see capruner.labels; the data then needs no labels, and few images say more. '
        "For losses of logits and int64 labels.",
    )
    score: Score = _knob(
        "marginal", _one_of(*get_args(Score)), '"marginal" or "cumulative" losses compete; see capruner.allocation.'
    )
    costs: Mapping[str, float] | None = _knob(
        None,
        _or_none(_costs),
        "{parameter name: cost of one of its weights}: prune by loss per cost instead of loss. "
        "capruner.multiply_adds(model, input_size).per_weight(model) gives a network with fewer multiply-adds at the same accuracy.",
    )
    relative_damp: bool = _knob(False, check_flag, "damp is a fraction of the mean diagonal of each block.")
    solver: Solver = _knob(
        "auto", _one_of(*get_args(Solver)), 'How Fisher blocks are inverted: "auto", "woodbury", "accumulate".'
    )
    blocks_in_parallel: int | None = _knob(
        None,
        _or_none(check_count),
        "Blocks worked on at once. None: from the block size. No influence on the result.",
    )
    fisher_inv_device: str | None = _knob(
        None, _or_none(_device), 'Where inverse Fisher blocks are kept, for example "cpu". None: beside the model.'
    )
    block_size: int | None = _knob(
        None, _or_none(check_count), "fast_cap only: columns per mask decision. None: all of a block."
    )
    skip_unsupported: bool = _knob(
        False, check_flag, "Leave parameters dense that cannot hold the mask type, instead of raising."
    )
    memory_budget: str | int | None = _knob(
        None,
        _or_none(lambda _, value: parse_bytes(value)),
        'Bytes, or "8GiB", for the Fisher blocks and gradients of one process. Layers are then calibrated in groups that fit, with one pass over batches '
        "for each group, two with a target over all layers. batches must be an iterable that can be started again.",
    )
    on_bad_batch: OnBadBatch = _knob(
        "raise",
        _one_of(*get_args(OnBadBatch)),
        'For a batch whose data, loss or gradient holds NaN or Inf: "raise", or "skip": draw another one instead (with gradients="sample" only the bad '
        'samples are left out). result.settings["skipped_batches"] counts them. If most batches are bad, that is an error too.',
    )

    def __post_init__(self) -> None:
        if isinstance(self.fisher_inv_device, torch.device):
            object.__setattr__(self, "fisher_inv_device", str(self.fisher_inv_device))
        for knob in dataclasses.fields(self):
            knob.metadata["check"](knob.name, getattr(self, knob.name))
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
            costs: relative costs, as :func:`capruner.allocation.checked_costs` returns them.
            shrinks: estimate the shrinkage when it and ``damp`` are None; None: as the method does.
        """
        estimated = (self.kind.shrinks if shrinks is None else shrinks) and self.damp is None
        return Settings(
            num_grads=self.num_grads,
            fisher_block_size=self.fisher_block_size,
            damp=self.kind.default_damp if self.damp is None else float(self.damp),
            relative_damp=self.relative_damp or self.damp is None,
            shrinkage=0.0 if self.shrinkage is None and not estimated else self.shrinkage,
            solver=self.solver,
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
    num_grads: int
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


def _check_together(config: PruneConfig) -> None:
    """Raise ``ValueError`` for values that exclude each other."""
    pattern = config.pattern
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


def knobs() -> dict[str, dataclasses.Field[Any]]:
    """The fields of :class:`PruneConfig` by name: ``default``, ``type`` (as source text), ``metadata["help"]``, ``metadata["check"]``."""
    return {knob.name: knob for knob in dataclasses.fields(PruneConfig)}


def help_of(name: str) -> str:
    """The description of a knob; its first sentence says what it is.

    Raises:
        TypeError: no knob has that name.
    """
    _refuse_unknown([name], knobs(), "PruneConfig")
    return str(knobs()[name].metadata["help"])


def resolve(config: PruneConfig | None, keywords: Mapping[str, Any]) -> PruneConfig:
    """``config`` with the keywords that were passed, which win.

    Raises:
        ValueError: an invalid value, or ``config`` is not a :class:`PruneConfig`.
    """
    if config is not None and not isinstance(config, PruneConfig):
        raise ValueError(f"config must be a capruner.PruneConfig, got {show(config)}; make one with from_dict")
    return replace(config or PruneConfig(), **keywords)


def takes_knobs(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function with ``**knobs: Unpack[Knobs]``: its signature and its help list every knob, and unknown keywords are refused by name."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    more = [
        inspect.Parameter(k.name, inspect.Parameter.KEYWORD_ONLY, default=k.default, annotation=k.type)
        for k in knobs().values()
    ]
    known = [p.name for p in (*named, *more)]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        _refuse_unknown(kwargs, known, function.__name__)
        return function(*args, **kwargs)

    call.__signature__ = own.replace(parameters=[*named, *more])  # type: ignore[attr-defined]
    text = "\n".join(
        textwrap.fill(f"{k.name}: {help_of(k.name)}", 150, initial_indent="    ", subsequent_indent="        ")
        for k in knobs().values()
    )
    call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nKnobs (see :class:`capruner.PruneConfig`):\n{text}\n"
    return call


def _refuse_unknown(names: Iterable[str], known: Iterable[str], function: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise TypeError(f"{function}() has no argument {name!r}{advice}")


def _suggesting(create: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(create)
    def __init__(self: PruneConfig, *args: Any, **values: Any) -> None:
        _refuse_unknown(values, knobs(), "PruneConfig")
        create(self, *args, **values)

    return __init__


PruneConfig.__init__ = _suggesting(PruneConfig.__init__)  # type: ignore[method-assign]
