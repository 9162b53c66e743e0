"""What a recipe means for a training run: how long, who sets the learning rate, which weights are pruned, and how far they are."""

from __future__ import annotations

import argparse
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from capruner.sparseml.base import (
    CorrelationAwareModifier,  # first: its package sets what SparseML reads when it is imported
)

# isort: split
import torch
from sparseml.pytorch.sparsification.pruning import BaseGradualPruningModifier, BasePruningModifier
from torch import Tensor, nn

from capruner.cli.arguments import UserError
from capruner.sparseml import recipe

_SAME_EPOCH = 1e-6
MOST_UPDATES = 10_000


class Recipe:
    """A loaded recipe.

    Attributes:
        manager: SparseML's, not yet initialized.
        pruning: its pruning modifiers in the order in which they act.
        sets_learning_rate: whether timm's scheduler must stay away.

    Raises:
        UserError: nothing in it prunes; ``--sparsities`` do not fit it.
    """

    def __init__(self, path: str, sparsities: Sequence[float] | None) -> None:
        self.path = path
        self.manager = recipe.load_manager(path)
        modifiers = list(self.manager.iter_modifiers())
        self.pruning = [m for m in modifiers if isinstance(m, BasePruningModifier)]
        if not self.pruning:
            raise UserError(f"--sparseml-recipe {path} has no pruning modifier; see 'capruner recipes list'")
        rates = [m for m in modifiers if "LearningRate" in type(m).__name__]
        self.sets_learning_rate = bool(rates)
        if any(type(m).__name__ == "LearningRateModifier" for m in rates):
            raise UserError(
                f"{path}: LearningRateModifier hides its place in the schedule, so that training could not be resumed; "
                "use LearningRateFunctionModifier, or no learning rate in the recipe and --sched"
            )
        if sparsities:
            self._climb(list(sparsities))

    def epochs(self, args: argparse.Namespace) -> int:
        """``--epochs``, or until the recipe ends.

        Raises:
            UserError: neither says.
        """
        if not math.isfinite(self.manager.max_epochs):
            raise UserError(f"{self.path} ends at epoch {self.manager.max_epochs:g}; give its modifiers an end_epoch")
        end = math.ceil(self.manager.max_epochs - _SAME_EPOCH)
        if args.epochs is None and end < 1:
            raise UserError(f"{self.path} has no end; say --epochs, or add an EpochRangeModifier")
        return args.epochs or end

    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask, True = stays}``, of all modifiers together, where masks are enforced or not begun."""
        found: dict[str, Tensor] = {}
        for modifier in self.pruning:
            masks = modifier.module_masks
            for layer, param, mask in zip(masks.layer_names, masks.param_names, masks.param_masks):
                name = f"{layer}.{param}" if layer else param
                keep = mask != 0 if masks.enabled else torch.ones_like(mask, dtype=torch.bool)
                found[name] = found[name] & keep if name in found else keep
        return found

    def updates(self) -> list[tuple[bool, bool, float]]:
        """Changes when an update has happened."""
        return [(m.started, m.ended, getattr(m, "_last_update_epoch", 0.0)) for m in self.pruning]

    def close(self, model: nn.Module, optimizer: Any, epoch: float, steps_per_epoch: int) -> None:
        """The update that is due when training ends exactly at ``end_epoch``: no further step would bring it."""
        for modifier in self.pruning:
            if modifier.end_pending(epoch + _SAME_EPOCH, steps_per_epoch):
                modifier.scheduled_update(model, optimizer, max(epoch, modifier.end_epoch), steps_per_epoch)
                modifier.optimizer_post_step(model, optimizer, epoch, steps_per_epoch)

    def remove_states(self) -> None:
        """Delete what killed calibrations would go on from: training has ended, and its weights are written."""
        for modifier in self.pruning:
            if isinstance(modifier, CorrelationAwareModifier):
                modifier.remove_state()

    def _climb(self, sparsities: list[float]) -> None:
        """Let the ladder say the sparsity at each update, instead of the interpolation."""
        for modifier in self.pruning:
            if not isinstance(modifier, BaseGradualPruningModifier) or isinstance(modifier.final_sparsity, dict):
                raise UserError(
                    f"{self.path}: --sparsities replaces init_sparsity and final_sparsity, numbers both; {type(modifier).__name__} has none"
                )
        due = sorted({round(epoch, 6) for modifier in self.pruning for epoch in _update_epochs(modifier)})
        if len(sparsities) > len(due):
            shown = ", ".join(f"{epoch:g}" for epoch in due)
            raise UserError(
                f"--sparsities has {len(sparsities)} steps, but {self.path} updates {len(due)} times (at epochs {shown}); lower update_frequency"
            )

        def target(modifier: Any) -> Any:
            def at(epoch: float, steps_per_epoch: int) -> list[float]:
                rung = bisect_right(due, epoch + _SAME_EPOCH) - 1
                return [sparsities[min(max(rung, 0), len(sparsities) - 1)]] * len(modifier.module_masks.layers)

            return at

        for modifier in self.pruning:
            modifier.get_applied_sparsity_for_epoch = target(modifier)


def _update_epochs(modifier: Any) -> list[float]:
    start, end, frequency = max(modifier.start_epoch, 0.0), modifier.end_epoch, modifier.update_frequency
    updates = (end - start) / frequency if frequency > 0 else 1
    if not updates <= MOST_UPDATES:
        raise UserError(
            f"update_frequency: {frequency:g} from epoch {start:g} to {end:g} is more than {MOST_UPDATES:,} updates; raise it (an epoch is 1)"
        )
    count = math.ceil(updates - _SAME_EPOCH)
    return [start + k * frequency for k in range(count)] + [end]


def sparsity_of(masks: dict[str, Tensor]) -> float:
    """Share of the maskable weights that are pruned."""
    return sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def layer_sparsities(masks: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Rows ``name, numel, zeros, sparsity``."""
    rows = []
    for name, mask in masks.items():
        zeros = int((~mask).sum())
        rows.append({"name": name, "numel": mask.numel(), "zeros": zeros, "sparsity": zeros / mask.numel()})
    return rows


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero what is pruned, in a model that the recipe does not know (the moving average)."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def check_masks(model: nn.Module, masks: dict[str, Tensor], what: str) -> None:
    """Every pruned weight must be exactly zero.

    Raises:
        RuntimeError: one is not.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        alive = int((parameters[name].detach()[~mask.to(parameters[name].device)] != 0).sum())
        if alive:
            raise RuntimeError(
                f"{alive} pruned weights of {name} are not zero in {what}; it was not written. Please report this"
            )
