"""The values of a pruning modifier's parameters: their defaults, and how they are read, by our reader and by SparseML's alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from capruner.config import recipe_knobs
from capruner.kinds import Convert, flag, none_or, number, whole

FROM_WEIGHTS = "__FROM_PARAM__"
"""SparseML's word for the sparsity that a model has already."""
CAP = {name: knob.default for name, knob in recipe_knobs("cap").items()}
FAST_CAP = {name: knob.default for name, knob in recipe_knobs("fast_cap").items()}
OBS = {"mask_type": "unstructured", "num_grads": 1024, "damp": 1e-7, "fisher_block_size": 1, "num_recomputations": 1}
"""Parameters of SparseML's own OBSPruningModifier, with its defaults."""
MAGNITUDE = {"mask_type": "unstructured"}
"""Parameters of SparseML's own magnitude modifiers, with their defaults."""
CONVERT = "; 'capruner recipes convert FILE' rewrites recipes of the original repository"
"""Added to the error for an unknown parameter."""
__all__ = ["CAP", "FAST_CAP", "FROM_WEIGHTS", "MAGNITUDE", "OBS", "Convert", "flag", "none_or", "number", "whole"]


def check_names(who: str, given: Collection[str], known: Collection[str], needed: Iterable[str]) -> None:
    """Raise ``ValueError`` for parameters that the modifier ``who`` does not have, or that are missing."""
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"{who} has no parameter {', '.join(unknown)}; it has {', '.join(known)}{CONVERT}")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{who} has no {' and no '.join(missing)}")


def share(value: Any) -> float:
    """A share of weights, in [0, 1)."""
    found = number(value)
    if not 0 <= found < 1:
        raise ValueError(f"a sparsity must lie in [0, 1), got {found:g}")
    return found


def init_sparsity(value: Any) -> float | str:
    """A sparsity, or :data:`FROM_WEIGHTS`."""
    return FROM_WEIGHTS if value == FROM_WEIGHTS else share(value)


def one_of(*words: str) -> Convert:
    """A converter that accepts these words only."""

    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return str(value)

    return check


def converted(who: str, name: str, convert: Convert, value: Any) -> Any:
    """``convert(value)``, whose ``ValueError`` names modifier and parameter."""
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{who}: {name} {value!r} is invalid: {error}") from None


def final_sparsity(who: str, value: Any, globally: bool) -> float | dict[float, list[str]]:
    """A sparsity, or ``{sparsity: [params]}``; raise ``ValueError`` for neither, or a dict together with one target over all layers."""
    if not isinstance(value, Mapping):
        return sparsity(who, value)
    if globally:
        raise ValueError(
            "final_sparsity as a dict gives each layer a target of its own, global_sparsity: True gives all one; set global_sparsity: False"
        )
    return {sparsity(who, s): [names] if isinstance(names, str) else list(names) for s, names in value.items()}


def sparsity(who: str, value: Any) -> float:
    """A share of weights; raise ``ValueError`` unless it lies in [0, 1)."""
    found: float = converted(who, "a sparsity", share, value)
    return found


def check_schedule(who: str, leave_enabled: Any, grad_sampler_kwargs: Any, traces_backup_dir: Any) -> None:
    """Check the parameters of the life cycle; raise ``ValueError`` for an invalid one."""
    converted(who, "leave_enabled", flag, leave_enabled)
    if not isinstance(grad_sampler_kwargs or {}, Mapping):
        raise ValueError(f"{who}: grad_sampler_kwargs must be a dict, got {grad_sampler_kwargs!r}")
    if traces_backup_dir is not None and not isinstance(traces_backup_dir, str):
        raise ValueError(f"{who}: traces_backup_dir must be a folder, got {traces_backup_dir!r}")
