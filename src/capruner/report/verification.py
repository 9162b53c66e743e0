"""The checks of a pruned checkpoint."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from capruner.cli.arguments import describe
from capruner.core.blocks import BlockLayout
from capruner.core.patterns import Pattern, parse_mask_type
from capruner.deploy.sparse_file import is_sparse
from capruner.models.mask_types import unsupported
from capruner.models.selection import select_parameters
from capruner.models.weights import LinearWeight, linear_weights
from capruner.report.architecture import architecture, build
from capruner.report.checkpoint import load_weights, read_weights
from capruner.result import load_result
from capruner.rows import weight_rows
from capruner.text import some


def verify(
    path: Path,
    model: str,
    kwargs: Mapping[str, Any],
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Path | None = None,
    pattern: str | None = None,
) -> dict[str, Any]:
    """Look at the weights in ``path`` as those of a timm model.

    Args:
        params: what counts as prunable, see :func:`capruner.models.selection.select_parameters`.
        masks: a file of :meth:`capruner.PruningResult.save`, or of one tensor per parameter name, non-zero = keep.
        pattern: an N:M pattern that every layer with zeros has to have.

    Returns:
        JSON values: checkpoint, model, pattern, ``layers`` (name, shape, numel, zeros, sparsity, with a pattern also that), ``sparsity`` with both
        denominators, ``checks`` (name, ok, detail), ``ok``.

    Raises:
        ValueError, FileNotFoundError: a file that cannot be read, an unknown model, parameters that cannot be selected, or not an N:M pattern.
    """
    wanted = parse_mask_type(pattern) if pattern else None
    if wanted is not None and wanted.n_m is None:
        raise ValueError(f"--pattern must be N:M, such as 2:4, got {pattern!r}")
    module = architecture(model, kwargs)
    weights = read_weights(path)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    checks = [_fit(expected, weights, model)]
    here = {
        name: weights[name]
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) == shape
    }
    names = [name for name in select_parameters(module, params, trainable=False) if name in here]
    rows = weight_rows(here, names)
    checks.append(_finite(weights))
    if masks is not None:
        checks.append(_masks(masks, weights))
    if wanted is not None:
        checks.append(_pattern(wanted, here, rows, linear_weights(module)))
    checks.append(_loads(path, model, kwargs))
    return {
        "checkpoint": str(path),
        "model": model,
        "pattern": None if wanted is None else str(wanted),
        "sparsity": _sparsity(rows, here),
        "layers": rows,
        "checks": checks,
        "ok": all(check["ok"] for check in checks),
    }


def _sparsity(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Zeros over the prunable weights, and over all."""
    zeros, count = sum(row["zeros"] for row in rows), sum(row["numel"] for row in rows)
    zeros_all, count_all = sum(int((w == 0).sum()) for w in weights.values()), sum(w.numel() for w in weights.values())
    return {
        "prunable": zeros / max(count, 1),
        "all": zeros_all / max(count_all, 1),
        "zeros_prunable": zeros,
        "count_prunable": count,
        "zeros_all": zeros_all,
        "count_all": count_all,
    }


def _check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail}


def _fit(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], model: str) -> dict[str, Any]:
    missing = [name for name in expected if name not in weights]
    other = [name for name, shape in expected.items() if name in weights and tuple(weights[name].shape) != shape]
    if not missing and not other:
        return _check("architecture", True, f"all {len(expected)} parameters of {model}, with its shapes")
    parts = [f"missing: {some(missing, 3)}"] if missing else []
    parts += (
        [f"of another shape: {some([f'{n} {tuple(weights[n].shape)} for {expected[n]}' for n in other], 3)}"]
        if other
        else []
    )
    return _check("architecture", False, "; ".join(parts))


