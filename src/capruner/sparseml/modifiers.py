"""The modifiers, as recipes name them."""

from __future__ import annotations

from typing import Any

from sparseml.pytorch.sparsification.modifier import PyTorchModifierYAML

from capruner.config import PruneConfig
from capruner.patterns import parse_mask_type
from capruner.recipes import values
from capruner.sparseml.base import CorrelationAwareModifier, recipe_parameter


@PyTorchModifierYAML()
class CAPruningModifier(CorrelationAwareModifier):
    """CAP, the Correlation-Aware Pruner (arXiv 2210.09223), in one shot or gradually.

    | Sample yaml:
    |   !CAPruningModifier
    |       params: __ALL_PRUNABLE__
    |       init_sparsity: 0.5
    |       final_sparsity: 0.9
    |       start_epoch: 0.0
    |       end_epoch: 80.0
    |       update_frequency: 20.0
    |       num_grads: 4096
    |       fisher_block_size: 192

    Needs ``grad_sampler={"data_loader_builder": f, "loss_function": g}`` in the manager's ``modify()`` or ``apply()``.

    Args:
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``; ``[]`` when ``final_sparsity`` is a dict.
        init_sparsity: sparsity at ``start_epoch``, or ``__FROM_PARAM__``.
        final_sparsity: sparsity at ``end_epoch``, or a dict ``{sparsity: [params]}`` (with ``global_sparsity: False``).
        start_epoch, end_epoch, update_frequency, inter_func, leave_enabled: SparseML's schedule.
        global_sparsity: one target over all layers; False: each layer its own.
        mask_type: ``unstructured``, ``block4``, ``2:4`` or any N:M (N of M stay), quoted or not; ``N:M`` takes its numbers from ``n`` and ``m``.
        n, m: for ``mask_type: N:M``; saved as part of ``mask_type``.
        num_grads: gradients per calibration.
        damp: ``λ`` on the diagonal of the Fisher matrix; absolute unless ``relative_damp``. null: relative, 0.01, which suits any scale of gradients.
        shrinkage: share of the layer's common Fisher matrix in each block; null: estimated where ``damp`` is null, else 0. See ``shrinkage`` of
            :func:`capruner.prune`.
        fisher_block_size: weights per Fisher block. Any size: blocks are padded, never snapped to a divisor. null: in each layer the largest that
            cuts its rows evenly, up to 192, or up to 512 as long as 4 GiB hold all blocks.
        num_recomputations: fresh calibrations within one update.
        recomputation_inter_func: how sparsity climbs over them: linear, cubic, geometric.
        distill_passes: after each pruning train the network towards its outputs before the update, for so many passes over the first 4,096 samples; see
            ``distill_passes`` of :func:`capruner.prune`.
        grad_sampler_kwargs: handed to the ``data_loader_builder``.
        blocks_in_parallel: blocks worked on at once; -1: chosen. No influence on the result.
        fisher_inv_device: where inverse Fisher blocks live, ``cpu`` say.
        traces_backup_dir: the state folder of a calibration: a run that was killed goes on from there, see ``state_dir`` of
            :func:`capruner.prune`. (The published code stored weight traces of (B + 1) · d floats there; here weights come from a closed form.)
        on_bad_batch: ``raise``, or ``skip``: leave out batches that hold NaN or Inf, and count them.
        gradients: ``batch`` or ``sample``.
        labels: ``data``, or ``model``: drawn from the model's own softmax.
        score: ``marginal`` or ``cumulative``.
        relative_damp: ``damp`` is a fraction of the mean diagonal of each block.
        skip_unsupported: leave parameters dense that cannot hold the mask type, instead of raising.
        memory_budget: ``8GiB``, say: calibrate layers in groups whose Fisher blocks fit, with a pass over the data (two, if global) for each group.
    """

    method = "cap"
    _recipe = values.CAP

    def __init__(
        self,
        params: str | list[str],
        init_sparsity: float | str,
        final_sparsity: float | dict[float, list[str]],
        start_epoch: float,
        end_epoch: float,
        update_frequency: float,
        leave_enabled: bool = True,
        inter_func: str = "cubic",
        global_sparsity: bool = True,
        mask_type: str | int = "unstructured",
        num_grads: int = PruneConfig.num_grads,
        damp: float | None = None,
        shrinkage: float | None = None,
        fisher_block_size: int | None = None,
        grad_sampler_kwargs: dict[str, Any] | None = None,
        num_recomputations: int = 1,
        recomputation_inter_func: str = "linear",
        distill_passes: float = 0.0,
        blocks_in_parallel: int | None = None,
        fisher_inv_device: str | None = None,
        traces_backup_dir: str | None = None,
        gradients: str = "batch",
        labels: str = "data",
        score: str = "marginal",
        relative_damp: bool = False,
        skip_unsupported: bool = False,
        on_bad_batch: str = "raise",
        memory_budget: str | int | None = None,
        n: int | None = None,
        m: int | None = None,
    ) -> None:
        super().__init__(
            params=params,
            init_sparsity=init_sparsity,
            final_sparsity=final_sparsity,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            update_frequency=update_frequency,
            inter_func=inter_func,
            leave_enabled=leave_enabled,
            global_sparsity=global_sparsity,
            grad_sampler_kwargs=grad_sampler_kwargs,
            traces_backup_dir=traces_backup_dir,
            mask_type=parse_mask_type(mask_type, n, m),
            num_grads=num_grads,
            damp=damp,
            shrinkage=shrinkage,
            fisher_block_size=fisher_block_size,
            num_recomputations=num_recomputations,
            recomputation_inter_func=recomputation_inter_func,
            distill_passes=distill_passes,
            blocks_in_parallel=blocks_in_parallel,
            fisher_inv_device=fisher_inv_device,
            gradients=gradients,
            labels=labels,
            score=score,
            relative_damp=relative_damp,
            skip_unsupported=skip_unsupported,
            on_bad_batch=on_bad_batch,
            memory_budget=memory_budget,
        )

    blocks_in_parallel = recipe_parameter("blocks_in_parallel", "Blocks worked on at once; null: chosen.")
    shrinkage = recipe_parameter("shrinkage", "Share of the layer's common Fisher matrix in each block.")
    score = recipe_parameter("score", "Marginal or cumulative losses compete.")
    relative_damp = recipe_parameter("relative_damp", "damp is a fraction of each block's mean diagonal.")
    memory_budget = recipe_parameter(
        "memory_budget", "Memory for Fisher blocks; layers are calibrated in groups that fit."
    )


