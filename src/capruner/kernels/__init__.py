"""The greedy elimination as one compiled loop per block, where there is a compiler for the device; :mod:`capruner.obs` does the same with torch's operations.

A block's elimination is a chain of ``B`` short steps. As torch operations each step is a dozen launches and passes over memory; compiled, the
block's state stays in a core's cache.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch


def kernel_for(device: torch.device) -> ModuleType | None:
    """The module whose ``eliminate_blocks`` runs on ``device``: numba's for CPUs, Triton's for GPUs; None where that package is not installed."""
    return _load(device.type)


@functools.cache
def _load(device_type: str) -> ModuleType | None:
    packages = {"cpu": "numba", "cuda": "triton"}
    package = packages.get(device_type)
    if package is None or importlib.util.find_spec(package) is None:
        return None
    return importlib.import_module(f"capruner.kernels.{device_type}")
