"""Validate arguments up front, with messages that name the argument."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of :func:`capruner.prune` and :func:`capruner.compensate_masks`; the ``ValueError`` names the invalid one."""
    check_model(arguments["model"])
    if arguments["batches"] is not None:
        check_batches(arguments["batches"])
    check_function("loss_fn", arguments["loss_fn"], "of outputs and targets")
    if arguments.get("batch_fn") is not None:
        check_function("batch_fn", arguments["batch_fn"], "that turns a batch into (inputs, targets)")
    check_flag("progress", arguments["progress"])
    sparsity, masks = arguments.get("sparsity"), arguments.get("masks")
    if sparsity is not None:
        check_sparsity(sparsity)
    check_names("params", arguments.get("params", ""))
    if masks is not None and not isinstance(masks, str):
        check_masks(masks)
    folder = arguments.get("state_dir")
    if folder is not None and not (isinstance(folder, str | os.PathLike) and str(folder) and "\0" not in str(folder)):
        raise ValueError(f"state_dir must be a folder, got {show(folder)}")
    check_device(arguments["fisher_inv_device"])


def check_batches(batches: Any) -> None:
    """Raise ``ValueError`` unless ``batches`` can be iterated over."""
    if not isinstance(batches, Iterable) or isinstance(batches, type | str):
        raise ValueError(
            f"batches must be an iterable of (inputs, targets), a DataLoader for example, got {show(batches)}"
        )


def check_function(name: str, value: Any, what: str) -> None:
    """Raise ``ValueError`` unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(f"{name} must be a function {what}, got {show(value)}")


def check_sparsity(sparsity: Any) -> None:
    """Raise ``ValueError`` unless ``sparsity`` is a number, a list of numbers, or a dict with numbers as keys."""
    listed = (
        [sparsity]
        if isinstance(sparsity, int | float)
        else list(sparsity)
        if isinstance(sparsity, Sequence | Mapping)
        else None
    )
    if isinstance(sparsity, str | bytes) or listed is None or not all(map(is_number, listed)):
        raise ValueError(
            f"sparsity must be a number in [0, 1), a list of them, or {{sparsity: [params]}}, got {show(sparsity)}"
        )


def check_names(name: str, entries: Any) -> None:
    """Raise ``ValueError`` unless ``entries`` is a string or a list of strings."""
    if not isinstance(entries, str) and not (
        isinstance(entries, Sequence) and all(isinstance(entry, str) for entry in entries)
    ):
        raise ValueError(f"{name} must be a name, a pattern (re:...), or a list of them, got {show(entries)}")


def check_flag(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {show(value)}")


def check_model(model: Any, name: str = "model") -> None:
    """Raise ``ValueError`` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {show(model)}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}, got {show(value)}")


def check_number(name: str, value: Any, least: float | None = None) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number, at least ``least``, or positive where that is None."""
    good = is_number(value) and math.isfinite(value) and (value > 0 if least is None else value >= least)
    if not good:
        raise ValueError(
            f"{name} must be {'a positive number' if least is None else f'a number, at least {least:g}'}, got {show(value)}"
        )


def check_masks(masks: Any) -> None:
    """Raise ``ValueError`` unless ``masks`` is ``{name: tensor}`` without NaN."""
    if not isinstance(masks, Mapping):
        raise ValueError(f"masks must be a dict of bool tensors, 'zeros' or None, got {show(masks)}")
    for name, mask in masks.items():
        if not isinstance(name, str) or not isinstance(mask, Tensor):
            raise ValueError(f"masks must be {{parameter name: tensor}}, got {show(mask)} for {name!r}")
        if mask.is_floating_point() and not torch.isfinite(mask).all():
            raise ValueError(f"the mask of {name} holds NaN or Inf; a mask is True or non-zero where the weight stays")


def check_device(name: Any) -> None:
    """Raise ``ValueError`` for a device that this machine does not have."""
    if name is None:
        return
    try:
        if not isinstance(name, str | torch.device) or not str(name):
            raise TypeError("it is no name of a device")
        torch.empty(1, device=name)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"fisher_inv_device must be a device of this machine, for example 'cpu', got {show(name)} ({reason})"
        ) from error


def check_finite(model: nn.Module) -> None:
    """Raise ``ValueError`` if a parameter or buffer holds NaN or Inf, or has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device, without values; load the model's weights first")
        if tensor.is_floating_point() and not math.isfinite(float(tensor.detach().sum())):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ValueError(
                    f"{name} holds NaN or Inf in {bad} of {tensor.numel()} places: the model is broken before it is pruned; look at its checkpoint"
                )


def is_number(value: Any) -> bool:
    """Whether ``value`` is an int or float; a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_unknown(names: Iterable[str], known: Iterable[str], function: str) -> None:
    """Raise ``TypeError`` for a keyword that ``function`` does not have, and suggest the nearest one."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise TypeError(f"{function}() has no argument {name!r}{advice}")


def show(value: Any) -> str:
    """Format a value for an error message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:50]}..."
