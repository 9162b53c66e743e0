"""The modifiers, as recipes name them."""

from __future__ import annotations

from typing import Any

from sparseml.pytorch.sparsification.modifier import PyTorchModifierYAML

from capruner.sparseml.base import CorrelationAwareModifier, flag, none_or, recipe_parameter, whole


def _blocks(value: Any) -> int | None:
    """-1 is how public recipes say "all at once"; the engine chooses then."""
    return None if value is None or whole(value) == -1 else whole(value)


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
    |       damp: 1.0e-8
    |       fisher_block_size: 192

    Needs ``grad_sampler={"data_loader_builder": f, "loss_function": g}`` in the manager's ``modify()`` or ``apply()``.

    Args:
        params: parameter or module names, ``re:`` patterns, ``__ALL__``, ``__ALL_PRUNABLE__``; ``[]`` when ``final_sparsity`` is a dict.
        init_sparsity: sparsity at ``start_epoch``, or ``__FROM_PARAM__``.
        final_sparsity: sparsity at ``end_epoch``, or a dict ``{sparsity: [params]}`` (with ``global_sparsity: False``).
        start_epoch, end_epoch, update_frequency, inter_func, leave_enabled: SparseML's schedule.
        global_sparsity: one target over all layers; False: each layer its own.
        mask_type: ``unstructured``.
        num_grads: gradients per calibration.
        damp: ``λ`` on the diagonal of the Fisher matrix; absolute unless ``relative_damp``.
        fisher_block_size: weights per Fisher block. Any size: blocks are padded, never snapped to a divisor.
        num_recomputations: fresh calibrations within one update.
        recomputation_inter_func: how sparsity climbs over them: linear, cubic, geometric.
        grad_sampler_kwargs: handed to the ``data_loader_builder``.
        blocks_in_parallel: blocks worked on at once; -1: chosen. No influence on the result.
        fisher_inv_device: where inverse Fisher blocks live, ``cpu`` say.
        traces_backup_dir: kept so that public recipes load. The published code stored weight traces of (B + 1) · d floats there; here weights for
            any mask come from a closed form, so there are no traces and nothing is written.
        gradients: ``batch`` or ``sample``.
        score: ``marginal`` or ``cumulative``.
        relative_damp: ``damp`` is a fraction of the mean diagonal of each block.
    """

    method = "cap"
    _recipe = {  # noqa: RUF012 (typed in the base class)
        "mask_type": str,
        "num_grads": whole,
        "damp": float,
        "fisher_block_size": whole,
        "num_recomputations": whole,
        "recomputation_inter_func": str,
        "blocks_in_parallel": _blocks,
        "fisher_inv_device": none_or(str),
        "gradients": str,
        "score": str,
        "relative_damp": flag,
    }

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
        mask_type: str = "unstructured",
        num_grads: int = 1024,
        damp: float = 1e-7,
        fisher_block_size: int = 50,
        grad_sampler_kwargs: dict[str, Any] | None = None,
        num_recomputations: int = 1,
        recomputation_inter_func: str = "linear",
        blocks_in_parallel: int | None = None,
        fisher_inv_device: str | None = None,
        traces_backup_dir: str | None = None,
        gradients: str = "batch",
        score: str = "marginal",
        relative_damp: bool = False,
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
            mask_type=mask_type,
            num_grads=num_grads,
            damp=damp,
            fisher_block_size=fisher_block_size,
            num_recomputations=num_recomputations,
            recomputation_inter_func=recomputation_inter_func,
            blocks_in_parallel=blocks_in_parallel,
            fisher_inv_device=fisher_inv_device,
            gradients=gradients,
            score=score,
            relative_damp=relative_damp,
        )

    mask_type = recipe_parameter("mask_type", "Pattern of the zeros.")
    num_grads = recipe_parameter("num_grads", "Gradients per calibration.")
    damp = recipe_parameter("damp", "Damping of the Fisher matrix.")
    fisher_block_size = recipe_parameter("fisher_block_size", "Weights per Fisher block.")
    grad_sampler_kwargs = recipe_parameter("grad_sampler_kwargs", "Handed to the data_loader_builder.")
    num_recomputations = recipe_parameter("num_recomputations", "Fresh calibrations within one update.")
    recomputation_inter_func = recipe_parameter("recomputation_inter_func", "How sparsity climbs over recomputations.")
    blocks_in_parallel = recipe_parameter("blocks_in_parallel", "Blocks worked on at once; null: chosen.")
    fisher_inv_device = recipe_parameter("fisher_inv_device", "Where inverse Fisher blocks live.")
    traces_backup_dir = recipe_parameter("traces_backup_dir", "Accepted; there are no traces to back up.")
    gradients = recipe_parameter("gradients", "One gradient per batch or per sample.")
    score = recipe_parameter("score", "Marginal or cumulative losses compete.")
    relative_damp = recipe_parameter("relative_damp", "damp is a fraction of each block's mean diagonal.")