def _finite(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    bad = {name: int((~torch.isfinite(w)).sum()) for name, w in weights.items() if w.is_floating_point()}
    bad = {name: count for name, count in bad.items() if count}
    if not bad:
        return _check("finite", True, "no NaN, no infinity")
    return _check("finite", False, f"{sum(bad.values()):,} values are NaN or infinite, in {some(list(bad), 3)}")


def _masks(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    masks, source = read_masks(path, weights)
    unfit = [name for name, mask in masks.items() if name not in weights or weights[name].shape != mask.shape]
    if unfit:
        return _check(
            "masks", False, f"{source}: the checkpoint has no such parameter, or of another shape: {some(unfit, 3)}"
        )
    alive = {name: int((weights[name][~mask] != 0).sum()) for name, mask in masks.items()}
    alive = {name: count for name, count in alive.items() if count}
    removed = sum(int((~mask).sum()) for mask in masks.values())
    if alive:
        return _check(
            "masks",
            False,
            f"{source}: {sum(alive.values()):,} of {removed:,} removed weights are not zero, in {some(list(alive), 3)}",
        )
    more = sum(int((weights[name][mask] == 0).sum()) for name, mask in masks.items())
    extra = f"; {more:,} weights that stay are zero too" if more else ""
    return _check("masks", True, f"{source}: all {removed:,} removed weights are zero{extra}")


def read_masks(path: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """``{name: bool, True = stays}`` and where they are from. Of a result with several sparsities the one that is nearest to the zeros.

    Raises:
        ValueError: no masks in that file.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no masks at {path}")
    try:
        result = load_result(path)
    except ValueError as error:
        if "not a pruning result" not in str(error):
            raise
        if path.suffix != ".safetensors":
            raise ValueError(f"--masks {path}: give a safetensors file") from error
        return {name: mask != 0 for name, mask in read_weights(path).items()}, path.name
    except SafetensorError as error:
        raise ValueError(f"--masks {path} is damaged: {error}") from error

    def misses(sparsity: float) -> int:
        there = [(weights[n] != 0, mask) for n, mask in result.masks(sparsity).items() if n in weights]
        return sum(int((w != mask).sum()) if w.shape == mask.shape else mask.numel() for w, mask in there)

    nearest = min(result.sparsities, key=misses)
    return result.masks(nearest), f"{path.name} at {nearest:g}"


def _pattern(
    pattern: Pattern, weights: Mapping[str, Tensor], rows: list[dict[str, Any]], linear: Mapping[str, LinearWeight]
) -> dict[str, Any]:
    """Adds to each row what it makes of the pattern."""
    broken: list[str] = []
    held = 0
    for row in rows:
        name = row["name"]
        if not row["zeros"]:
            row["pattern"] = "dense"
        elif unsupported(pattern, {name: weights[name]}, linear):
            row["pattern"] = "impossible"
            shape = weights[name].shape
            inputs = linear[name].reduction if name in linear else shape[1] if len(shape) > 1 else 1
            broken.append(f"{name} ({inputs} inputs are no multiple of {pattern.group})")
        else:
            inputs = linear[name].inputs if name in linear else 1
            groups = BlockLayout.of(weights[name].shape, pattern.group, inputs).to_blocks(
                weights[name] != 0, torch.bool
            )
            wrong = int((groups.sum(dim=1) > pattern.stay).sum())
            row["pattern"] = "holds" if not wrong else "broken"
            held += not wrong
            if wrong:
                broken.append(f"{name} ({wrong:,} of {len(groups):,} groups)")
    if broken:
        return _check(f"pattern {pattern}", False, f"broken in {len(broken)} layers: {some(broken, 3)}")
    if not held:
        return _check(f"pattern {pattern}", False, "no prunable layer has a zero")
    return _check(
        f"pattern {pattern}", True, f"holds in {held} layers along their inputs; {len(rows) - held} are dense"
    )


def _loads(path: Path, model: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    import timm

    sparse = is_sparse(path)
    name = "loads" if sparse else "loads in timm"
    try:
        if sparse:
            load_weights(build(model, kwargs), path, model)
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                timm.create_model(model, checkpoint_path=str(path), **kwargs)
    except Exception as error:  # whatever timm trips over
        return _check(name, False, describe(error))
    if sparse:
        return _check(name, True, "capruner.load_sparse expands it, and the model takes all of it, nothing missing")
    return _check(name, True, f"timm.create_model({model!r}, checkpoint_path=...) takes it, nothing missing")
