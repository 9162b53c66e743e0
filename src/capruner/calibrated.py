"""The result of :func:`capruner.calibrate`: solves for any sparsity, and searches for the largest that a metric allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from capruner.calibration.driver import Calibrated, Calibration
from capruner.checks import check_function, check_number, check_sparsity, is_number, show
from capruner.config import check_competition
from capruner.distributed import agreeing
from capruner.job import Job
from capruner.models.modes import eval_mode, weights_restored
from capruner.models.wrappers import first_names
from capruner.result import PruningResult
from capruner.rows import zero_share
from capruner.targets import Sparsity, selected

Metric = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Sparsest:
    """What :meth:`CalibratedModel.sparsest` finds.

    Attributes:
        sparsity: the largest sparsity found whose metric is within bounds.
        value: its metric.
        dense: the metric of the dense model.
        result: with that one level; ``result.apply(model)`` needs no sparsity.
        curve: ``(sparsity, value)`` of every sparsity tried, ascending.
    """

    sparsity: float
    value: float
    dense: float
    result: PruningResult
    curve: list[tuple[float, float]]


class CalibratedModel:
    """One calibration that solves for any sparsity.

    It holds the inverse Fisher blocks, the order of elimination and a copy of the weights that were calibrated, so the model may change.
    With several processes all of them call the same methods with the same arguments.

    Args:
        job: the arguments of :func:`capruner.calibrate`.
        calibration: of all layers.
        calibrated: its outcome.
    """

    def __init__(self, job: Job, calibration: Calibration, calibrated: Calibrated) -> None:
        # Copies: results have the device and dtype of these, whatever happens to the model.
        self._dense = {n: p.detach().clone() for n, p in job.parameters.items()}
        self._job, self._calibration = job, calibration
        self._calibrated = replace(calibrated, parameters=self._dense)
        self._processes = calibrated.pruner.processes
        self._seconds = dict(calibration.clock.seconds)

    @agreeing
    def solve(self, sparsity: Sparsity | Sequence[float]) -> PruningResult:
        """Masks and re-fitted weights at one or more sparsities, as :func:`capruner.prune` would compute them.

        Args:
            sparsity: a number in [0, 1), a list of them, or ``{sparsity: [params]}`` with an entry for every parameter that was calibrated.

        Raises:
            ValueError: an invalid sparsity, or one below what ``masks`` has pruned already.
        """
        check_sparsity(sparsity)
        own = self._own(sparsity) if isinstance(sparsity, Mapping) else None
        levels = self._job.levels_at(sparsity, own)
        self._job.agree(levels, own)
        self._calibration.clock.seconds = dict(self._seconds)
        return self._job.result(self._calibrated.solve(levels), self._calibration)

    def sparsest(
        self, metric: Metric, within: float = 1.0, *, low: float = 0.0, high: float = 0.99, tolerance: float = 0.005
    ) -> Sparsest:
        """Search for the largest sparsity whose metric is at least that of the dense model minus ``within``.

        This is a bisection, so the metric should fall as sparsity rises. Where it does not (a noisy metric, few validation samples), the sparsity found still
        meets the bound, but a larger one may meet it too; ``curve`` has all values.

        Args:
            metric: ``metric(model) -> float``, higher is better, finite. It is called with the model itself, in eval mode and without gradients, with the
                weights of each sparsity in place; weights, buffers and modes are restored afterwards. Everything else of the model (biases, BatchNorm
                statistics) is as it is now. On several processes the mean of their values counts.
            within: how far the metric may fall, in its own unit.
            low, high: bounds of the search. ``low`` rises to what ``masks`` has pruned already.
            tolerance: stop when the bounds are that close.

        Raises:
            ValueError: an invalid argument, a metric that is not a finite number, or one that is out of bounds even at ``low``.
        """
        start = self._check_search(metric, within, low, high, tolerance)
        dense = self._measured(metric, self._dense, "the dense model")
        curve: list[tuple[float, float]] = []
        best: tuple[float, float, PruningResult] | None = None

        def meets(sparsity: float) -> bool:
            nonlocal best
            result = self.solve(sparsity)
            value = self._measured(metric, result.level().weights, f"sparsity {sparsity:g}")
            curve.append((sparsity, value))
            if good := value >= dense - within:
                best = sparsity, value, result
            bar.set_postfix_str(f"{sparsity:.3f}: {value:.4g}, dense {dense:.4g}")
            bar.update()
            return good

        rounds = max(0, math.ceil(math.log2((high - start) / tolerance)))
        hidden = not self._calibration.progress or self._processes.rank != 0
        with tqdm(total=1 + rounds, desc="sparsest", disable=hidden) as bar:
            if not meets(high):
                low = start
                while high - low > tolerance:
                    middle = (low + high) / 2
                    low, high = (middle, high) if meets(middle) else (low, middle)
                if best is None:
                    meets(start)
        if best is None:
            raise ValueError(
                f"even at sparsity {start:g} the metric is {curve[-1][1]:g}, and {dense:g} of the dense model minus within={within:g} is more; raise `within`"
                + (" or lower `low`" if start > self._pruned_already() else "")
            )
        sparsity, value, result = best
        return Sparsest(sparsity, value, dense, result, sorted(curve))

    def _check_search(self, metric: Metric, within: float, low: float, high: float, tolerance: float) -> float:
        """Check the arguments of :meth:`sparsest`; returns the lowest sparsity to try."""
        check_number("within", within, least=0)
        check_number("tolerance", tolerance)
        check_number("low", low, least=0)
        check_function("metric", metric, "of the model that returns a number")
        if self._job.config.pattern.n_m is not None:
            raise ValueError(f"mask_type {self._job.config.pattern} has one sparsity only; there is nothing to search")
        low = max(low, self._pruned_already())
        if not (is_number(high) and low < high < 1):
            raise ValueError(f"high must lie between low={low:g} and 1, got {show(high)}")
        return low

    def _measured(self, metric: Metric, weights: Mapping[str, Tensor], where: str) -> float:
        """The metric with these weights in place."""
        model, everybody = self._job.model, self._processes
        with everybody.together("evaluating the metric"), weights_restored(model), eval_mode(model), torch.no_grad():
            parameters = first_names(model)
            for name, weight in weights.items():
                parameters[name].copy_(weight)
            value = metric(model)
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"metric must return a number, got {show(value)} for {where}") from None
            if not math.isfinite(number):
                raise ValueError(f"metric must return a finite number, got {number} for {where}")
        return everybody.sum(number) / everybody.world_size

    def _pruned_already(self) -> float:
        """The lowest sparsity that ``masks`` leaves open."""
        masks = self._job.masks
        groups = [tuple(masks)] if self._job.config.global_sparsity else [(name,) for name in masks]
        return max(zero_share(masks[name] for name in names) for names in groups)

    def _own(self, sparsity: Mapping[float, Sequence[str]]) -> dict[str, float]:
        """The target of each calibrated parameter; raise ``ValueError`` unless exactly those have one."""
        job = self._job
        if job.config.costs is not None:
            check_competition(job.config, per_layer=True)
        _, own = selected(job.model, "", sparsity, job.config.exclude, False)
        assert own is not None
        others = [name for name in own if name not in job.parameters and name not in job.skipped]
        absent = [name for name in job.parameters if name not in own]
        if others:
            raise ValueError(f"{', '.join(others[:5])}: not calibrated; calibrate again with these in `params`")
        if absent:
            raise ValueError(
                f"{', '.join(absent[:5])}: calibrated, but without a sparsity; add an entry, {{0.0: [...]}} leaves them dense"
            )
        return own
