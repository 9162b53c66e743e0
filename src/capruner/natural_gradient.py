"""After weights have left: natural-gradient steps (Amari 1998) that bring the outputs of the network back towards those of the dense one.

The expansion that weights leave by,

    L(w + δ) ≈ L + gᵀ δ + ½ δᵀ F δ,

has ``g = 0`` where training has ended, and ``F`` in blocks that know nothing of each other. Where weights have left ``g`` is not 0 any more, and what the
blocks have not seen of each other is in it. So those that stay take steps along ``−F⁻¹ g``, ``F`` being the blocks at hand, of the weights that stay, and ``L``
the Kullback-Leibler divergence of the outputs from those of the dense network: it needs no labels, and its gradient has none of their noise.

A step of length 1 would be right if blocks knew of each other. As it is each would make up for all of the error, and a full step is thousands of times too
long on the networks of docs/studies. So the length is searched for, and a step that does not lower the divergence is not taken. For what blocks do not know
of each other, each further direction is made conjugate to the last (Polak and Ribière 1969): preconditioned nonlinear conjugate gradients.
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

from capruner.batches import call_model
from capruner.distributed import Shards
from capruner.methods import LayerSolution
from capruner.methods.base import SecondOrderMethod
from capruner.numerics import working_dtype
from capruner.wrappers import own_names

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
    """A step along ``−d``; the first of several has ``d = F⁻¹ g``.

    Attributes:
        length: in units of ``d``; 0: no length that was tried lowered the divergence.
        slope: ``gᵀ d``, what the divergence falls by per length at first.
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
    """``KL(dense ‖ model)``, the mean over samples; use inside :func:`capruner.modes.eval_mode`.

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
            return torch.func.functional_call(model, own_names(model, dense), args, kwargs)

        with torch.no_grad():
            for inputs in held:
                goal = self._outputs(functional, inputs)
                if torch.isfinite(goal).all():
                    self.batches.append((inputs, goal))
        self.samples = shards.total(sum(len(goal) for _, goal in self.batches), "taking natural-gradient steps")
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
        return outputs.to(working_dtype(outputs)).log_softmax(dim=1)

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
        found = {n: torch.zeros(p.shape, dtype=working_dtype(p), device=p.device) for n, p in parameters.items()}
        for inputs, goal in self.batches:
            part = self._sum(inputs, goal) / self.samples
            for total, gradient in zip(found.values(), torch.autograd.grad(part, list(parameters.values()))):
                total += gradient
        return found


class _Descent:
    """Preconditioned nonlinear conjugate gradients; see :func:`descend` for the arguments."""

    def __init__(
        self,
        divergence: Divergence,
        pruner: SecondOrderMethod,
        parameters: Mapping[str, nn.Parameter],
        solution: Mapping[str, LayerSolution],
    ) -> None:
        self.divergence, self.pruner, self.parameters = divergence, pruner, parameters
        self.keep = {name: layer.keep for name, layer in solution.items()}
        self.weights = {name: layer.weight for name, layer in solution.items()}
        self._last: tuple[dict[str, Tensor], dict[str, Tensor], float] | None = None

    def step(self, share: float) -> Step:
        start = self._whole(self.weights)
        for name, p in self.parameters.items():
            p.copy_(start[name])
        gradient = self._gradient()
        newton = {name: self.pruner.newton(name, g, self.keep[name]) for name, g in gradient.items()}
        square = self._dot(newton, gradient)
        way, slope = newton, square
        if self._last is not None:
            gradient_before, way_before, square_before = self._last
            beta = (square - self._dot(newton, gradient_before)) / square_before
            turned = {name: newton[name] + beta * way_before[name] for name in newton}
            falls = self._dot(turned, gradient)
            if beta > 0 and falls > 0:  # else begin anew
                way, slope = turned, falls
        self._last = gradient, way, square
        whole = self._whole(way)

        def value(length: float) -> float:
            for name, p in self.parameters.items():
                p.copy_(start[name] - length * whole[name])
            return self.divergence.value()

        step = search(value, slope, share)
        self.weights = {name: weight - step.length * way[name] for name, weight in self.weights.items()}
        return step

    def _gradient(self) -> dict[str, Tensor]:
        """At the present parameters, of all samples; the blocks of this process, 0 where weights have left."""
        layouts = self.pruner.layouts
        local = {
            name: layouts[name].to_blocks(g[None], g.dtype)
            for name, g in self.divergence.gradient(self.parameters).items()
        }
        rows = self.pruner.shards.exchange(local, {name: g.dtype for name, g in local.items()})
        assert rows is not None  # one from each process
        return {
            name: rows[name].sum(dim=0).to(weight).masked_fill(~self.keep[name], 0)
            for name, weight in self.weights.items()
        }

    def _whole(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Everybody's blocks, shaped like the parameters."""
        return {
            name: self.pruner.layouts[name].from_blocks(self.pruner.shards.gather(name, blocks[name])).to(p)
            for name, p in self.parameters.items()
        }

    def _dot(self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
        """Over the blocks of all processes."""
        return self.pruner.shards.sum(sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a))


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
    """Take up to so many steps from a solution; fewer where one finds no way down, which is reported too, with length 0.

    The parameters are at the end what they were before.

    Args:
        divergence: of the model that has the parameters.
        pruner: with its inverse Fisher blocks.
        solution: of the blocks that this process owns.
        share: of the divergence, that the first step is expected to win.

    Returns:
        The solution with the same masks and other weights, and the steps.
    """
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    descent = _Descent(divergence, pruner, parameters, solution)
    taken: list[Step] = []
    try:
        for _ in tqdm(range(steps), "natural-gradient steps", leave=False, disable=None if progress else True):
            taken.append(descent.step(share))
            if not taken[-1].length:
                break
            share = taken[-1].share
    finally:
        for name, p in parameters.items():
            p.copy_(saved[name])
    moved = {n: LayerSolution(descent.weights[n], layer.keep, layer.loss) for n, layer in solution.items()}
    return moved, taken


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
