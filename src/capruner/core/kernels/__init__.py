"""Compiled loops, where there is a compiler for the device: greedy elimination and, on CPUs, sums of outer products, Cholesky
factors and inverses.

:mod:`capruner.core.elimination`, :mod:`capruner.core.products` and :mod:`capruner.core.factors` do the same with torch's operations.

A block's elimination is a chain of ``B`` short steps. As torch operations each step is a dozen launches and passes over memory; compiled, the
block's state stays in a core's cache.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


def kernel_for(device: torch.device) -> ModuleType | None:
    """The module whose ``eliminate_blocks`` runs on ``device``: numba's for CPUs, Triton's for GPUs; None where that package is not installed."""
    return _load({"cpu": ("numba", "cpu"), "cuda": ("triton", "cuda")}.get(device.type))


def matrices_kernel_for(device: torch.device) -> ModuleType | None:
    """The module with sums, factors and inverses for ``device``: numba's for CPUs where that is installed, else None."""
    return _load(("numba", "matrices") if device.type == "cpu" else None)


def initial_bias(weight: Tensor, dead: Tensor | None, frozen: Tensor | None) -> Tensor:
    """What is added to saliencies, in the shape of ``weight``: ``-inf`` for dead weights, which come first, the largest number for frozen ones, which come
    last, and 0 for candidates."""
    bias = torch.zeros_like(weight)
    if dead is not None:
        bias.masked_fill_(dead, -torch.inf)
    if frozen is not None:
        bias.masked_fill_(frozen, torch.finfo(weight.dtype).max)
    return bias


@functools.cache
def _load(place: tuple[str, str] | None) -> ModuleType | None:
    """A module of this package, if the package it needs is installed."""
    if place is None or importlib.util.find_spec(place[0]) is None:
        return None
    return importlib.import_module(f"capruner.core.kernels.{place[1]}")
