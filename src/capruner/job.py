"""A pruning job: arguments that were validated against the model, before any side effect. Shared by ``prune``, ``calibrate`` and ``plan``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from capruner.batches import Batches, BatchFunction
from capruner.calibration.driver import Calibration
from capruner.calibration.gradients import LossFunction
from capruner.calibration.labels import loss_of_model_labels
from capruner.calibration.memory_plan import log_groups, split_into_groups
from capruner.checkpoint import RunCheckpoint
from capruner.checks import check_arguments, check_finite
from capruner.config import PruneConfig, check_competition, resolve
from capruner.core.allocation import checked_costs
from capruner.distributed import agree
from capruner.files import digest
from capruner.identity import loss_digest, model_digest
from capruner.methods import Settings, SparsityLevel
from capruner.models.mask_types import supporting
from capruner.models.weights import left_dense, linear_weights, log_selection
from capruner.models.wrappers import by_first_name, unwrap
from capruner.refine.distill import of_logits
from capruner.refine.levels import Replay
from capruner.result import Level, PruningResult
from capruner.targets import Sparsity, check_not_below, initial_masks, selected, sparsity_levels


@dataclass(frozen=True)
class Job:
    """What to calibrate, and how.

    Attributes:
        model: without wrappers.
        batches: the data; None if there is none.
        parameters: ``{name: parameter}`` to prune.
        passed: reasons, by name, of parameters that are left dense and were warned about.
        dense: rows of the weights that are left dense.
        skipped: names of the parameters that do not support the mask type.
        settings: what the method reads of ``config``.
        masks: of earlier pruning, True = keep.
        own: with sparsities per layer, the target of each.
        levels: what to solve for; empty if that is decided later.
        total_weights: weights of the whole model.
    """

    config: PruneConfig
    model: nn.Module
    batches: Batches | None
    loss_fn: LossFunction
    parameters: dict[str, nn.Parameter]
    passed: Mapping[str, str]
    dense: list[dict[str, Any]]
    skipped: list[str]
    settings: Settings
    masks: dict[str, Tensor]
    own: dict[str, float] | None
    levels: list[SparsityLevel]
    total_weights: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Any] | None,
        loss_fn: LossFunction,
        sparsity: Sparsity | Sequence[float] | None = None,
        *,
        params: str | Sequence[str] = "__ALL_PRUNABLE__",
        masks: Mapping[str, Tensor] | Literal["zeros"] | None = None,
        state_dir: str | Path | None = None,
        batch_fn: BatchFunction | None = None,
        progress: bool = True,
        config: PruneConfig | None = None,
        without_data: bool = False,
        **knobs: Any,
    ) -> Job:
        """Validate the arguments of :func:`capruner.prune`, before any side effect; the ``ValueError`` says what is invalid.

        Args:
            sparsity: None: decided later.
            without_data: accept a missing ``batches``.
        """
        arguments = dict(locals())
        config = resolve(config, knobs)
        check_arguments(arguments | {"fisher_inv_device": config.fisher_inv_device})
        model = unwrap(model)
        check_finite(model)
        if batches is None and not without_data:
            _check_needs_no_data(config)
        if config.distill_passes and isinstance(batches, Iterator):
            batches = Replay(batches, batch_fn)
        needs_grad, pattern = config.kind.uses_gradients, config.pattern
        selection, own = selected(model, params, 0.0 if sparsity is None else sparsity, config.exclude, needs_grad)
        parameters, skipped = supporting(pattern, selection.parameters, config.skip_unsupported, linear_weights(model))
        costs = None if config.costs is None else checked_costs(by_first_name(model, config.costs, "costs"), parameters)
        if costs is not None:
            check_competition(config, per_layer=own is not None)
        job = cls(
            config,
            model,
            None if batches is None else Batches(batches, batch_fn),
            loss_fn,
            parameters,
            selection.passed,
            left_dense(model, parameters, selection.passed | dict.fromkeys(skipped, f"cannot hold {pattern}")),
            skipped,
            config.settings(costs),
            initial_masks(model, parameters, masks),
            own,
            [],
            sum(p.numel() for p in model.parameters()),
        )
        return job if sparsity is None else replace(job, levels=job.levels_at(sparsity, own))

    def levels_at(self, sparsity: Sparsity | Sequence[float], own: Mapping[str, float] | None) -> list[SparsityLevel]:
        """The levels of ``sparsity``, ascending; raise ``ValueError`` for one that is invalid or below what ``masks`` has pruned."""
        levels = sparsity_levels(self.parameters, own, sparsity, self.config.global_sparsity, self.config.pattern)
        check_not_below(levels[0].targets, self.masks, self.config.pattern)
        return levels

    def agree(
        self, levels: Sequence[SparsityLevel], own: Mapping[str, float] | None, state_dir: bool = False
    ) -> dict[str, Any]:
        """The arguments that decide the result, as JSON values; raise ``ValueError`` if the processes have different ones, or models."""
        arguments: dict[str, Any] = {name: getattr(self.config, name) for name in (*_REPORTED, *_DECIDING)}
        sparsities = [level.sparsity for level in levels] if own is None else own
        arguments |= {
            "memory_budget": self.config.budget,
            "sparsity": sparsities,
            **deciding(self.settings, self.masks),
        }
        presence = {"params": list(self.parameters), "batches": self.batches is not None, "state_dir": state_dir}
        agree(arguments | presence, self.model)
        return arguments

    def start(self, progress: bool, state_dir: str | Path | None = None) -> Calibration:
        """Log what is pruned, open the checkpoint in ``state_dir``, and return the calibration; raise ``ValueError`` if processes disagree."""
        arguments, config = self.agree(self.levels, self.own, state_dir is not None), self.config
        log_selection(self.model, self.parameters, self.dense, self.passed)
        loss_fn = loss_of_model_labels(self.loss_fn) if config.labels == "model" else self.loss_fn
        if config.distill_passes:
            loss_fn = of_logits(loss_fn)  # other outputs are refused at the first batch, and not after the calibration
        calibration = Calibration(
            self.model,
            Batches(()) if self.batches is None else self.batches,
            loss_fn,
            self.parameters,
            self.settings,
            config.kind,
            config.gradients,
            config.labels,
            config.on_bad_batch,
            config.mode,
            progress,
        )
        log_groups(calibration, split_into_groups(calibration, config.budget), config.budget)
        if state_dir is not None:
            identity, notes, clock = self._identity(arguments), calibration.notes, calibration.clock
            calibration.checkpoint = RunCheckpoint(state_dir, identity, notes, clock)
        return calibration

    def _identity(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint of this job is recognised by."""
        model, batch_fn = self.model, None if self.batches is None else self.batches.batch_fn
        tensors = (part for named in (*model.named_parameters(), *model.named_buffers()) for part in named)
        return {
            **arguments,
            "loss": loss_digest(self.loss_fn),
            "batch_fn": None if batch_fn is None else loss_digest(batch_fn),
            "parameters": {name: [str(p.dtype), *p.shape] for name, p in self.parameters.items()},
            "weights": digest(tensors),
            "model": model_digest(model),
        }

    def result(self, levels: list[Level], calibration: Calibration) -> PruningResult:
        """The result, with the settings that it was calibrated with."""
        config = self.config
        settings = asdict(self.settings) | {"pattern": str(config.pattern)}
        settings |= {name: getattr(config, name) for name in _REPORTED} | {
            "skipped": self.skipped,
            "distill_passes": config.distill_passes,
            "left_dense": self.dense,
            "block_sizes": {name: layout.block_size for name, layout in calibration.layouts.items()},
        }
        settings |= calibration.notes.state_dict()
        return PruningResult(config.method, levels, self.total_weights, settings, dict(calibration.clock.seconds))


_REPORTED = ("num_recomputations", "recomputation_inter_func", "gradients", "labels", "global_sparsity")
_DECIDING = ("method", "on_bad_batch", "mode", "distill_passes")
"""Knobs that decide the result, and are not among the method's settings."""


def _check_needs_no_data(config: PruneConfig) -> None:
    if config.kind.uses_gradients:
        raise ValueError(f"method {config.method!r} needs calibration data: give `batches`")
    if config.distill_passes:
        raise ValueError(f"distill_passes={config.distill_passes:g} needs data: give `batches`")


def deciding(settings: Settings, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings that decide the result, as JSON values, and a digest of the masks."""
    others = ("blocks_in_parallel", "fisher_inv_device", "pattern")
    found = {key: value for key, value in asdict(settings).items() if key not in others}
    dense = all(mask.all() for mask in masks.values())
    return found | {"pattern": str(settings.pattern), "masks": None if dense else digest(masks.values())}
