"""``prune``: plan, calibrate, solve, refine, result. ``calibrate`` stops half-way, so that any number of sparsities can be solved for later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from capruner.agreement import agree, agreeing
from capruner.batches import Batches, BatchFunction, default_loss
from capruner.calibrated import CalibratedModel
from capruner.calibration import Calibration
from capruner.checks import check_arguments, check_masks, check_sparsity
from capruner.config import Knobs, PruneConfig, resolve
from capruner.fisher import Solver
from capruner.gradients import GradientMode, LossFunction
from capruner.job import Job
from capruner.keywords import takes_knobs
from capruner.methods import OBS
from capruner.recomputation import recomputed_levels
from capruner.result import PruningResult
from capruner.resume import knobs as deciding
from capruner.selection import select_parameters
from capruner.targets import Sparsity, initial_masks, pruned_share
from capruner.wrappers import unwrap


@takes_knobs
def checked(
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
) -> Job:
    """Check everything about a call of :func:`prune`, whose arguments these are, that can be checked before any data is drawn.

    Raises:
        ValueError: as :func:`prune`.
    """
    config = resolve(config, knobs)
    check_sparsity(sparsity)
    job = Job.of(
        config, model, batches, loss_fn, params, masks, batch_fn, sparsity, state_dir=state_dir, progress=progress
    )
    job.rungs(sparsity, job.own)
    return job


@agreeing
@takes_knobs
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

    The model itself is not changed: :meth:`PruningResult.apply` does that, for any sparsity of the list.

    Args:
        model: any module; its parameters' device is where the work happens.
        batches: any iterable of ``(inputs, targets)``, such as a ``DataLoader``. A batch that is a mapping (a dict, Hugging Face's ``BatchEncoding`` or
            ``BatchFeature``) goes into the model as keywords. An iterable that ends before ``num_grads`` is started again, and it is started again
            for every calibration; an iterator continues. ``None`` for ``method="magnitude"``.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over a batch; ``loss_fn(outputs, batch)`` where the batch is a mapping. Default: cross-entropy
            of the outputs or of their ``logits``; where the batch is a mapping, the output's own ``loss``.
        sparsity: share of the selected weights to remove, in [0, 1); a list of them; or SparseML's dict ``{sparsity: [params]}``, which gives
            layers targets of their own (``params`` is not looked at then); of two entries with the same parameter the first counts.
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``: the weights of all Linear, convolution, attention and
            recurrent layers, see :func:`capruner.selection.select`. Frozen ones are passed over, with a warning, where gradients are needed.
        masks: what earlier pruning removed, ``{name: bool, True = stays}``, or ``"zeros"``: every weight that is exactly 0. Those stay removed.
        state_dir: a folder for what is needed to go on after a kill: the same call with the same data in the same order then draws no gradient
            twice, and ends with the same bits (on a CPU). Saved every two minutes or so, and after each calibration. Up to twice the bytes of the
            Fisher blocks. It stays after the end, so that nothing is lost before the result is safe: :func:`capruner.remove_state` deletes it.
        batch_fn: turns a batch of any other kind into ``(inputs, targets)``.
        progress: show progress bars.
        config: all knobs as one object; keywords win over it.
        knobs: the fields of :class:`capruner.PruneConfig`, as keywords.

    Raises:
        ValueError: an argument, a parameter selection, data, or a state folder that cannot be; the message says which and what to do.
        NotPositiveDefiniteError: a Fisher block will not factor; the message says where and what damping to try.
    """
    job = checked(
        model,
        batches,
        loss_fn,
        sparsity,
        params=params,
        masks=masks,
        state_dir=state_dir,
        batch_fn=batch_fn,
        progress=progress,
        config=config,
        **knobs,
    )
    rungs, config = job.rungs(sparsity, job.own), job.config
    arguments = job.agreed([s for s, _ in rungs] if job.own is None else job.own, with_state=state_dir is not None)
    state = None if state_dir is None else job.state(state_dir, arguments)
    calibration = job.calibration(progress, state)
    if config.num_recomputations == 1:
        levels = calibration.levels(config.kind, job.kept, rungs)
    else:
        steps, interpolation = config.num_recomputations, config.recomputation_inter_func
        levels = recomputed_levels(calibration, config.kind, job.kept, rungs, steps, interpolation)
    levels, distilled = job.refined(levels, calibration)
    if state is not None:
        state.close()
    return job.result(levels, calibration, distilled)


