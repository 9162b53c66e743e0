"""``prune``: one calibration, a whole list of sparsities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.allocation import Score
from capruner.fisher import Solver
from capruner.gradients import GradientMode, LossFunction, calibrating, gradient_slabs
from capruner.layout import BlockLayout
from capruner.methods import METHODS, LayerSolution, Method, Settings, Stopwatch, Target
from capruner.result import Level, PruningResult
from capruner.selection import select_parameters, unwrap

Sparsity = float | Mapping[float, Sequence[str]]
Interpolation = Literal["linear", "cubic", "geometric"]

INTERPOLATIONS: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, t: start + (end - start) * t,
    "cubic": lambda start, end, t: end + (start - end) * (1 - t) ** 3,
    # The same share of what is left leaves at each step.
    "geometric": lambda start, end, t: 1 - (1 - start) * ((1 - end) / (1 - start)) ** t,
}


def prune(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]] | None,
    loss_fn: LossFunction = F.cross_entropy,
    sparsity: Sparsity | Sequence[float] = 0.5,
    *,
    method: str = "cap",
    params: str | Sequence[str] = "__ALL_PRUNABLE__",
    mask_type: str = "unstructured",
    global_sparsity: bool = True,
    num_grads: int = 4096,
    fisher_block_size: int = 192,
    damp: float = 1e-8,
    num_recomputations: int = 1,
    recomputation_inter_func: str = "linear",
    gradients: GradientMode = "batch",
    score: Score = "marginal",
    relative_damp: bool = False,
    solver: Solver = "auto",
    blocks_in_parallel: int | None = None,
    fisher_inv_device: str | None = None,
    masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
    progress: bool = True,
) -> PruningResult:
    """Find out which weights of ``model`` can go, and what the others become.

    The model itself is not changed: :meth:`PruningResult.apply` does that, for any sparsity of the list.

    Args:
        model: any module; its parameters' device is where the work happens.
        batches: ``(inputs, targets)`` pairs, a ``DataLoader`` say. ``None`` for ``method="magnitude"``. With ``num_recomputations > 1`` an iterable
            is started anew for every calibration, an iterator goes on.
        loss_fn: ``loss_fn(outputs, targets)``, the mean over a batch.
        sparsity: share of the selected weights to remove, in [0, 1); a list of them; or SparseML's dict ``{sparsity: [params]}``, which gives
            layers targets of their own (``params`` is not looked at then).
        method: ``"cap"``, ``"obs"`` (WoodFisher) or ``"magnitude"``.
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__`` (weights of Linear and convolutions).
        mask_type: ``"unstructured"``.
        global_sparsity: the target holds over all layers together; False: in each.
        num_grads: gradients to estimate the Fisher matrix from: batches, or samples with ``gradients="sample"``.
        fisher_block_size: weights per Fisher block ``B``; memory is ``weights · B · 4`` bytes.
        damp: ``λ`` added to the diagonal of the Fisher matrix, absolute (a squared gradient) unless ``relative_damp``.
        num_recomputations: climb to each sparsity in that many steps, each with a fresh calibration at the weights reached.
        recomputation_inter_func: how sparsity climbs over them: ``"linear"``, ``"cubic"``, ``"geometric"``.
        gradients: ``"batch"`` (one gradient from each batch) or ``"sample"``.
        score: ``"marginal"`` or ``"cumulative"``, see :mod:`capruner.allocation`.
        relative_damp: ``damp`` is a fraction of the mean diagonal of each block.
        solver: see :mod:`capruner.fisher`.
        blocks_in_parallel: blocks worked on at once; from the block size when None. No influence on the result.
        fisher_inv_device: where inverse Fisher blocks live, ``"cpu"`` say, when they do not fit beside the model.
        masks: what earlier pruning removed, ``{name: bool, True = stays}``, or ``"zeros"``: every weight that is exactly 0. Those stay removed.
        progress: show progress bars.

    Raises:
        ValueError: an argument, a parameter selection, or data that cannot be; the message says which and what to do.
        NotPositiveDefiniteError: a Fisher block will not factor; the message says where and what damping to try.
    """
    model = unwrap(model)
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if mask_type != "unstructured":
        raise ValueError(f"mask_type must be 'unstructured', got {mask_type!r}")
    if recomputation_inter_func not in INTERPOLATIONS:
        raise ValueError(
            f"recomputation_inter_func must be one of {sorted(INTERPOLATIONS)}, got {recomputation_inter_func!r}"
        )
    if num_recomputations < 1:
        raise ValueError(f"num_recomputations must be at least 1, got {num_recomputations}")
    if batches is None and METHODS[method].uses_gradients:
        raise ValueError(f"method {method!r} needs calibration data: give `batches`")
    settings = Settings(
        num_grads=num_grads,
        fisher_block_size=fisher_block_size,
        damp=float(damp),
        relative_damp=relative_damp,
        solver=solver,
        score=score,
        blocks_in_parallel=blocks_in_parallel,
        fisher_inv_device=fisher_inv_device,
    )
    parameters, rungs = _targets(model, params, sparsity, global_sparsity)
    layouts = {name: BlockLayout.of(p.shape, fisher_block_size) for name, p in parameters.items()}
    kept = _initial_masks(parameters, masks)
    clock = Stopwatch()

    def calibrated() -> Method:
        pruner = METHODS[method](layouts, settings, clock)
        if pruner.uses_gradients:
            assert batches is not None
            with calibrating(model):
                slabs = gradient_slabs(
                    model,
                    batches,
                    loss_fn,
                    parameters,
                    num_grads,
                    mode=gradients,
                    slab=_slab(layouts),
                    progress=progress,
                )
                while True:
                    with clock("gradients"):
                        slab = next(slabs, None)
                    if slab is None:
                        break
                    pruner.add(slab)
        dead = {n: layouts[n].to_blocks(~k, torch.bool) for n, k in kept.items()}
        weights = {
            n: layouts[n].to_blocks(p.detach(), _working_dtype(p)).masked_fill(dead[n], 0)
            for n, p in parameters.items()
        }
        pruner.prepare(weights, dead)
        return pruner

    levels: list[Level] = []
    if num_recomputations == 1:
        solutions = calibrated().solve([targets for _, targets in rungs])
        levels = [_level(s, solution, parameters, layouts) for (s, _), solution in zip(rungs, solutions)]
    else:
        climb = INTERPOLATIONS[recomputation_inter_func]
        with _weights_restored(parameters), torch.no_grad():
            for s, targets in rungs:
                starts = [_pruned_share(target.names, kept) for target in targets]
                for step in range(1, num_recomputations + 1):
                    t = step / num_recomputations
                    now = [Target(g.names, climb(start, g.sparsity, t)) for g, start in zip(targets, starts)]
                    level = _level(s, calibrated().solve([now])[0], parameters, layouts)
                    kept = dict(level.masks)
                    for name, p in parameters.items():
                        p.copy_(level.weights[name])
                levels.append(level)
    return PruningResult(
        method=method,
        levels=levels,
        total_weights=sum(p.numel() for p in model.parameters()),
        settings=asdict(settings)
        | {
            "num_recomputations": num_recomputations,
            "recomputation_inter_func": recomputation_inter_func,
            "gradients": gradients,
            "global_sparsity": global_sparsity,
            "mask_type": mask_type,
        },
        timings=clock.seconds,
    )


def _targets(
    model: nn.Module, params: str | Sequence[str], sparsity: Sparsity | Sequence[float], global_sparsity: bool
) -> tuple[dict[str, nn.Parameter], list[tuple[float, list[Target]]]]:
    """The parameters to prune, and per sparsity (ascending) its targets."""
    if isinstance(sparsity, Mapping):
        parameters: dict[str, nn.Parameter] = {}
        own: list[Target] = []
        for value, names in sparsity.items():
            selected = {n: p for n, p in select_parameters(model, names).items() if n not in parameters}
            parameters |= selected
            own += [Target((n,), _checked_sparsity(value)) for n in selected]
        overall = sum(t.sparsity * parameters[t.names[0]].numel() for t in own) / sum(
            p.numel() for p in parameters.values()
        )
        return parameters, [(overall, own)]
    parameters = select_parameters(model, params)
    listed = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
    if not listed:
        raise ValueError("the list of sparsities is empty; give at least one, 0.5 say")
    ascending = sorted({_checked_sparsity(s) for s in listed})
    groups = [tuple(parameters)] if global_sparsity else [(name,) for name in parameters]
    return parameters, [(s, [Target(group, s) for group in groups]) for s in ascending]


def _checked_sparsity(value: Any) -> float:
    value = float(value)
    if not 0 <= value < 1:
        raise ValueError(
            f"sparsity must lie in [0, 1), got {value:g}{': write 0.9 for 90 %' if 1 < value <= 100 else ''}"
        )
    return value


def _initial_masks(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor] | Literal["zeros"] | None
) -> dict[str, Tensor]:
    if masks == "zeros":
        return {name: p.detach() != 0 for name, p in parameters.items()}
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    if masks is None:
        return kept
    if isinstance(masks, str):
        raise ValueError(f"masks must be a dict of bool tensors, 'zeros' or None, got {masks!r}")
    for name, mask in masks.items():
        if name not in kept:
            raise ValueError(
                f"masks holds {name}, which is not among the selected parameters; select it too, or drop its mask"
            )
        if mask.shape != kept[name].shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(kept[name].shape)}"
            )
        kept[name] = mask.to(kept[name].device) != 0
    return kept


def _working_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _slab(layouts: Mapping[str, BlockLayout]) -> int:
    """Gradients per slab: enough for efficient matrix products, few enough to stay a small share of the ``d·B`` of the Fisher blocks."""
    return max(6, max(layout.block_size for layout in layouts.values()) // 12)


def _level(
    sparsity: float,
    solutions: Mapping[str, LayerSolution],
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, BlockLayout],
) -> Level:
    weights, masks, losses = {}, {}, {}
    for name, p in parameters.items():
        solution = solutions[name]
        masks[name] = layouts[name].from_blocks(solution.keep).to(p.device)
        weights[name] = layouts[name].from_blocks(solution.weight).to(p)
        if not torch.isfinite(weights[name]).all():
            raise ValueError(f"the pruned weights of {name} are not finite in {p.dtype}; raise damp")
        losses[name] = solution.loss
    return Level(sparsity, weights, masks, losses)


def _pruned_share(names: Sequence[str], kept: Mapping[str, Tensor]) -> float:
    return sum(int((~kept[n]).sum()) for n in names) / sum(kept[n].numel() for n in names)


@contextmanager
def _weights_restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """What is written into the parameters inside is undone at the end, also after an exception."""
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(saved[name])
