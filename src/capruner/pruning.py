"""``prune``: plan, calibrate, solve, refine, result. ``calibrate`` stops halfway, so that any sparsity can be solved for later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from capruner.batches import Batches, BatchFunction, default_loss
from capruner.calibrated import CalibratedModel
from capruner.calibration.driver import Calibration
from capruner.calibration.gradients import LossFunction
from capruner.calibration.levels import calibrate_levels
from capruner.calibration.memory_plan import split_into_groups
from capruner.checks import check_arguments, check_masks, check_sparsity
from capruner.config import Knobs, PruneConfig, resolve
from capruner.distributed import agree, agreeing
from capruner.job import Job, deciding
from capruner.keywords import takes_knobs
from capruner.methods import OBS, SparsityLevel
from capruner.models.selection import select_parameters
from capruner.models.wrappers import unwrap
from capruner.recomputation import recompute_levels
from capruner.refine.levels import refine_levels
from capruner.result import Level, PruningResult
from capruner.rows import zero_share
from capruner.targets import Sparsity, initial_masks


@agreeing
@takes_knobs()
def prune(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss_fn: LossFunction = default_loss,
    sparsity: Sparsity | Sequence[float] = 0.5,
    *,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
    state_dir: str | Path | None = None,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
    config: PruneConfig | None = None,
    **knobs: Unpack[Knobs],
) -> PruningResult:
    """Compute masks and re-fitted weights for ``model`` at one or more sparsities.

    The model is not changed: :meth:`PruningResult.apply` writes the weights of any sparsity of the list into it.

    Args:
        model: any module; computations run on the device of its parameters.
        batches: any iterable of ``(inputs, targets)``, such as a ``DataLoader``. A batch that is a mapping (a dict, Hugging Face's ``BatchEncoding`` or
            ``BatchFeature``) is passed to the model as keywords. Each calibration iterates over it, again if it ends before ``num_grads``; an iterator
            continues. ``None`` for ``method="magnitude"``.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over a batch; ``loss_fn(outputs, batch)`` if the batch is a mapping. Default: cross-entropy
            of the outputs or of their ``logits``; if the batch is a mapping, the output's own ``loss``.
        sparsity: fraction of the selected weights to prune, in [0, 1); a list of them; or SparseML's dict ``{sparsity: [params]}``, which sets per-layer
            targets and overrides ``params``; the first matching entry wins.
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``: the weights of all Linear, convolution, attention and
            recurrent layers, see :func:`capruner.models.selection.select`. If gradients are needed, frozen parameters are left out with a warning.
        masks: masks of earlier pruning, ``{name: bool, True = keep}``, or ``"zeros"``: every weight that is exactly 0 is pruned already. Pruned weights remain
            pruned.
        state_dir: a folder for checkpoints. After an interruption the same call with the same data in the same order resumes: it computes no gradient
            twice, and its result is bit-identical (on a CPU). Saved about every two minutes and after each calibration; takes up to twice the bytes of
            the Fisher blocks. :func:`capruner.remove_state` deletes it once the result is saved.
        batch_fn: turns a batch of any other kind into ``(inputs, targets)``.
        progress: show progress bars.
        config: all knobs as one object; keywords win over it.
        knobs: the fields of :class:`capruner.PruneConfig`, as keywords.

    Raises:
        ValueError: an invalid argument, parameter selection, batch or checkpoint; the message says which and what to do.
        NotPositiveDefiniteError: a Fisher block is not positive definite; the message says where and what damping to try.
    """
    check_sparsity(sparsity)
    job = Job.of(
        model,
        batches,
        loss_fn,
        sparsity,
        params=params,
        masks=masks,
        state_dir=state_dir,
        batch_fn=batch_fn,
        progress=progress,
        config=resolve(config, knobs),
    )
    calibration = job.start(progress, state_dir)
    levels = solve_levels(job, calibration)
    levels = refine_levels(calibration, levels, job.config.distill_passes)
    calibration.checkpoint.close()
    return job.result(levels, calibration)


def solve_levels(job: Job, calibration: Calibration) -> list[Level]:
    """Calibrate and solve for the levels of ``job``: all at once, or with recomputations one after the other."""
    config = job.config

    def calibrate(masks: Mapping[str, Tensor], levels: Sequence[SparsityLevel]) -> list[Level]:
        return calibrate_levels(calibration, masks, levels, config.budget)

    if config.num_recomputations == 1:
        return calibrate(job.masks, job.levels)
    steps, interpolation = config.num_recomputations, config.recomputation_inter_func
    return recompute_levels(job.model, job.parameters, job.masks, job.levels, steps, interpolation, calibrate)


@agreeing
@takes_knobs()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss_fn: LossFunction = default_loss,
    *,
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
    config: PruneConfig | None = None,
    **knobs: Unpack[Knobs],
) -> CalibratedModel:
    """Compute the expensive half of :func:`prune`: gradients, Fisher matrix and elimination. Any sparsity is then cheap.

    The model is not changed, and may be used, pruned or trained before :meth:`CalibratedModel.solve` is called: the calibration holds what it needs, about
    the memory of the Fisher blocks, until it is deleted.

    Args:
        model, batches, loss_fn, params, masks, batch_fn, progress, config, knobs: see :func:`prune`.

    Raises:
        ValueError: as :func:`prune`; and for ``num_recomputations`` above 1, ``distill_passes``, or a ``memory_budget`` that needs several groups of layers.
        NotPositiveDefiniteError: a Fisher block is not positive definite.
    """
    config = resolve(config, knobs)
    if config.num_recomputations > 1:
        raise ValueError(
            f"num_recomputations={config.num_recomputations} calibrates again on the way to each sparsity, so that one calibration does not serve any "
            "sparsity; call prune() with the sparsities, or calibrate() with num_recomputations=1"
        )
    if config.distill_passes:
        raise ValueError(
            f"distill_passes={config.distill_passes:g} trains each sparsity on data; call prune() with the sparsities, or apply a solved result and call "
            "capruner.distill"
        )
    job = Job.of(
        model, batches, loss_fn, params=params, masks=masks, batch_fn=batch_fn, progress=progress, config=config
    )
    calibration = job.start(progress)
    groups = split_into_groups(calibration, config.budget)
    if len(groups) > 1:
        raise ValueError(
            f"memory_budget={config.memory_budget} calibrates the layers in {len(groups)} groups, and calibrate() holds all of them at once; call prune() "
            "with the sparsities instead, allow more memory, or use a smaller fisher_block_size or method='fast_cap'"
        )
    return CalibratedModel(job, calibration, calibration.run(job.masks, calibration.stream()))


@agreeing
@takes_knobs(
    *("num_grads", "fisher_block_size", "damp", "shrinkage", "gradients", "relative_damp", "solver"),
    *("blocks_in_parallel", "fisher_inv_device"),
)
def compensate_masks(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    masks: Mapping[str, Tensor],
    *,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
    **knobs: Unpack[Knobs],
) -> PruningResult:
    """Compute the exact OBS weights for masks of any origin: another pruner, NVIDIA's tools, or hand-made.

    Args:
        masks: ``{parameter name: tensor}``, True or non-zero = keep. Parameters without a mask are not changed.
        model, batches, loss_fn, batch_fn, progress: see :func:`prune`.
        knobs: those of the Fisher blocks and gradients.

    Returns:
        A result with one level; ``result.apply(model)`` needs no sparsity.

    Raises:
        ValueError: as :func:`prune`; a mask that names no parameter, or has the wrong shape.
    """
    config = resolve(None, {**knobs, "method": "obs"})
    check_arguments(locals() | {"fisher_inv_device": config.fisher_inv_device})
    check_masks(masks)
    model = unwrap(model)
    parameters = select_parameters(model, list(masks))
    keep = initial_masks(model, parameters, masks)
    settings = config.settings(shrinks=True)
    agree({"gradients": config.gradients, "params": list(parameters), **deciding(settings, keep)}, model)
    data = Batches(batches, batch_fn)
    calibration = Calibration(model, data, loss_fn, parameters, settings, OBS, config.gradients, progress=progress)
    dense = {name: torch.ones_like(mask) for name, mask in keep.items()}
    calibrated = calibration.run(dense, calibration.stream())
    pruner, layouts = calibrated.pruner, calibration.layouts
    assert isinstance(pruner, OBS)
    blocks = {n: layouts[n].to_blocks(~k, torch.bool)[pruner.partition.own(n)] for n, k in keep.items()}
    level = calibrated.level(zero_share(keep.values()), pruner.solve_masks(blocks))
    return PruningResult(
        method="masks",
        levels=[level],
        total_weights=sum(p.numel() for p in model.parameters()),
        settings=asdict(settings)
        | {"pattern": "given", "gradients": config.gradients, **calibration.notes.state_dict()},
        timings=calibration.clock.seconds,
    )
