"""One calibration: gradients out of the model, into a method, ready to solve. What ``prune`` and ``compensate_masks`` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capruner.gradients import GradientMode, LossFunction, calibrating, gradient_slabs
from capruner.layout import BlockLayout
from capruner.methods import LayerSolution, Method, Settings, Stopwatch
from capruner.patterns import Pattern, unsupported
from capruner.result import Level
from capruner.selection import SelectionError


@dataclass
class Calibration:
    """The fixed part of a run: a model, its data, the parameters to prune, the knobs.

    Attributes:
        model: not wrapped; called in eval mode.
        batches: see :func:`capruner.prune`; None for methods without gradients.
        parameters: ``{name: parameter}``.
        clock: seconds by stage, over all calibrations.
    """

    model: nn.Module
    batches: Iterable[tuple[Any, Any]] | None
    loss_fn: LossFunction
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    gradients: GradientMode = "batch"
    progress: bool = True
    clock: Stopwatch = field(default_factory=Stopwatch)

    def __post_init__(self) -> None:
        size = self.settings.fisher_block_size
        grouped = self.settings.pattern.group > 1
        self.layouts = {name: BlockLayout.of(p.shape, size, grouped) for name, p in self.parameters.items()}

    def run(self, method: type[Method], kept: Mapping[str, Tensor]) -> Method:
        """Calibrate ``method`` at the model's present weights, of which ``kept`` (bool, True = stays) says what earlier pruning left."""
        pruner = method(self.layouts, self.settings, self.clock)
        if pruner.uses_gradients:
            self._feed(pruner)
        dead = {name: self.layouts[name].to_blocks(~kept[name], torch.bool) for name in self.parameters}
        weights = {
            name: self.layouts[name].to_blocks(p.detach(), _working_dtype(p)).masked_fill(dead[name], 0)
            for name, p in self.parameters.items()
        }
        pruner.prepare(weights, dead)
        return pruner

    def _feed(self, pruner: Method) -> None:
        if self.batches is None:
            raise ValueError(f"method {pruner.name!r} needs calibration data: give `batches`")
        # Enough rows for efficient matrix products, few enough to stay a small share of the d·B of the Fisher blocks.
        slab = max(6, max(layout.block_size for layout in self.layouts.values()) // 12)
        with calibrating(self.model):
            slabs = gradient_slabs(
                self.model,
                self.batches,
                self.loss_fn,
                self.parameters,
                self.settings.num_grads,
                mode=self.gradients,
                slab=slab,
                progress=self.progress,
            )
            while True:
                with self.clock("gradients"):
                    gradients = next(slabs, None)
                if gradients is None:
                    return
                pruner.add(gradients)

    def level(self, sparsity: float, solutions: Mapping[str, LayerSolution]) -> Level:
        """Solutions in blocks as tensors like the parameters."""
        weights, masks, losses = {}, {}, {}
        for name, p in self.parameters.items():
            masks[name] = self.layouts[name].from_blocks(solutions[name].keep).to(p.device)
            weights[name] = self.layouts[name].from_blocks(solutions[name].weight).to(p)
            if not torch.isfinite(weights[name]).all():
                raise ValueError(f"the pruned weights of {name} are not finite in {p.dtype}; raise damp")
            losses[name] = solutions[name].loss
        return Level(sparsity, weights, masks, losses)


def _working_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def supporting(
    pattern: Pattern, parameters: Mapping[str, nn.Parameter], skip_unsupported: bool
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The parameters that can hold ``pattern``, and the names of those that cannot.

    Raises:
        SelectionError: some cannot and ``skip_unsupported`` is False, or none can.
    """
    bad = unsupported(pattern, parameters)
    if bad and not skip_unsupported:
        shapes = ", ".join(f"{name} {tuple(parameters[name].shape)}" for name in bad[:8])
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        ahead = "|".join(name.replace(".", r"\.") for name in bad)
        raise SelectionError(
            f"{pattern} needs weights whose second dimension (inputs, or input channels per group) is a multiple of {pattern.group}; "
            f"these are not: {shapes}{more}. Leave them dense with skip_unsupported=True, or out of params: a pattern that begins with "
            f"'re:(?!(?:{ahead})$)' passes them over"
        )
    if len(bad) == len(parameters):
        raise SelectionError(f"none of the selected parameters can hold {pattern}: {', '.join(bad[:8])}")
    return {name: p for name, p in parameters.items() if name not in set(bad)}, bad
