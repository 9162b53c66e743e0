"""After weights have left: natural-gradient steps (Amari 1998) that bring the outputs of the network back towards those of the dense one.

The expansion that weights leave by,

    L(w + δ) ≈ L + gᵀ δ + ½ δᵀ F δ,

has ``g = 0`` where training has ended, and ``F`` in blocks that know nothing of each other. Where weights have left ``g`` is not 0 any more, and what the
blocks have not seen of each other is in it. So those that stay take steps ``−α F⁻¹ g``, ``F`` being the blocks at hand, of the weights that stay, and ``L`` the
Kullback-Leibler divergence of the outputs from those of the dense network: it needs no labels, and its gradient has none of their noise.

``α = 1`` would be right if blocks knew of each other. Each would make up for all of the error: on the ViT of docs/studies the best ``α`` is between 1/400
and 1/4,000, and a full step ruins it. So ``α`` is searched for; a step that does not lower the divergence is not taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm.auto import tqdm

from capruner.distributed import Shards
from capruner.gradients import call_model
from capruner.methods import LayerSolution
from capruner.methods.base import SecondOrderMethod

SAMPLES = 2048
"""The first so many of a calibration, of all processes together, give the gradients; they are held in memory meanwhile."""
SEARCHED = 1024
"""The first so many of these give the lengths."""
TRIES = 6
FIRST_SHARE = 0.3
"""Of the divergence, that the first step of a run is expected to win. Later ones expect what the one before has won."""
CLOSE = 0.2
"""The search ends when the next length would differ by less than this share: the divergence is flat around its minimum."""


@dataclass(frozen=True)
class Step:
    """A step ``−α F⁻¹ g``.

    Attributes:
        length: ``α``; 0: no length that was tried lowered the divergence.
        slope: ``gᵀ F⁻¹ g``, what the divergence falls by per ``α`` at first.
        before, after: mean divergence, in nats.
    """

    length: float
    slope: float
    before: float
    after: float

    @property
    def share(self) -> float:
        """Of the divergence, that the next step may be expected to win: where its search begins."""
        return self.length * self.slope / self.before if self.length else FIRST_SHARE / 10


@dataclass
class FirstSamples:
    """``batches``, of which the first few are held as they pass.

    Attributes:
        batches: ``(inputs, targets)`` pairs.
        samples: hold batches until they are so many.
        held: the inputs of the last pass's.
    """

    batches: Iterable[Any]
    samples: int
    held: list[Any] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        self.held, count = [], 0
        for batch in self.batches:
            if count < self.samples and isinstance(batch, Sequence) and len(batch) == 2:
                self.held.append(batch[0])
                count += next((len(t) for t in tree_leaves(batch[0]) if isinstance(t, Tensor) and t.dim()), 1)
            yield batch


class Divergence:
    """``KL(dense ‖ model)``, the mean over samples; use inside :func:`capruner.gradients.calibrating`.

    Args:
        dense: the parameters that ``model`` had when it was dense, as far as it has others now.
        held: inputs of this process's batches, on any device. Those that the dense network has no finite outputs for are left out.
        shards: the processes, whose samples count together.

    Raises:
        ValueError: outputs that are no logits, or none that are finite.
    """

    def __init__(self, model: nn.Module, dense: Mapping[str, Tensor], held: Iterable[Any], shards: Shards) -> None:
        self.model, self.shards = model, shards
        self.device = next(iter(dense.values())).device
        self.batches: list[tuple[Any, Tensor]] = []

        def functional(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, dict(dense), args, kwargs)

        with torch.no_grad():
            for inputs in held:
                goal = self._outputs(functional, inputs)
                if torch.isfinite(goal).all():
                    self.batches.append((inputs, goal))
        self.samples = shards.sum(sum(len(goal) for _, goal in self.batches))
        if not self.samples:
            raise ValueError(
                "natural_gradient_steps: the dense network has no finite outputs for any of the first batches"
            )

    def _outputs(self, model: Callable[..., Any], inputs: Any) -> Tensor:
        outputs = call_model(model, tree_map_only(Tensor, lambda t: t.to(self.device), inputs))
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(
                f"natural-gradient steps compare class probabilities, from logits (batch, classes), and the model gave {shape}; use "
                "natural_gradient_steps=0"
            )
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32)).log_softmax(dim=1)

    def _sum(self, inputs: Any, goal: Tensor) -> Tensor:
        return F.kl_div(self._outputs(self.model, inputs), goal, log_target=True, reduction="sum")

    @torch.no_grad()
    def value(self) -> float:
        """In nats, of the samples that lengths are searched on; the same on every process."""
        total, count = 0.0, 0
        for inputs, goal in self.batches:
            if count * self.shards.size >= SEARCHED:
                break
            total, count = total + float(self._sum(inputs, goal)), count + len(goal)
        return self.shards.sum(total) / self.shards.sum(count)

    @torch.enable_grad()
    def gradient(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """This process's part of it; that of all samples is the sum over processes."""
        found = {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in parameters.items()}
        for inputs, goal in self.batches:
            part = self._sum(inputs, goal) / self.samples
            for total, gradient in zip(found.values(), torch.autograd.grad(part, list(parameters.values()))):
                total += gradient
        return found


