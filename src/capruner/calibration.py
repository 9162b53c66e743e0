"""One calibration: gradients out of the model, into a method, ready to solve. What ``prune`` and ``compensate_masks`` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capruner.distributed import Shards
from capruner.gradients import GradientMode, LossFunction, calibrating, gradient_slabs
from capruner.layout import BlockLayout
from capruner.methods import LayerSolution, Method, Settings, Stopwatch, Target
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
        shards = Shards(self.layouts, method.whole_layers)
        pruner = method(shards, self.settings, self.clock)
        if pruner.uses_gradients:
            with shards.together("drawing gradients"):
                self._feed(pruner)
        dead, weights = {}, {}
        for name, p in self.parameters.items():
            own = shards.own(name)
            dead[name] = self.layouts[name].to_blocks(~kept[name], torch.bool)[own]
            weights[name] = self.layouts[name].to_blocks(p.detach(), _working_dtype(p))[own].masked_fill(dead[name], 0)
        with shards.together("inverting Fisher blocks"):
            pruner.prepare(weights, dead)
        return pruner

    def _feed(self, pruner: Method) -> None:
        if self.batches is None:
            raise ValueError(f"method {pruner.name!r} needs calibration data: give `batches`")
        # Enough rows for efficient matrix products, few enough to stay a small share of the d·B of the Fisher blocks.
        slab = max(6, max(layout.block_size for layout in self.layouts.values()) // 12)
        shards = pruner.shards
        # Of num_grads each process draws its share; the first ones draw what is left over.
        mine = self.settings.num_grads // shards.size + (shards.rank < self.settings.num_grads % shards.size)
        with calibrating(self.model):
            slabs = gradient_slabs(
                self.model,
                self.batches,
                self.loss_fn,
                self.parameters,
                mine,
                mode=self.gradients,
                slab=max(1, slab // shards.size),
                progress=self.progress and shards.rank == 0,
            )
            while True:
                with self.clock("gradients"):
                    gradients = next(slabs, None) if mine else None
                with self.clock("exchange"):
                    rows = shards.exchange(None if gradients is None else self._in_blocks(gradients))
                if rows is None:
                    return
                pruner.add(rows)

    def _in_blocks(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.layouts[name].to_blocks(rows, rows.dtype) for name, rows in gradients.items()}

    def solve(self, pruner: Method, rungs: Sequence[tuple[float, Sequence[Target]]]) -> list[Level]:
        """The model at each ``(sparsity, targets)``, as tensors like the parameters; the same on every process."""
        solutions = pruner.solve([targets for _, targets in rungs])
        return [self.level(pruner.shards, s, solution) for (s, _), solution in zip(rungs, solutions)]

    def level(self, shards: Shards, sparsity: float, solutions: Mapping[str, LayerSolution]) -> Level:
        """One level from the solutions of all processes."""
        weights, masks, losses = {}, {}, {}
        for name, p in self.parameters.items():
            solution = solutions[name]
            masks[name] = self.layouts[name].from_blocks(shards.gather(name, solution.keep)).to(p.device)
            weights[name] = self.layouts[name].from_blocks(shards.gather(name, solution.weight)).to(p)
            if not torch.isfinite(weights[name]).all():
                raise ValueError(f"the pruned weights of {name} are not finite in {p.dtype}; raise damp")
            losses[name] = shards.sum(solution.loss)
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
