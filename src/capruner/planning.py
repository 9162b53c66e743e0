"""``plan``: what a calibration would do, need and take, before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from capruner.batches import BatchFunction, default_loss
from capruner.calibration.driver import Calibration
from capruner.calibration.enough import EXPECTED
from capruner.calibration.gradients import LossFunction, gradient_slabs
from capruner.calibration.memory_plan import estimate_memory, split_into_groups
from capruner.config import Knobs, PruneConfig, resolve
from capruner.core.blocks import BlockLayout
from capruner.core.memory import shown
from capruner.core.numerics import working_dtype
from capruner.distributed import Partition, agreeing, processes
from capruner.job import Job
from capruner.keywords import takes_knobs
from capruner.methods import Stopwatch, Target
from capruner.models.modes import eval_mode, random_state_kept
from capruner.text import text_table

FEW, MANY = 32, 256
"""Blocks of a size that are timed together, in two runs: from the difference follows what a layer takes beside its blocks."""

ROOM = 2**27
"""Bytes of Fisher blocks in the longer run: of large ones there are fewer."""


@dataclass(frozen=True)
class Plan:
    """What a calibration would do. ``print(plan)`` shows it as a table.

    Attributes:
        layers: rows of what is pruned: ``name, shape, numel, block_size``.
        left_dense: rows of the other weights of two or more dimensions: ``name, shape, numel, reason``.
        memory: bytes of one process beside the model: ``fisher_blocks``, of all layers; ``peak``, with gradients and working memory, and with the largest
            group of layers where a memory budget cuts them into groups; ``groups`` of layers.
        seconds: an estimate: gradients and blocks that were timed, scaled up. Of one sparsity, without distillation. None without ``batches``.
        total_weights: weights of the whole model.
        config: the knobs.
    """

    layers: list[dict[str, Any]]
    left_dense: list[dict[str, Any]]
    memory: dict[str, int]
    seconds: float | None
    total_weights: int
    config: PruneConfig

    def __str__(self) -> str:
        pruned = sum(row["numel"] for row in self.layers)
        lines = [
            f"{self.config.method}, {self.config.pattern}: {len(self.layers)} layers with {pruned:,} of {self.total_weights:,} weights",
            "",
            *_table(self.layers, "block_size"),
        ]
        if self.left_dense:
            lines += ["", "left dense", *_table(self.left_dense, "reason")]
        fisher, peak = (shown(self.memory[what], up=True) for what in ("fisher_blocks", "peak"))
        groups = f", {self.memory['groups']} groups of layers" if self.memory["groups"] > 1 else ""
        lines += [
            "",
            f"memory   {fisher} for Fisher blocks, {peak} at the peak{groups} (beside the model)",
            "time     " + ("not measured: pass batches" if self.seconds is None else self._time()),
        ]
        return "\n".join(lines)

    def _time(self) -> str:
        assert self.seconds is not None
        minutes = f" ({self.seconds / 60:.0f} minutes)" if self.seconds >= 120 else ""
        count = f" and {EXPECTED} gradients" if self.config.num_grads == "auto" else ""
        return f"about {self.seconds:.2g} s{minutes}, estimated from one gradient and up to {MANY} blocks of each size{count}"


@agreeing
@takes_knobs()
def plan(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: LossFunction = default_loss,
    *,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
    batch_fn: BatchFunction | None = None,
    config: PruneConfig | None = None,
    **knobs: Unpack[Knobs],
) -> Plan:
    """Show what :func:`capruner.prune` would prune with these arguments, and estimate memory and time. Nothing is changed.

    Args:
        model, batches, loss_fn, params, masks, batch_fn, config, knobs: see :func:`capruner.prune`. With ``batches`` the first two are drawn to measure a
            gradient; the state of the random number generators is restored. An iterator would lose them and is refused.

    Raises:
        ValueError: as :func:`capruner.prune`; ``batches`` is an iterator.
    """
    config = resolve(config, knobs)
    if isinstance(batches, Iterator):
        raise ValueError(
            "batches is an iterator, which would lose what plan() draws; pass a DataLoader or a list, or leave batches out"
        )
    job = Job.of(
        model, batches, loss_fn, params=params, masks=masks, batch_fn=batch_fn, config=config, without_data=True
    )
    calibration = job.start(progress=False)
    groups = split_into_groups(calibration, config.budget)
    layers = [
        {"name": name, "shape": list(p.shape), "numel": p.numel(), "block_size": calibration.layouts[name].block_size}
        for name, p in job.parameters.items()
    ]
    fisher, peak = estimate_memory(calibration, groups)
    memory = {"fisher_blocks": fisher, "peak": peak, "groups": len(groups)}
    seconds = None if batches is None else _seconds(job, calibration, len(groups))
    return Plan(layers, job.dense, memory, seconds, job.total_weights, config)


def _seconds(job: Job, calibration: Calibration, groups: int) -> float:
    """An estimate of the time of one sparsity."""
    passes = groups * (2 if groups > 1 and job.config.global_sparsity else 1)
    seconds = 0.0
    with random_state_kept():
        if job.config.kind.uses_gradients:
            seconds += calibration.expected_gradients() * _seconds_of_gradient(calibration) / processes().world_size
        sizes: dict[tuple[int, torch.dtype], list[int]] = {}
        for name, p in job.parameters.items():
            layout = calibration.layouts[name]
            sizes.setdefault((layout.block_size, working_dtype(p)), []).append(layout.num_blocks)
        for (size, dtype), blocks in sizes.items():
            room = ROOM // (size * size * dtype.itemsize)
            few = max(1, min(FEW, sum(blocks), room // 2))
            many = max(2 * few, min(MANY, room))
            # Each layer takes some time, and each of its blocks.
            one = _seconds_of_blocks(calibration, job, size, dtype, few)
            more = max(0.0, (_seconds_of_blocks(calibration, job, size, dtype, many) - one) / (many - few))
            seconds += len(blocks) * max(0.0, one - few * more) + sum(blocks) * more
    return seconds * passes * job.config.num_recomputations


def _seconds_of_gradient(calibration: Calibration) -> float:
    """Of the second slab: the first one starts workers, compiles and warms up."""
    slab = 1 if calibration.gradients == "batch" else calibration.slab
    with eval_mode(calibration.model, calibration.mode):
        slabs = gradient_slabs(
            calibration.model,
            calibration.stream(),
            calibration.loss_fn,
            calibration.parameters,
            2 * slab,
            mode=calibration.gradients,
            slab=slab,
            on_bad_batch=calibration.on_bad_batch,
            progress=False,
        )
        next(slabs)
        clock = Stopwatch()
        with clock("gradients"):
            rows = next(slabs)
        del slabs
    everybody = processes()
    return everybody.sum(clock.seconds["gradients"]) / everybody.world_size / len(next(iter(rows.values())))


def _seconds_of_blocks(calibration: Calibration, job: Job, size: int, dtype: torch.dtype, some: int) -> float:
    """Fisher matrix, inverse, elimination and compensation of ``some`` blocks of random gradients and weights; the mean over processes."""
    layout = BlockLayout((some, size), size)
    name, device = "a block", next(iter(job.parameters.values())).device
    method, num_grads = job.config.kind, calibration.expected_gradients()
    settings = replace(job.settings, num_grads=num_grads, costs=None, damp=0.5, relative_damp=True)
    partition = Partition({name: layout}, method.whole_layers)
    weights = torch.randn(partition.count(name), size, dtype=dtype, device=device)
    pattern = job.config.pattern
    target = Target((name,), layout.numel, 0.5 if pattern.sparsity is None else pattern.sparsity)
    gradients = weights.new_empty(calibration.slab, *weights.shape).normal_()
    runs = []
    for _ in range(2):  # the first one compiles and warms up
        pruner, clock = method(partition, settings, Stopwatch()), Stopwatch()
        with clock("blocks"):
            for start in range(0, num_grads if method.uses_gradients else 0, calibration.slab):
                pruner.add({name: gradients[: num_grads - start]})
            pruner.prepare({name: weights.clone()})
            pruner.solve([[target]])
        runs.append(clock.seconds["blocks"])
    return partition.processes.sum(min(runs)) / partition.processes.world_size


def _table(rows: Sequence[Mapping[str, Any]], last: str) -> list[str]:
    """Lines of ``name, shape, numel`` and one more column."""
    cells = [[row["name"], "x".join(map(str, row["shape"])), f"{row['numel']:,}", str(row[last])] for row in rows]
    return text_table(["name", "shape", "weights", last.replace("_", " ")], cells, left=(0, 1, 3)).splitlines()