@PyTorchModifierYAML()
class FastCAPruningModifier(CorrelationAwareModifier):
    """FastCAP: one Fisher matrix per layer, for models whose Fisher blocks do not fit or when minutes matter.

    | Sample yaml:
    |   !FastCAPruningModifier
    |       params: __ALL_PRUNABLE__
    |       init_sparsity: 0.4
    |       final_sparsity: 0.9
    |       start_epoch: 0.0
    |       end_epoch: 8.0
    |       update_frequency: 2.0
    |       num_grads: 128
    |       damp: 0.5
    |       fisher_block_size: 192

    Args as :class:`CAPruningModifier`, but:
        global_sparsity: False, as published: each layer has the same target. True: one target over all layers, shared out by one threshold.
        damp: relative to the mean diagonal of each layer's Fisher matrix.
        block_size: columns per mask decision; null: all of a block.
    """

    method = "fast_cap"
    _recipe = values.FAST_CAP

    def __init__(
        self,
        params: str | list[str],
        init_sparsity: float | str,
        final_sparsity: float | dict[float, list[str]],
        start_epoch: float,
        end_epoch: float,
        update_frequency: float,
        leave_enabled: bool = True,
        inter_func: str = "cubic",
        global_sparsity: bool = False,
        mask_type: str | int = "unstructured",
        num_grads: int = PruneConfig.num_grads,
        damp: float = 0.5,
        fisher_block_size: int | None = None,
        block_size: int | None = None,
        grad_sampler_kwargs: dict[str, Any] | None = None,
        num_recomputations: int = 1,
        recomputation_inter_func: str = "linear",
        distill_passes: float = 0.0,
        fisher_inv_device: str | None = None,
        traces_backup_dir: str | None = None,
        gradients: str = "batch",
        labels: str = "data",
        skip_unsupported: bool = False,
        on_bad_batch: str = "raise",
        n: int | None = None,
        m: int | None = None,
    ) -> None:
        super().__init__(
            params=params,
            init_sparsity=init_sparsity,
            final_sparsity=final_sparsity,
            start_epoch=start_epoch,
            end_epoch=end_epoch,
            update_frequency=update_frequency,
            inter_func=inter_func,
            leave_enabled=leave_enabled,
            global_sparsity=global_sparsity,
            grad_sampler_kwargs=grad_sampler_kwargs,
            traces_backup_dir=traces_backup_dir,
            mask_type=parse_mask_type(mask_type, n, m),
            num_grads=num_grads,
            damp=damp,
            fisher_block_size=fisher_block_size,
            block_size=block_size,
            num_recomputations=num_recomputations,
            recomputation_inter_func=recomputation_inter_func,
            distill_passes=distill_passes,
            fisher_inv_device=fisher_inv_device,
            gradients=gradients,
            labels=labels,
            skip_unsupported=skip_unsupported,
            on_bad_batch=on_bad_batch,
        )

    block_size = recipe_parameter("block_size", "Columns per mask decision; null: all of a block.")
