"""The training loop of distillation: AdamW towards recorded outputs, with masks that do not change.

Every process calls it with lessons of its own; gradients are summed over all of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from capruner.batches import BatchError, call_model, describe, logits_of, own_copy
from capruner.checkpoint import Checkpoint, NoCheckpoint, StateError
from capruner.core.numerics import working_dtype
from capruner.distributed import Processes
from capruner.files import digest
from capruner.models.masking import MaskHandle
from capruner.models.modes import eval_mode
from capruner.models.wrappers import first_names

MEASURED = 1024
"""Divergence is measured on the first samples, as many as this in all processes together."""
STEP = 32
"""Samples of one optimizer step, at least: smaller batches are put together."""
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""What a learning rate is chosen from, by short trials from the same start."""
FIRST_TRIED = 3e-3
WARM_UP = 0.1
TRIAL = 32
"""Steps of a trial."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Distillation:
    """What a distillation did.

    Attributes:
        before, after: mean divergence from the dense network's outputs, in nats; ``after`` is never larger.
        passes: passes over the samples.
        lr: peak learning rate.
        steps: optimizer steps.
    """

    before: float
    after: float
    passes: float
    lr: float
    steps: int


@dataclass(frozen=True)
class Lesson:
    """A batch of inputs and the dense network's log-probabilities for it, ``(batch, classes)``."""

    inputs: Any
    target: Tensor


def train(
    model: nn.Module,
    lessons: Sequence[Lesson],
    masks: Mapping[str, Tensor],
    *,
    passes: float,
    lr: float | None = None,
    processes: Processes,
    checkpoint: Checkpoint | None = None,
    progress: bool = True,
) -> Distillation:
    """Train ``model`` on ``lessons``, resuming from ``checkpoint`` if that is in the middle of it.

    Args:
        masks: True = keep; those of parameters that are not trained are not needed.
        lr: None: chosen by trials.

    Raises:
        ValueError: a divergence that is not finite.
    """
    run = _Training(model, lessons, masks, passes, lr, processes, checkpoint or NoCheckpoint())
    hidden = not progress or processes.rank > 0
    with eval_mode(model), torch.enable_grad(), run.handle:
        run.begin()
        with tqdm(total=run.steps, initial=run.step, desc="distilling", leave=False, disable=hidden or None) as bar:
            while run.step < run.steps:
                run.advance()
                bar.update()
        return run.end()


