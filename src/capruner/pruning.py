"""``prune``: one calibration, a whole list of sparsities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from capruner.agreement import agree, agreeing
from capruner.allocation import Score, checked_costs
from capruner.batches import Batches, BatchFunction, default_loss
from capruner.calibration import Calibration
from capruner.checks import check_arguments, check_finite, check_masks
from capruner.fisher import Solver
from capruner.gradients import GradientMode, LossFunction, OnBadBatch
from capruner.identity import loss_digest
from capruner.labels import Chances, loss_of_model_labels
from capruner.memory import parse_bytes
from capruner.methods import METHODS, OBS, MethodName, Settings, Target
from capruner.modes import weights_restored
from capruner.patterns import parse_mask_type, supporting
from capruner.refine.distill import of_logits
from capruner.refine.levels import Distiller, Replay
from capruner.result import Level, PruningResult
from capruner.resume import fingerprint, knobs, recall
from capruner.selection import select_parameters
from capruner.state import State
from capruner.targets import Sparsity, check_not_below, initial_masks, pruned_share, rungs_of, selected
from capruner.weights import left_dense, linear_weights, log_selection
from capruner.wrappers import by_first_name, unwrap

Interpolation = Literal["linear", "cubic", "geometric"]

INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, t: start + (end - start) * t,
    "cubic": lambda start, end, t: end + (start - end) * (1 - t) ** 3,
    # The same share of what is left leaves at each step.
    "geometric": lambda start, end, t: 1 - (1 - start) ** (1 - t) * (1 - end) ** t,
}


@dataclass(frozen=True)
class Work:
    """What a call of :func:`prune` is going to do: its arguments, checked and resolved.

    Attributes:
        model: without wrappers.
        passed: parameters that were not selected, with the reasons that there was a warning about.
        dense: rows about what is not pruned, see :func:`capruner.weights.left_dense`.
        groups: with a dict of sparsities, the target of each parameter.
        rungs: per sparsity, ascending, its targets.
        kept: masks of what earlier pruning has left.
    """

    model: nn.Module
    data: Batches | None
    budget: int | None
    parameters: Mapping[str, nn.Parameter]
    passed: Mapping[str, str]
    skipped: list[str]
    dense: list[dict[str, Any]]
    settings: Settings
    groups: Mapping[str, float] | None
    rungs: list[tuple[float, list[Target]]]
    kept: Mapping[str, Tensor]


def checked(arguments: Mapping[str, Any]) -> Work:
    """Check everything about a call of :func:`prune` that can be checked before any data is drawn.

    Args:
        arguments: all of them, by name.

    Raises:
        ValueError: as :func:`prune`.
    """
    check_arguments(arguments)
    a = SimpleNamespace(**arguments)
    model = unwrap(a.model)
    check_finite(model)
    if a.method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {a.method!r}")
    if a.recomputation_inter_func not in INTERPOLATIONS:
        raise ValueError(
            f"recomputation_inter_func must be one of {sorted(INTERPOLATIONS)}, got {a.recomputation_inter_func!r}"
        )
    for name, words in (("gradients", GradientMode), ("on_bad_batch", OnBadBatch), ("solver", Solver)):
        if arguments[name] not in get_args(words):
            raise ValueError(f"{name} must be one of {get_args(words)}, got {arguments[name]!r}")
    if a.batches is None and METHODS[a.method].uses_gradients:
        raise ValueError(f"method {a.method!r} needs calibration data: give `batches`")
    if a.shrinkage is not None and not METHODS[a.method].competing:
        raise ValueError(f"shrinkage is for the Fisher blocks of method cap or obs, got method={a.method!r}")
    if a.labels not in ("data", "model"):
        raise ValueError(f"labels must be 'data' or 'model', got {a.labels!r}")
    if a.batches is None and a.distill_passes:
        raise ValueError(f"distill_passes={a.distill_passes:g} needs data: give `batches`")
    if a.distill_passes and isinstance(a.batches, Iterator):
        a.batches = Replay(a.batches, a.batch_fn)
    data = None if a.batches is None else Batches(a.batches, a.batch_fn, Chances() if a.labels == "model" else None)
    pattern = parse_mask_type(a.mask_type)
    budget = None if a.memory_budget is None else parse_bytes(a.memory_budget)
    for what, size in (("fisher_block_size", a.fisher_block_size), ("block_size", a.block_size)):
        if isinstance(size, int) and size > 0 and size % pattern.group:
            raise ValueError(f"{what} must be a multiple of {pattern.group} for mask_type {pattern}, got {size}")
    selection, groups = selected(model, a.params, a.sparsity, a.exclude, METHODS[a.method].uses_gradients)
    parameters, skipped = supporting(pattern, selection.parameters, a.skip_unsupported, linear_weights(model))
    dense = left_dense(model, parameters, selection.passed | dict.fromkeys(skipped, f"cannot hold {pattern}"))
    if a.costs is not None:
        a.costs = by_first_name(model, a.costs, "costs") if isinstance(a.costs, Mapping) else a.costs
        a.costs = checked_costs(a.costs, parameters)
        if not a.global_sparsity or groups is not None or pattern.n_m is not None or not METHODS[a.method].competing:
            raise ValueError(
                "costs say how layers compete for one target over all of them: they need global_sparsity=True, no sparsities per layer, no N:M mask "
                f"type, and method cap or obs (got global_sparsity={a.global_sparsity}, mask_type={pattern}, method={a.method!r})"
            )
    settings = Settings(
        num_grads=a.num_grads,
        fisher_block_size=a.fisher_block_size,
        damp=METHODS[a.method].default_damp if a.damp is None else float(a.damp),
        relative_damp=a.relative_damp or a.damp is None,
        shrinkage=0.0 if a.shrinkage is None and not (METHODS[a.method].shrinks and a.damp is None) else a.shrinkage,
        solver=a.solver,
        score=a.score,
        blocks_in_parallel=a.blocks_in_parallel,
        fisher_inv_device=a.fisher_inv_device,
        block_size=a.block_size,
        costs=a.costs,
        pattern=pattern,
    )
    rungs = rungs_of(parameters, groups, a.sparsity, a.global_sparsity, pattern)
    kept = initial_masks(model, parameters, a.masks)
    check_not_below(rungs[0][1], kept, pattern)
    if a.num_recomputations > 1 and pattern.n_m is not None:
        raise ValueError(
            f"mask_type {pattern} is reached in one step; num_recomputations must be 1, got {a.num_recomputations}"
        )
    return Work(model, data, budget, parameters, selection.passed, skipped, dense, settings, groups, rungs, kept)


@agreeing
def prune(
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss_fn: LossFunction = default_loss,
    sparsity: Sparsity | Sequence[float] = 0.5,
    *,
    method: MethodName = "cap",
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    exclude: str | Sequence[str] = (),
    mask_type: str | int = "unstructured",
    global_sparsity: bool = True,
    num_grads: int = 4096,
    fisher_block_size: int | None = None,
    damp: float | None = None,
    shrinkage: float | None = None,
    num_recomputations: int = 1,
    recomputation_inter_func: Interpolation = "linear",
    distill_passes: float = 0,
    gradients: GradientMode = "batch",
    labels: Literal["data", "model"] = "data",
    score: Score = "marginal",
    costs: Mapping[str, float] | None = None,
    relative_damp: bool = False,
    solver: Solver = "auto",
    blocks_in_parallel: int | None = None,
    fisher_inv_device: str | None = None,
    block_size: int | None = None,
    skip_unsupported: bool = False,
    memory_budget: str | int | None = None,
    masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
    on_bad_batch: OnBadBatch = "raise",
    state_dir: str | Path | None = None,
    batch_fn: BatchFunction | None = None,
    progress: bool = True,
) -> PruningResult:
    """Find out which weights of ``model`` can go, and what the others become.

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
        method: ``"cap"``, ``"fast_cap"``, and what to compare with: ``"obs"`` (WoodFisher), ``"magnitude"``.
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``: the weights of all Linear, convolution, attention and
            recurrent layers, see :func:`capruner.selection.select`. Frozen ones are passed over, with a warning, where gradients are needed.
        exclude: names of parameters or modules, or ``re:`` patterns, that stay dense. ``result.settings["left_dense"]`` lists all weights of two or
            more dimensions that do, with the reason.
        mask_type: ``"unstructured"``, ``"2:4"`` (2 of 4 stay) or any other N:M, ``"block4"``; see :mod:`capruner.patterns`.
        global_sparsity: the target holds over all layers together; False: in each.
        num_grads: gradients to estimate the Fisher matrix from: batches, or samples with ``gradients="sample"``.
        fisher_block_size: weights per Fisher block ``B``; memory is ``weights · B · 4`` bytes. None: in each layer the largest size that cuts its rows
            evenly, up to 192, or up to 512 as long as 4 GiB hold all blocks; see :func:`capruner.layout.fitting`.
        damp: ``λ`` added to the diagonal of the Fisher matrix, absolute (a squared gradient) unless ``relative_damp``; always
            relative to the mean diagonal for ``fast_cap``. None: the method's default, relative, 0.01, and 0.5 for ``fast_cap``.
        shrinkage: share of the layer's common Fisher matrix in each block, from 0 (the empirical Fisher matrix as it is) to 1. None: for ``cap`` with
            ``damp=None`` estimated from the noise of the gradients, near 0.5 for few gradients and near 0 for many, see :mod:`capruner.shrinkage`;
            0 for ``obs`` and where ``damp`` is given. ``result.settings["shrinkage_by_layer"]`` has the shares.
        num_recomputations: climb to each sparsity in that many steps, each with a fresh calibration at the weights reached.
        recomputation_inter_func: how sparsity climbs over them: ``"linear"``, ``"cubic"``, ``"geometric"``.
        distill_passes: train each level towards the outputs of the dense network, for so many passes (a fraction is fine) over the first 4,096 samples of
            ``batches``, which are held in memory; see :func:`capruner.distill`. Masks do not change. For every method, and models that return logits.
            ``result.settings["distill"]`` has the divergence before and after; predicted losses are those before it. 0: off.
        gradients: ``"batch"`` (one gradient from each batch) or ``"sample"``.
        labels: ``"data"`` takes the targets of the batches; ``"model"`` the model's own softmax, see :mod:`capruner.labels`: then the data needs no labels
            (anything may stand in their place), and few images say more. For losses of logits and int64 labels.
        score: ``"marginal"`` or ``"cumulative"``, see :mod:`capruner.allocation`.
        costs: ``{parameter name: cost of one of its weights}``; weights then leave by loss per cost instead of loss.
            ``capruner.multiply_adds(model, input_size).per_weight(model)`` makes a network with fewer multiply-adds at the same accuracy (and more weights).
        relative_damp: ``damp`` is a fraction of the mean diagonal of each block.
        solver: see :mod:`capruner.fisher`.
        blocks_in_parallel: blocks worked on at once; from the block size when None. No influence on the result.
        fisher_inv_device: where inverse Fisher blocks live, ``"cpu"`` say, when they do not fit beside the model.
        block_size: ``fast_cap`` only: columns per mask decision; all of a block when None.
        skip_unsupported: leave parameters dense that cannot hold the mask type (``result.settings["skipped"]`` names them) instead of raising.
        memory_budget: bytes, or ``"8GiB"``, that Fisher blocks and gradients of one process may take. Layers are then calibrated in groups that
            fit, one pass over ``batches`` for each group, two with a target over all layers. ``batches`` has to be an iterable that can be
            started anew, best with the same data each time. What it will be is printed before anything is allocated.
        masks: what earlier pruning removed, ``{name: bool, True = stays}``, or ``"zeros"``: every weight that is exactly 0. Those stay removed.
        on_bad_batch: what happens to a batch whose data, loss or gradient holds NaN or Inf: ``"raise"``, or ``"skip"``: another one is drawn
            instead (with ``gradients="sample"`` only the bad samples are left out); ``result.settings["skipped_batches"]`` counts them. When most
            batches are bad, that is an error too.
        state_dir: a folder for what is needed to go on after a kill: the same call with the same data in the same order then draws no gradient
            twice, and ends with the same bits (on a CPU). Saved every two minutes or so, and after each calibration. Up to twice the bytes of the
            Fisher blocks. It stays after the end, so that nothing is lost before the result is safe: :func:`capruner.remove_state` deletes it.
        batch_fn: turns a batch of any other kind into ``(inputs, targets)``.
        progress: show progress bars.

    Raises:
        ValueError: an argument, a parameter selection, data, or a state folder that cannot be; the message says which and what to do.
        NotPositiveDefiniteError: a Fisher block will not factor; the message says where and what damping to try.
    """
    work = checked(locals())
    model, data, parameters, settings = work.model, work.data, work.parameters, work.settings
    rungs, kept = work.rungs, dict(work.kept)
    log_selection(model, parameters, work.dense, work.passed)
    arguments: dict[str, Any] = {
        "method": method,
        "num_recomputations": num_recomputations,
        "recomputation_inter_func": recomputation_inter_func,
        "gradients": gradients,
        "labels": labels,
        "memory_budget": work.budget,
        "on_bad_batch": on_bad_batch,
        "distill_passes": distill_passes,
        "global_sparsity": global_sparsity,
        "sparsity": [s for s, _ in rungs] if work.groups is None else work.groups,
        **knobs(settings, kept),
    }
    given = {"params": list(parameters), "batches": batches is not None, "state_dir": state_dir is not None}
    agree(arguments | given, model)
    state = None
    if state_dir is not None:
        code = {"loss": loss_digest(loss_fn), "batch_fn": None if batch_fn is None else loss_digest(batch_fn)}
        state = State(state_dir, arguments | code | fingerprint(model, parameters))
    if labels == "model":
        loss_fn = loss_of_model_labels(loss_fn)
    if distill_passes:
        loss_fn = of_logits(loss_fn)  # refused at the first batch, and not after the calibration
    calibration = Calibration(
        model, data, loss_fn, parameters, settings, gradients, progress, work.budget, on_bad_batch, state
    )
    if state is not None:
        recall(state, calibration.notes, calibration.clock.seconds)
    levels: list[Level] = []
    if num_recomputations == 1:
        levels = calibration.levels(METHODS[method], kept, rungs)
    else:
        climb = INTERPOLATIONS[recomputation_inter_func]
        with weights_restored(model), torch.no_grad():
            for s, targets in rungs:
                starts = [pruned_share(target.names, kept) for target in targets]
                losses = dict.fromkeys(parameters, 0.0)
                for step in range(1, num_recomputations + 1):
                    now = [
                        # The last step takes the target itself: interpolation can miss it by a rounding error, and the count by one weight.
                        replace(g, sparsity=climb(start, g.sparsity, step / num_recomputations))
                        if step < num_recomputations
                        else g
                        for g, start in zip(targets, starts)
                    ]
                    level = calibration.levels(METHODS[method], kept, [(s, now)])[0]
                    kept = dict(level.masks)
                    losses = {name: losses[name] + loss for name, loss in level.losses.items()}
                    for name, p in parameters.items():
                        p.copy_(level.weights[name])
                levels.append(replace(level, losses=losses))
    notes: list[dict[str, Any]] = []
    if distill_passes and data is not None:
        distiller = Distiller(model, data, distill_passes, on_bad_batch == "skip", state, calibration.clock, progress)
        levels, notes = [distiller(level) for level in levels], distiller.notes
    if state is not None:
        state.close()
    return PruningResult(
        method=method,
        levels=levels,
        total_weights=sum(p.numel() for p in model.parameters()),
        settings=asdict(settings)
        | {
            "pattern": str(settings.pattern),
            "num_recomputations": num_recomputations,
            "recomputation_inter_func": recomputation_inter_func,
            "gradients": gradients,
            "labels": labels,
            "global_sparsity": global_sparsity,
            "skipped": work.skipped,
            "distill_passes": distill_passes,
            "distill": notes,
            "left_dense": work.dense,
            **calibration.notes,
        },
        timings=calibration.clock.seconds,
    )


@agreeing
def compensate_masks(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFunction,
    masks: Mapping[str, Tensor],
    *,
    num_grads: int = 4096,
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
    model = unwrap(model)
    parameters = select_parameters(model, list(masks))
    kept = initial_masks(model, parameters, masks)
    settings = Settings(
        num_grads=num_grads,
        fisher_block_size=fisher_block_size,
        damp=OBS.default_damp if damp is None else float(damp),
        relative_damp=relative_damp or damp is None,
        shrinkage=0.0 if shrinkage is None and damp is not None else shrinkage,
        solver=solver,
        blocks_in_parallel=blocks_in_parallel,
        fisher_inv_device=fisher_inv_device,
    )
    agree({"gradients": gradients, "params": list(parameters), **knobs(settings, kept)}, model)
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
