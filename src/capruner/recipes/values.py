"""What the parameters of pruning modifiers can be, and what they are where a recipe does not say: for our reader and for SparseML's alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from capruner.config import PruneConfig
from capruner.methods import METHODS

Convert = Callable[[Any], Any]
FROM_WEIGHTS = "__FROM_PARAM__"
"""SparseML's word for the sparsity that a model has already."""


def none_or(convert: Convert) -> Convert:
    """A converter that lets None pass, also as the words ``None`` and ``null`` that public recipes write."""
    return lambda value: None if value is None or value in ("None", "null") else convert(value)


def flag(value: Any) -> bool:
    """A YAML boolean; anything else is an error and not the truth of a non-empty string."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def number(value: Any) -> float:
    """A number; true and false are not."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return float(value)


def whole(value: Any) -> int:
    """A whole number; 4096.0 is one, 0.5 is not."""
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError("expected a whole number")
    return int(value)


def _blocks(value: Any) -> int | None:
    """-1 is how public recipes say "all at once"; the engine chooses then."""
    return None if value is None or whole(value) == -1 else whole(value)


CAP: dict[str, Convert] = {
    "mask_type": str,
    "num_grads": whole,
    "damp": none_or(float),
    "shrinkage": none_or(float),
    "fisher_block_size": none_or(whole),
    "num_recomputations": whole,
    "recomputation_inter_func": str,
    "distill_passes": number,
    "blocks_in_parallel": _blocks,
    "fisher_inv_device": none_or(str),
    "gradients": str,
    "labels": str,
    "score": str,
    "relative_damp": flag,
    "skip_unsupported": flag,
    "on_bad_batch": str,
    "memory_budget": none_or(str),
}
FAST_CAP: dict[str, Convert] = {
    "mask_type": str,
    "num_grads": whole,
    "damp": float,
    "fisher_block_size": none_or(whole),
    "block_size": none_or(whole),
    "num_recomputations": whole,
    "recomputation_inter_func": str,
    "distill_passes": number,
    "fisher_inv_device": none_or(str),
    "gradients": str,
    "labels": str,
    "skip_unsupported": flag,
    "on_bad_batch": str,
}
OBS: dict[str, Convert] = {
    "mask_type": str,
    "num_grads": whole,
    "damp": number,
    "fisher_block_size": whole,
    "num_recomputations": whole,
}
MAGNITUDE: dict[str, Convert] = {"mask_type": str}
"""Parameters that :func:`capruner.prune` takes by the same name, and what makes a value of YAML one of ours."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "cap": {name: getattr(PruneConfig, name) for name in CAP},
    "fast_cap": {name: getattr(PruneConfig, name) for name in FAST_CAP} | {"damp": METHODS["fast_cap"].default_damp},
    "obs": {
        "mask_type": "unstructured",
        "num_grads": 1024,
        "damp": 1e-7,
        "fisher_block_size": 1,
        "num_recomputations": 1,
    },
    "magnitude": {"mask_type": "unstructured"},
}
"""By method; those of the modifiers of SparseML's life cycle are the same (a test compares them)."""


def converted(who: str, name: str, convert: Convert, value: Any) -> Any:
    """``convert(value)``.

    Raises:
        ValueError: the value cannot be; the message names modifier and parameter.
    """
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{who}: {name} cannot be {value!r} ({error})") from None


def final_sparsity(who: str, value: Any, globally: bool) -> float | dict[float, list[str]]:
    """A sparsity, or ``{sparsity: [params]}``.

    Raises:
        ValueError: neither, or a dict together with one target over all layers.
    """
    if not isinstance(value, Mapping):
        return sparsity(who, value)
    if globally:
        raise ValueError(
            "final_sparsity as a dict gives each layer a target of its own, global_sparsity: True gives all one; set global_sparsity: False"
        )
    return {sparsity(who, s): [names] if isinstance(names, str) else list(names) for s, names in value.items()}


def sparsity(who: str, value: Any) -> float:
    """A share of weights.

    Raises:
        ValueError: not in [0, 1).
    """
    found: float = converted(who, "a sparsity", number, value)
    if not 0 <= found < 1:
        raise ValueError(f"{who}: a sparsity must lie in [0, 1), got {found:g}")
    return found


def check_schedule(who: str, leave_enabled: Any, grad_sampler_kwargs: Any, traces_backup_dir: Any) -> None:
    """Parameters of the life cycle.

    Raises:
        ValueError: one cannot be what it is.
    """
    converted(who, "leave_enabled", flag, leave_enabled)
    if not isinstance(grad_sampler_kwargs or {}, Mapping):
        raise ValueError(f"{who}: grad_sampler_kwargs must be a dict, got {grad_sampler_kwargs!r}")
    if traces_backup_dir is not None and not isinstance(traces_backup_dir, str):
        raise ValueError(f"{who}: traces_backup_dir must be a folder, got {traces_backup_dir!r}")
