"""A pruning job: arguments that were checked against the model, before the first side effect. What ``prune``, ``calibrate`` and ``plan`` share."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from capruner.agreement import agree
from capruner.allocation import checked_costs
from capruner.batches import Batches, BatchFunction
from capruner.calibration import Calibration
from capruner.checks import check_arguments, check_finite
from capruner.config import PruneConfig, check_competition
from capruner.gradients import LossFunction
from capruner.identity import loss_digest
from capruner.labels import Chances, loss_of_model_labels
from capruner.methods import Settings, Target
from capruner.patterns import supporting
from capruner.refine.distill import of_logits
from capruner.refine.levels import Distiller, Replay
from capruner.result import Level, PruningResult
from capruner.resume import fingerprint, knobs, recall
from capruner.state import State
from capruner.targets import Sparsity, check_not_below, initial_masks, rungs_of, selected
from capruner.weights import left_dense, linear_weights, log_selection
from capruner.wrappers import by_first_name, unwrap


@dataclass(frozen=True)
class Job:
    """What to calibrate, and how.

    Attributes:
        model: not wrapped.
        data: None for methods without gradients.
        parameters: ``{name: parameter}`` to prune.
        passed: names of those that are left dense with a warning already given.
        dense: rows of the weights that are left dense.
        skipped: names of those that cannot hold the mask type.
        settings: what the method reads of ``config``.
        kept: masks of earlier pruning, True = remains.
        own: with sparsities per layer, the target of each.
        total_weights: weights of the whole model.
    """

    config: PruneConfig
    model: nn.Module
    data: Batches | None
    loss_fn: LossFunction
    parameters: dict[str, nn.Parameter]
    passed: Mapping[str, str]
    dense: list[dict[str, Any]]
    skipped: list[str]
    settings: Settings
    kept: dict[str, Tensor]
    own: dict[str, float] | None
    total_weights: int

    @classmethod
    def of(
        cls,
        config: PruneConfig,
        model: nn.Module,
        batches: Iterable[Any] | None,
        loss_fn: LossFunction,
        params: str | Sequence[str],
        masks: Mapping[str, Tensor] | Literal["zeros"] | None,
        batch_fn: BatchFunction | None,
        sparsity: Sparsity | Sequence[float] | None = None,
        without_data: bool = False,
        **others: Any,
    ) -> Job:
        """Check arguments, see :func:`capruner.prune`.

        Args:
            sparsity: None: what remains open until later.
            without_data: accept that there are no batches where gradients are needed.
            others: arguments that are checked only.

        Raises:
            ValueError: an invalid argument, parameter selection or model.
        """
        check_arguments(
            {
                "model": model,
                "batches": batches,
                "loss_fn": loss_fn,
                "params": params,
                "masks": masks,
                "batch_fn": batch_fn,
            }
            | {"sparsity": sparsity, "fisher_inv_device": config.fisher_inv_device}
            | others
        )
        model = unwrap(model)
        check_finite(model)
        if batches is None and not without_data:
            if config.kind.uses_gradients:
                raise ValueError(f"method {config.method!r} needs calibration data: give `batches`")
            if config.distill_passes:
                raise ValueError(f"distill_passes={config.distill_passes:g} needs data: give `batches`")
        if config.distill_passes and isinstance(batches, Iterator):
            batches = Replay(batches, batch_fn)
        draw = Chances() if config.labels == "model" else None
        selection, own = selected(
            model, params, 0.0 if sparsity is None else sparsity, config.exclude, config.kind.uses_gradients
        )
        pattern = config.pattern
        parameters, skipped = supporting(pattern, selection.parameters, config.skip_unsupported, linear_weights(model))
        dense = left_dense(model, parameters, selection.passed | dict.fromkeys(skipped, f"cannot hold {pattern}"))
        costs = None
        if config.costs is not None:
            costs = checked_costs(by_first_name(model, config.costs, "costs"), parameters)
            check_competition(config, per_layer=own is not None)
        return cls(
            config,
            model,
            None if batches is None else Batches(batches, batch_fn, draw),
            loss_fn,
            parameters,
            selection.passed,
            dense,
            skipped,
            config.settings(costs),
            initial_masks(model, parameters, masks),
            own,
            sum(p.numel() for p in model.parameters()),
        )

    def rungs(
        self, sparsity: Sparsity | Sequence[float], own: Mapping[str, float] | None
    ) -> list[tuple[float, list[Target]]]:
        """Per sparsity, ascending, its targets.

        Raises:
            ValueError: a sparsity that is invalid, or below what earlier pruning has reached.
        """
        rungs = rungs_of(self.parameters, own, sparsity, self.config.global_sparsity, self.config.pattern)
        check_not_below(rungs[0][1], self.kept, self.config.pattern)
        return rungs

    def agreed(self, sparsities: Any, with_state: bool = False) -> dict[str, Any]:
        """The arguments that decide the result, as JSON values, the same on all processes.

        Raises:
            ValueError: the processes were called with different arguments or models.
        """
        same = (
            *("method", "num_recomputations", "recomputation_inter_func", "gradients", "labels", "on_bad_batch"),
            *("distill_passes", "global_sparsity"),
        )
        arguments: dict[str, Any] = {name: getattr(self.config, name) for name in same}
        arguments |= {"memory_budget": self.config.budget, "sparsity": sparsities, **knobs(self.settings, self.kept)}
        given = {"params": list(self.parameters), "batches": self.data is not None, "state_dir": with_state}
        agree(arguments | given, self.model)
        return arguments

    def state(self, folder: str | Path, arguments: Mapping[str, Any]) -> State:
        """The state folder of this job, opened."""
        batch_fn = None if self.data is None else self.data.batch_fn
        code = {
            "loss": loss_digest(self.loss_fn),
            "batch_fn": None if batch_fn is None else loss_digest(batch_fn),
        }
        return State(folder, {**arguments, **code, **fingerprint(self.model, self.parameters)})

    def calibration(self, progress: bool, state: State | None = None) -> Calibration:
        """The calibration that does the work, brought to where ``state`` was left. Logs what is pruned and what is not."""
        log_selection(self.model, self.parameters, self.dense, self.passed)
        loss_fn = loss_of_model_labels(self.loss_fn) if self.config.labels == "model" else self.loss_fn
        if self.config.distill_passes:
            loss_fn = of_logits(loss_fn)  # refused at the first batch, and not after the calibration
        calibration = Calibration(
            self.model,
            self.data,
            loss_fn,
            self.parameters,
            self.settings,
            self.config.gradients,
            progress,
            self.config.budget,
            self.config.on_bad_batch,
            state,
        )
        if state is not None:
            recall(state, calibration.notes, calibration.clock.seconds)
        return calibration

    def refined(self, levels: list[Level], calibration: Calibration) -> tuple[list[Level], list[dict[str, Any]]]:
        """The levels after distillation, and what the report says of it; the levels themselves without ``distill_passes``."""
        passes = self.config.distill_passes
        if not passes or self.data is None:
            return levels, []
        skip_bad = self.config.on_bad_batch == "skip"
        state, clock, progress = calibration.state, calibration.clock, calibration.progress
        distiller = Distiller(self.model, self.data, passes, skip_bad, state, clock, progress)
        return [distiller(level) for level in levels], distiller.notes

    def result(
        self, levels: list[Level], calibration: Calibration, distilled: Sequence[dict[str, Any]] = ()
    ) -> PruningResult:
        """The result, with the settings that it was calibrated with."""
        config = self.config
        same = ("num_recomputations", "recomputation_inter_func", "gradients", "labels", "global_sparsity")
        return PruningResult(
            method=config.method,
            levels=levels,
            total_weights=self.total_weights,
            settings=asdict(self.settings)
            | {"pattern": str(config.pattern), **{name: getattr(config, name) for name in same}}
            | {
                "skipped": self.skipped,
                "distill_passes": config.distill_passes,
                "distill": list(distilled),
                "left_dense": self.dense,
                "block_sizes": {name: layout.block_size for name, layout in calibration.layouts.items()},
                **copy.deepcopy(calibration.notes),
            },
            timings=dict(calibration.clock.seconds),
        )
