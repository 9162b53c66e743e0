"""Memory of a calibration: an estimate, and groups of layers that fit a budget."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from tqdm.auto import tqdm

from capruner.calibration.driver import Calibration
from capruner.core.memory import shown
from capruner.core.numerics import working_dtype
from capruner.distributed import processes
from capruner.methods.base import SecondOrderMethod

WORKING_SET = 128 * 2**20
"""Bytes of the blocks that are being eliminated or solved; the same whatever the model."""


def split_into_groups(calibration: Calibration, budget: int | None) -> list[Calibration]:
    """Calibrations of groups of layers whose Fisher blocks fit the budget, which are calibrated one after the other.

    Args:
        budget: bytes of one process for Fisher blocks and gradients; None: no limit.

    Raises:
        ValueError: one layer alone does not fit; or there are several groups, and the data can be read only once.
    """
    if budget is None or not issubclass(calibration.method, SecondOrderMethod):
        return [calibration]
    size = processes().world_size
    need = {name: _layer_bytes(calibration, name) // size for name in calibration.layouts}
    largest = max(need, key=need.__getitem__)
    if need[largest] + WORKING_SET > budget:
        raise ValueError(
            f"memory_budget={shown(budget)} is too small: {largest} alone needs {shown(need[largest] + WORKING_SET, up=True)} at "
            f"fisher_block_size={calibration.settings.fisher_block_size}; allow that much, or use a smaller fisher_block_size or method='fast_cap'"
        )
    groups: list[list[str]] = [[]]
    room = budget - WORKING_SET
    for name, layer in need.items():
        if layer > room and groups[-1]:
            groups.append([])
            room = budget - WORKING_SET
        groups[-1].append(name)
        room -= layer
    if len(groups) > 1 and calibration.batches.once:
        raise ValueError(
            f"memory_budget={shown(budget)} needs {len(groups)} groups of layers, each with its own passes over the data, but "
            "`batches` is an iterator, which ends after one; pass a DataLoader or a list"
        )
    if len(groups) == 1:
        return [calibration]
    parameters = calibration.parameters
    return [replace(calibration, parameters={n: parameters[n] for n in names}, whole=False) for names in groups]


def log_groups(calibration: Calibration, groups: Sequence[Calibration], budget: int | None) -> None:
    """Show how many groups the budget needs, if there are several."""
    if budget is not None and len(groups) > 1 and calibration.progress and processes().rank == 0:
        total = sum(_layer_bytes(calibration, name) for name in calibration.layouts) // processes().world_size
        tqdm.write(
            f"Fisher blocks need {shown(total + WORKING_SET)} at once; {len(groups)} groups of layers fit {shown(budget)}",
            file=sys.stderr,
        )


def estimate_memory(calibration: Calibration, groups: Sequence[Calibration]) -> tuple[int, int]:
    """Bytes of all Fisher blocks of this process, and the peak beside the model, which one of ``groups`` reaches."""
    size, layouts, method = processes().world_size, calibration.layouts, calibration.method
    fisher = {name: _fisher_bytes(calibration, name) for name in layouts}
    if issubclass(method, SecondOrderMethod):
        peak = max(sum(_layer_bytes(group, name) for name in group.layouts) for group in groups) // size + WORKING_SET
    else:
        # Besides gradients: copies, scores, the order of a sort.
        rows = 16 + (calibration.slab if method.uses_gradients else 0)
        peak = sum(fisher[name] + _row_bytes(calibration, name) * rows for name in layouts) // size
    return sum(fisher.values()) // size, peak


def _layer_bytes(calibration: Calibration, name: str) -> int:
    """Fisher blocks, a slab of gradients, and what else is kept per weight (order, losses, weights, masks)."""
    return _row_bytes(calibration, name) * (calibration.layouts[name].block_size + calibration.slab + 8)


def _fisher_bytes(calibration: Calibration, name: str) -> int:
    layout, method = calibration.layouts[name], calibration.method
    blocks = layout.num_blocks if issubclass(method, SecondOrderMethod) else int(method.uses_gradients)
    return blocks * layout.block_size**2 * working_dtype(calibration.parameters[name]).itemsize


def _row_bytes(calibration: Calibration, name: str) -> int:
    """One number per weight of a layer."""
    layout = calibration.layouts[name]
    return layout.num_blocks * layout.block_size * working_dtype(calibration.parameters[name]).itemsize
