"""One epoch of training, one evaluation, and the optimizer step that a recipe wraps."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from capruner.vision.evaluate import evaluate
from capruner.vision.training_arguments import uses_mixup
from capruner.vision.training_processes import Processes

_LOOK_AT_LOSS_EVERY = 20  # steps; reading it waits for the GPU


class Stepper:
    """Stands in for the optimizer where a recipe's manager wraps it.

    Its ``step`` is called once per ``--grad-accum-steps`` batches and counts for the recipe even if mixed precision skips the optimizer's step. Wrapping
    the optimizer itself would delay the recipe with every skipped step.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, args: argparse.Namespace
    ) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer, self._scaler = optimizer, scaler
        self._clip, self._mode = args.clip_grad, args.clip_mode
        self._gradients: list[Tensor | None] = []

    def keep_gradients(self) -> None:
        """Remember the training gradients, which SparseML's modifiers discard when they draw gradient samples."""
        self._gradients = [p.grad for p in self._parameters]

    def step(self) -> None:
        """Unscale, clip, step."""
        for parameter, gradient in zip(self._parameters, self._gradients):
            parameter.grad = gradient
        if self._clip is not None:
            self._scaler.unscale_(self._optimizer)
            dispatch_clip_grad(self._parameters, self._clip, mode=self._mode)
        self._scaler.step(self._optimizer)
        self._scaler.update()


def precision(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], Any], torch.amp.GradScaler]:
    """Autocast and loss scaler for ``--amp``; without it both do nothing."""
    default = "float16" if device.type == "cuda" else "bfloat16"
    dtype = getattr(torch, args.amp_dtype or default)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and dtype == torch.float16)
    if not args.amp:
        return nullcontext, scaler
    return lambda: torch.autocast(device.type, dtype), scaler


def training_loss(args: argparse.Namespace) -> nn.Module:
    """The loss that fits mixup and smoothing, chosen as in timm's training script."""
    if args.bce_loss:
        return BinaryCrossEntropy(0.0 if uses_mixup(args) else args.smoothing, args.bce_target_thresh)
    if uses_mixup(args):
        return SoftTargetCrossEntropy()  # smoothed by the mixup
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


def train_one_epoch(
    model: Any,
    loader: Any,
    loss_fn: nn.Module,
    mixup: Any,
    args: argparse.Namespace,
    processes: Processes,
    autocast: Callable[[], Any],
    scaler: torch.amp.GradScaler,
    take_step: Callable[[], None],
    name: str,
) -> dict[str, float]:
    """Train on every batch once; returns ``train_loss`` and ``images_per_second`` over all processes.

    Args:
        model: wrapped if there are several processes.
        take_step: called after the backward pass of every ``grad_accum_steps`` batches, and of the last ones of the epoch.

    Raises:
        RuntimeError: the loss is not finite.
    """
    model.train()
    batches = len(loader)
    remainder = batches % args.grad_accum_steps
    total = torch.zeros((), dtype=torch.float64, device="cpu" if processes.device.type == "cpu" else processes.device)
    images, began = 0, time.perf_counter()
    with tqdm(loader, desc=name, leave=False, disable=not processes.first) as bar:
        for index, (inputs, targets) in enumerate(bar):
            inputs, targets = _prepare(inputs, targets, mixup, args, processes.device)
            together = remainder if index >= batches - remainder else args.grad_accum_steps
            due = (index + 1) % args.grad_accum_steps == 0 or index + 1 == batches
            quiet = model.no_sync() if processes.size > 1 and not due else nullcontext()
            with quiet:
                with autocast():
                    loss = loss_fn(model(inputs), targets)
                scaler.scale(loss / together).backward()
            total += loss.detach() * len(inputs)
            images += len(inputs)
            if due:
                take_step()
            if index % _LOOK_AT_LOSS_EVERY == 0 or index + 1 == batches:
                if not math.isfinite(value := float(loss.detach())):
                    raise RuntimeError(
                        f"{name}: the loss of batch {index} is {value}; the last checkpoint is good. Lower the learning rate, or clip with --clip-grad 1"
                    )
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    loss_sum, count = processes.sum(float(total), images)
    return {"train_loss": loss_sum / count, "images_per_second": count / (time.perf_counter() - began)}


def _prepare(inputs: Tensor, targets: Tensor, mixup: Any, args: argparse.Namespace, device: torch.device) -> Any:
    """What the loader leaves to do for a batch."""
    if args.no_prefetcher:
        inputs, targets = inputs.to(device), targets.to(device)
        if mixup is not None:
            inputs, targets = mixup(inputs, targets)
    if args.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, targets


def measure(
    model: nn.Module, loader: Any, processes: Processes, autocast: Callable[[], Any], name: str
) -> dict[str, float]:
    """``top1``, ``top5`` (%) and ``loss`` over the validation images of all processes."""
    found = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "images": 0}
    if len(loader):
        with autocast():
            found = evaluate(model, loader, processes.device, name)
    keys = ("top1", "top5", "loss")
    *sums, images = processes.sum(*(found[key] * found["images"] for key in keys), found["images"])
    return {key: value / images for key, value in zip(keys, sums)}