@agreeing
@takes_knobs
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
    """Do the expensive half of :func:`prune`: gradients, Fisher matrix and elimination. Any sparsity is then cheap.

    The model is not changed, and it may be used, pruned or trained before :meth:`CalibratedModel.solve` is called: the calibration holds what it needs, which
    is about the memory of the Fisher blocks, until it is deleted.

    Args:
        model, batches, loss_fn, params, masks, batch_fn, progress, config, knobs: see :func:`prune`.

    Raises:
        ValueError: as :func:`prune`; and for what one calibration of the dense model cannot hold: ``num_recomputations`` above 1, ``distill_passes``, a
            ``memory_budget`` that needs several groups of layers.
        NotPositiveDefiniteError: a Fisher block will not factor.
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
    job = Job.of(config, model, batches, loss_fn, params, masks, batch_fn, progress=progress)
    job.agreed(None)
    calibration = job.calibration(progress)
    return CalibratedModel(job, calibration, calibration.whole_run(config.kind, job.kept))


@agreeing
def compensate_masks(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    masks: Mapping[str, Tensor],
    *,
    num_grads: int = PruneConfig.num_grads,
    fisher_block_size: int | None = None,
    damp: float | None = None,
    shrinkage: float | None = None,
    gradients: GradientMode = "batch",
    relative_damp: bool = False,
    solver: Solver = "auto",
    blocks_in_parallel: int | None = None,
    fisher_inv_device: str | None = None,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
) -> PruningResult:
    """The exact OBS weights for masks from anywhere: another pruner's, NVIDIA's, hand-made.

    Args:
        masks: ``{parameter name: tensor}``, True or non-zero = stays. Parameters without a mask are left alone.
        model, batches, loss_fn, num_grads, ...: see :func:`prune`.

    Returns:
        A result with one level; ``result.apply(model)`` needs no sparsity.

    Raises:
        ValueError: as :func:`prune`; a mask that names no parameter or has another shape.
    """
    check_arguments(locals())
    check_masks(masks)
    config = PruneConfig(
        method="obs",
        num_grads=num_grads,
        fisher_block_size=fisher_block_size,
        damp=damp,
        shrinkage=shrinkage,
        gradients=gradients,
        relative_damp=relative_damp,
        solver=solver,
        blocks_in_parallel=blocks_in_parallel,
        fisher_inv_device=fisher_inv_device,
    )
    model = unwrap(model)
    parameters = select_parameters(model, list(masks))
    kept = initial_masks(model, parameters, masks)
    settings = config.settings(shrinks=True)
    agree({"gradients": gradients, "params": list(parameters), **deciding(settings, kept)}, model)
    data = Batches(batches, batch_fn)
    calibration = Calibration(model, data, loss_fn, parameters, settings, gradients, progress)
    # OBS keeps the inverses; the masks come to the solver as an order whose prefix is what leaves.
    nothing_yet = {name: torch.ones_like(mask) for name, mask in kept.items()}
    pruner = calibration.run(OBS, nothing_yet)
    assert isinstance(pruner, OBS)
    gone = {n: calibration.layouts[n].to_blocks(~k, torch.bool)[pruner.shards.own(n)] for n, k in kept.items()}
    level = calibration.level(pruner.shards, pruned_share(tuple(kept), kept), pruner.solve_masks(gone))
    return PruningResult(
        method="masks",
        levels=[level],
        total_weights=sum(p.numel() for p in model.parameters()),
        settings=asdict(settings) | {"pattern": "given", "gradients": gradients, **calibration.notes},
        timings=calibration.clock.seconds,
    )