@torch.no_grad()
def descend(
    divergence: Divergence,
    pruner: SecondOrderMethod,
    parameters: Mapping[str, nn.Parameter],
    solution: Mapping[str, LayerSolution],
    steps: int,
    share: float = FIRST_SHARE,
    progress: bool = False,
) -> tuple[dict[str, LayerSolution], list[Step]]:
    """Take up to so many steps from a solution; fewer where one finds no way down. The parameters are at the end what they were before.

    Args:
        divergence: of the model that has the parameters.
        pruner: with its inverse Fisher blocks.
        solution: of the blocks that this process owns.
        share: of the divergence, that the first step is expected to win.

    Returns:
        The solution with the same masks and other weights, and the steps.
    """
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    taken: list[Step] = []
    try:
        for _ in tqdm(range(steps), "natural-gradient steps", leave=False, disable=None if progress else True):
            step, solution = _step(divergence, pruner, parameters, solution, share)
            taken.append(step)
            if not step.length:
                break
            share = step.share
    finally:
        for name, p in parameters.items():
            p.copy_(saved[name])
    return dict(solution), taken


def _step(
    divergence: Divergence,
    pruner: SecondOrderMethod,
    parameters: Mapping[str, nn.Parameter],
    solution: Mapping[str, LayerSolution],
    share: float,
) -> tuple[Step, dict[str, LayerSolution]]:
    shards, layouts = pruner.shards, pruner.layouts
    for name, p in parameters.items():
        p.copy_(layouts[name].from_blocks(shards.gather(name, solution[name].weight)))
    start = {name: p.detach().clone() for name, p in parameters.items()}
    local = divergence.gradient(parameters)
    rows = shards.exchange({name: layouts[name].to_blocks(g[None], g.dtype) for name, g in local.items()})
    assert rows is not None  # one from each process
    newton, slope = {}, 0.0
    for name, layer in solution.items():
        gradient = rows[name].sum(dim=0).to(layer.weight).masked_fill(~layer.keep, 0)
        newton[name] = pruner.newton(name, gradient, layer.keep)
        slope += float((newton[name] * gradient).sum(dtype=torch.float64))
    way = {name: layouts[name].from_blocks(shards.gather(name, newton[name])).to(p) for name, p in parameters.items()}

    def value(length: float) -> float:
        for name, p in parameters.items():
            p.copy_(start[name] - length * way[name])
        return divergence.value()

    step = search(value, shards.sum(slope), share)
    moved = {
        name: LayerSolution(layer.weight - step.length * newton[name], layer.keep, layer.loss)
        for name, layer in solution.items()
    }
    return step, moved


def search(value: Callable[[float], float], slope: float, share: float) -> Step:
    """The minimum along a line: parabolas through the start, its slope, and the last length tried.

    Args:
        value: of a length; may be NaN or Inf where it is too long.
        slope: what ``value`` falls by per length at 0.
        share: of ``value(0)``, that the first length tried would win if there were no curvature.
    """
    before = value(0.0)
    if not (slope > 0 and before > 0 and math.isfinite(slope) and math.isfinite(before)):
        return Step(0.0, slope, before, before)
    tried = {0.0: before}
    length = share * before / slope
    for _ in range(TRIES):
        after = value(length)
        tried[length] = after if math.isfinite(after) else math.inf
        bend = 2 * (tried[length] - before + slope * length) / length**2
        best = min(max(slope / bend, length / 8), 2 * length) if bend > 0 else 2 * length
        if abs(best / length - 1) < CLOSE:
            break
        length = best
    length = min(tried, key=tried.__getitem__)
    return Step(length, slope, before, tried[length])