class _Training:
    """AdamW on copies of the parameters, in float32 at least: a model in half precision would not see small steps."""

    def __init__(
        self,
        model: nn.Module,
        lessons: Sequence[Lesson],
        masks: Mapping[str, Tensor],
        passes: float,
        lr: float | None,
        processes: Processes,
        checkpoint: Checkpoint,
    ) -> None:
        self.model, self.lessons, self.processes, self.checkpoint = model, lessons, processes, checkpoint
        self.passes, self._given_lr = passes, lr
        self.lr = FIRST_TRIED if lr is None else lr
        self.parameters = trainable(model)
        self.device = next(iter(self.parameters.values())).device
        self.masters = {
            name: nn.Parameter(p.detach().to(working_dtype(p), copy=True)) for name, p in self.parameters.items()
        }
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        kept = {name: mask.to(self.device, torch.bool) for name, mask in masks.items() if name in self.masters}
        self.handle = MaskHandle(model, kept)
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=self.lr, weight_decay=0.0)
        self.group = max(1, math.ceil(STEP / processes.world_size / len(lessons[0].target)))
        self.per_pass = max(1, processes.min(len(lessons) // self.group))
        self.steps = max(1, round(passes * self.per_pass))
        self.step, self.before = 0, math.nan

    def begin(self) -> None:
        """Measure the divergence and choose a learning rate, or resume an interrupted run."""
        self._write()
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        if self.checkpoint.resume("distillation", self._load):
            return
        self.before = self.divergence()
        if not math.isfinite(self.before):
            raise ValueError(
                f"the divergence of the pruned network's outputs from the dense network's is {self.before}; look at the pruned weights"
            )
        if self._given_lr is None:
            self.lr = self._chosen()

    def _load(self, tensors: Sequence[Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        if state["data"] != digest(lesson.target for lesson in self.lessons):
            raise StateError(
                f"the calibration data differs from the data that {self.checkpoint.folder} was saved with; cannot resume. Pass the same data in the same order "
                "(seed what shuffles or augments it), or delete the folder"
            )
        self.step, self.before, self.lr = state["step"], state["before"], state["lr"]
        for name, master in self.masters.items():
            with torch.no_grad():
                master.copy_(tensors[0][name])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[1][name].to(master),
                "exp_avg_sq": tensors[2][name].to(master),
            }
        self._write()

    def advance(self) -> None:
        """One step of the optimizer, saved if it is time."""
        divergence = self._advance(self.lr, self.steps)
        if not math.isfinite(divergence):
            raise ValueError(
                f"the divergence from the dense network's outputs is {divergence} at step {self.step} of {self.steps} with lr={self.lr:g}: "
                f"use a smaller one, capruner.distill(..., lr={self.lr / 10:g})"
            )
        if self.step < self.steps and self.checkpoint.due():
            self._save()

    def _advance(self, lr: float, steps: int) -> float:
        """Step ``self.step`` of ``steps``; returns the divergence before it."""
        self.optimizer.param_groups[0]["lr"] = lr * schedule(self.step, steps)
        divergence = self._gradient()
        self.optimizer.step()
        self._write()
        self.step += 1
        return divergence

    def _chosen(self) -> float:
        """The learning rate that a short training with a schedule of its own gets furthest with: from ``FIRST_TRIED`` downhill."""
        tried: dict[int, float] = {}

        def divergence(index: int) -> float:
            if index not in range(len(LEARNING_RATES)):
                return math.inf
            if index not in tried:
                steps = min(TRIAL, self.steps)
                while self.step < steps:
                    self._advance(LEARNING_RATES[index], steps)
                reached = self.divergence()
                tried[index] = reached if math.isfinite(reached) else math.inf
                self._restart()
            return tried[index]

        best = LEARNING_RATES.index(FIRST_TRIED)
        for way in (-1, 1):
            while divergence(best + way) < divergence(best):
                best += way
        return LEARNING_RATES[best]

    @torch.no_grad()
    def _restart(self) -> None:
        self.step = 0
        self.optimizer.state.clear()
        for name, master in self.masters.items():
            master.copy_(self.start[name])
        self._write()

    def end(self) -> Distillation:
        """Measure again; weights that are no better are taken back."""
        after = self.divergence()
        if not after <= self.before:
            _LOGGER.warning(
                "distillation did not help: the divergence from the dense network's outputs went from %.4g to %.4g at lr=%g; weights stay as pruned. "
                "Take a smaller lr or more samples",
                *(self.before, after, self.lr),
            )
            after = self.before
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(self.start[name])
        return Distillation(self.before, after, self.passes, self.lr, self.steps)

    @torch.no_grad()
    def divergence(self) -> float:
        """The mean over the samples on which it is measured; the same on every process."""
        total, count = 0.0, 0
        for lesson in self.lessons:
            if count * self.processes.world_size >= MEASURED:
                break
            total, count = total + float(self._sum(lesson)), count + len(lesson.target)
        everywhere = self.processes.total(count, "distilling")  # first: it tells whether another process has failed
        return self.processes.sum(total) / everywhere

    def _sum(self, lesson: Lesson) -> Tensor:
        found = log_probabilities(self.model, lesson.inputs, self.device)
        if found.shape != lesson.target.shape:
            raise ValueError(
                f"the model's outputs have shape {tuple(found.shape)}, those of the dense network {tuple(lesson.target.shape)}; "
                "`dense` must be the model before pruning"
            )
        return F.kl_div(found, lesson.target, log_target=True, reduction="sum")

    def _gradient(self) -> float:
        """The gradient of this step's samples, of all processes, into the copies; returns their mean divergence."""
        order = torch.randperm(len(self.lessons), generator=torch.Generator().manual_seed(self.step // self.per_pass))
        place = self.step % self.per_pass * self.group
        chosen = [self.lessons[i] for i in order[place : place + self.group].tolist()]
        mine = sum(len(lesson.target) for lesson in chosen)
        gradients = [master.grad.zero_() for master in self.masters.values() if master.grad is not None]
        mean = torch.zeros(1, device=self.device)
        for lesson in chosen:
            part = self._sum(lesson) / mine
            mean += part.detach()
            found = torch.autograd.grad(part, list(self.parameters.values()), allow_unused=True)
            for total, gradient in zip(gradients, found):
                if gradient is not None:
                    total += gradient
        share = mine / self.processes.total(mine, "distilling")
        self.processes.all_reduce([*gradients, mean], share)
        return float(mean)

    @torch.no_grad()
    def _write(self) -> None:
        for name, p in self.parameters.items():
            p.copy_(self.masters[name])
        self.handle.apply()

    def _save(self) -> None:
        moments = [
            {name: self.optimizer.state[master][key] for name, master in self.masters.items()}
            for key in ("exp_avg", "exp_avg_sq")
        ]
        self.checkpoint.save(
            [{name: master.detach() for name, master in self.masters.items()}, *moments],
            {
                "step": self.step,
                "before": self.before,
                "lr": self.lr,
                "data": digest(lesson.target for lesson in self.lessons),
            },
        )


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: up to 1 in the first tenth of the steps, and down to 0 along a cosine."""
    return min((step + 1) / (WARM_UP * steps), (1 + math.cos(math.pi * step / steps)) / 2)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that distillation trains."""
    found = {n: p for n, p in first_names(model).items() if p.requires_grad and p.is_floating_point()}
    if not found:
        raise ValueError(
            "no parameter of the model requires a gradient, so there is nothing to train; call model.requires_grad_(True)"
        )
    return found


def log_probabilities(model: nn.Module, inputs: Any, device: torch.device) -> Tensor:
    """Log-probabilities of a model's classes, ``(batch, classes)``; raise ``BatchError`` if its outputs are not logits."""
    logits = checked_logits(call_model(model, own_copy(inputs, device)))
    return logits.to(working_dtype(logits)).log_softmax(dim=1)


def checked_logits(outputs: Any) -> Tensor:
    """The logits ``(batch, classes)`` among a model's outputs; raise ``BatchError`` if there are none."""
    logits = logits_of(outputs)
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise BatchError(
            f"distillation compares class probabilities, from logits (batch, classes), and the model gave {describe(outputs)}; "
            "wrap the model so that it returns logits, or prune with distill_passes=0"
        )
    return logits
