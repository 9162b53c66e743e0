"""A recipe for a training: which weights are pruned when, who sets the learning rate, how long it takes.

    from capruner import recipes

    recipe = recipes.load_training("recipe.yaml")
    run = recipe.start(model, optimizer, len(loader), loader, loss_fn)
    for epoch in range(recipe.epochs):
        for x, y in loader:
            loss_fn(model(x), y).backward()
            run.update()                # sets the learning rate, prunes if an update is due
            optimizer.step()            # pruned weights are 0 after it
            optimizer.zero_grad()
    run.finish()

The modifiers are those of :data:`capruner.recipes.KINDS`, and of this module.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from capruner.batches import default_loss
from capruner.calibration.gradients import LossFunction
from capruner.cli.arguments import UserError
from capruner.methods import METHODS
from capruner.recipes import rates, values
from capruner.recipes.document import Modifier
from capruner.recipes.one_shot import KINDS, SCHEDULE, OneShot, general_refusal, one_shot, read_modifiers
from capruner.training.schedules import SAME_EPOCH, sparsity_at, update_epochs

if TYPE_CHECKING:
    from capruner.recipes.run import RecipeRun


@dataclass(frozen=True)
class EpochRange:
    """``EpochRangeModifier``: how long the training takes."""

    start_epoch: float
    end_epoch: float


@dataclass(frozen=True)
class LearningRateFunction:
    """``LearningRateFunctionModifier``: see :mod:`capruner.recipes.rates`. From ``end_epoch`` on the rate stays where it is."""

    lr_func: str
    init_lr: float
    final_lr: float
    start_epoch: float
    end_epoch: float
    cycle_epochs: float = 1.0
    param_groups: list[int] | None = None

    def __post_init__(self) -> None:
        if self.end_epoch <= max(self.start_epoch, 0.0):
            raise ValueError(
                f"end_epoch must be after start_epoch, got {self.end_epoch:g} and {max(self.start_epoch, 0.0):g}"
            )
        if self.lr_func != "cyclic_linear" and self.cycle_epochs not in (
            1.0,
            self.end_epoch - max(self.start_epoch, 0.0),
        ):
            raise ValueError(
                f"cycle_epochs {self.cycle_epochs:g} has no effect with lr_func {self.lr_func}; write lr_func: cyclic_linear, or leave cycle_epochs out"
            )
        if self.cycle_epochs <= 0:
            raise ValueError(f"cycle_epochs must be more than 0, got {self.cycle_epochs:g}")

    def rate(self, epoch: float, steps_per_epoch: int) -> float:
        """The learning rate at ``epoch``."""
        start = max(self.start_epoch, 0.0)
        arguments = (self.init_lr, self.final_lr, min(epoch, self.end_epoch) - start, self.end_epoch - start)
        if self.lr_func != "cyclic_linear":
            return rates.FUNCTIONS[self.lr_func](*arguments)
        if epoch + SAME_EPOCH >= self.end_epoch:
            return self.final_lr
        return rates.cyclic_linear(*arguments, self.cycle_epochs, steps_per_epoch)


@dataclass(frozen=True)
class SetLearningRate:
    """``SetLearningRateModifier``: a learning rate from ``start_epoch`` on."""

    learning_rate: float
    start_epoch: float = -1.0
    end_epoch: float = -1.0
    param_groups: list[int] | None = None


@dataclass(frozen=True)
class SetWeightDecay:
    """``SetWeightDecayModifier``: a weight decay from ``start_epoch`` on."""

    weight_decay: float
    start_epoch: float = -1.0
    end_epoch: float = -1.0
    param_groups: list[int] | None = None


@dataclass(frozen=True)
class TrainableParams:
    """``TrainableParamsModifier``: whether parameters are trained, from ``start_epoch`` to ``end_epoch`` (-1: to the end), and as before after it."""

    params: str | list[str]
    trainable: bool
    params_strict: bool = True
    start_epoch: float = -1.0
    end_epoch: float = -1.0


@dataclass(frozen=True)
class ConstantPruning:
    """``ConstantPruningModifier``: weights that are 0 at ``start_epoch`` are 0 until ``end_epoch`` (-1: to the end)."""

    params: str | list[str]
    start_epoch: float = -1.0
    end_epoch: float = -1.0


@dataclass(frozen=True)
class Pruning:
    """A pruning modifier: what it prunes, and when.

    Attributes:
        one_shot: what is pruned, how, and how far in the end.
        init_sparsity: at ``start_epoch``; :data:`values.FROM_WEIGHTS`: what each parameter has when training starts.
        ladder: ``(epochs, sparsities)`` instead of the interpolation, see :meth:`TrainingRecipe.climb`.
    """

    one_shot: OneShot
    init_sparsity: float | str
    start_epoch: float
    end_epoch: float
    update_frequency: float
    inter_func: Any = "cubic"
    leave_enabled: bool = True
    ladder: tuple[list[float], list[float]] | None = None

    def __post_init__(self) -> None:
        if self.end_epoch < max(self.start_epoch, 0.0):
            raise ValueError(
                f"end_epoch must not be before start_epoch, got {self.end_epoch:g} and {max(self.start_epoch, 0.0):g}"
            )
        self.epochs()
        constant = self.init_sparsity == self.one_shot.final_sparsity
        if self.update_frequency <= 0 and METHODS[self.one_shot.method].uses_gradients and not constant:
            raise ValueError(
                f"update_frequency {self.update_frequency:g} makes an update, with a calibration, at every step; say after how many epochs"
            )

    def epochs(self) -> list[float]:
        """Epochs of the updates."""
        return update_epochs(self.start_epoch, self.end_epoch, self.update_frequency)

    def sparsity(self, epoch: float, first: float, final: float) -> float:
        """The target at ``epoch`` of a parameter that goes from ``first`` to ``final``."""
        if self.ladder is not None:
            return rung(*self.ladder, epoch)
        return sparsity_at(epoch, first, final, self.start_epoch, self.end_epoch, self.inter_func)


Action = (
    EpochRange | LearningRateFunction | SetLearningRate | SetWeightDecay | TrainableParams | ConstantPruning | Pruning
)

ACTIONS: dict[str, Any] = {
    "EpochRangeModifier": EpochRange,
    "LearningRateFunctionModifier": LearningRateFunction,
    "SetLearningRateModifier": SetLearningRate,
    "SetWeightDecayModifier": SetWeightDecay,
    "TrainableParamsModifier": TrainableParams,
    "ConstantPruningModifier": ConstantPruning,
}
_IDLE = ("constant_logging", "update_frequency")
"""Parameters of these that old recipes have, and that change nothing."""


def _rate(value: Any) -> float:
    found = values.number(value)
    if not 0 <= found < math.inf:
        raise ValueError("expected a finite number, at least 0")
    return found


def _epoch(value: Any) -> float:
    found = values.number(value)
    if not math.isfinite(found):
        raise ValueError("expected a finite number")
    return found


def _groups(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError("expected a list of numbers of parameter groups")
    return [values.whole(item) for item in value]


def _params(value: Any) -> str | list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return list(value)
    if not isinstance(value, str):
        raise ValueError("expected a list of names and patterns")
    return value


_CONVERT: dict[str, values.Convert] = {
    **dict.fromkeys(("start_epoch", "end_epoch", "cycle_epochs"), _epoch),
    **dict.fromkeys(("init_lr", "final_lr", "learning_rate", "weight_decay"), _rate),
    **dict.fromkeys(("trainable", "params_strict"), values.flag),
    "lr_func": values.one_of(*rates.NAMES),
    "param_groups": values.none_or(_groups),
    "params": _params,
}


def action(modifier: Modifier) -> Action:
    """Read a modifier; raise ``ValueError`` if it is not of this module, or a parameter is missing, unknown or invalid."""
    who = modifier.name
    if who in KINDS:
        return _pruning(modifier)
    if who not in ACTIONS:
        raise ValueError(_refusal(who))
    fields = {f.name: f for f in dataclasses.fields(ACTIONS[who])}
    given = {name: value for name, value in modifier.values.items() if name in fields or name not in _IDLE}
    values.check_names(who, given, fields, [n for n, f in fields.items() if f.default is dataclasses.MISSING])
    read = {name: values.converted(who, name, _CONVERT[name], value) for name, value in given.items()}
    return _checked(who, ACTIONS[who], read)


def _pruning(modifier: Modifier) -> Pruning:
    read, who = one_shot(modifier), modifier.name
    needed = ("init_sparsity", "start_epoch", "end_epoch", "update_frequency")
    values.check_names(who, read.schedule, SCHEDULE, needed)
    for name in needed[1:]:
        values.converted(who, name, _epoch, read.schedule[name])
    pruning: Pruning = _checked(who, Pruning, {"one_shot": read, **read.schedule})
    return pruning


def _checked(who: str, kind: Any, read: Mapping[str, Any]) -> Any:
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def _refusal(name: str) -> str:
    if "LearningRate" in name:
        return f"{name} is not carried out here; use LearningRateFunctionModifier or SetLearningRateModifier, or set the learning rate in the training loop"
    if "Pruning" in name or "Quantization" in name or "Distillation" in name:
        return general_refusal(name)
    return f"{name} is not carried out here; there are {', '.join([*ACTIONS, *KINDS])}. Use SparseML for it (Python 3.11, --engine sparseml), or take it out"


@dataclass
class TrainingRecipe:
    """What a recipe file asks for.

    Attributes:
        path: the file, for messages.
        actions: in the order in which they act within a step: by end, then by start.
    """

    path: str
    actions: list[Action] = field(default_factory=list)

    @property
    def pruning(self) -> list[Pruning]:
        """The modifiers that choose weights to prune."""
        return [a for a in self.actions if isinstance(a, Pruning)]

    @property
    def sets_learning_rate(self) -> bool:
        """Whether no other scheduler may act."""
        return any(isinstance(a, LearningRateFunction | SetLearningRate) for a in self.actions)

    @property
    def epochs(self) -> int:
        """The end of its last modifier; 0 where none has an end."""
        ends = [max(action.end_epoch, action.start_epoch) for action in self.actions]
        return max(math.ceil(max(ends, default=0.0) - SAME_EPOCH), 0)

    def climb(self, sparsities: Sequence[float]) -> None:
        """Let a list of sparsities decide the target of each update instead of the interpolation; updates after the last keep the last.

        Raises:
            UserError: more sparsities than updates, or a modifier with per-layer sparsities.
        """
        for pruning in self.pruning:
            if isinstance(pruning.one_shot.final_sparsity, dict):
                raise UserError(
                    f"{self.path}: --sparsities replaces init_sparsity and final_sparsity, numbers both; {pruning.one_shot.modifier} has none"
                )
        due = sorted({round(epoch, 6) for pruning in self.pruning for epoch in pruning.epochs()})
        check_ladder(due, sparsities, self.path)
        ladder = (due, list(sparsities))
        self.actions = [dataclasses.replace(a, ladder=ladder) if isinstance(a, Pruning) else a for a in self.actions]

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        steps_per_epoch: int,
        batches: Iterable[Any] | Any = None,
        loss_fn: LossFunction = default_loss,
        folder: str | Path = ".",
    ) -> RecipeRun:
        """Carry the recipe out in a training of ``model``; see :class:`capruner.recipes.run.RecipeRun`."""
        from capruner.recipes.run import RecipeRun

        return RecipeRun(self, model, optimizer, steps_per_epoch, batches, loss_fn, folder)


def check_ladder(due: Sequence[float], sparsities: Sequence[float], path: str) -> None:
    """Raise ``UserError`` if there are more sparsities than updates."""
    if len(sparsities) > len(due):
        shown = ", ".join(f"{epoch:g}" for epoch in due)
        raise UserError(
            f"--sparsities has {len(sparsities)} steps, but {path} updates {len(due)} times (at epochs {shown}); lower update_frequency"
        )


def rung(due: Sequence[float], sparsities: Sequence[float], epoch: float) -> float:
    """The sparsity of the last update that is due at ``epoch``."""
    last = bisect_right(due, epoch + SAME_EPOCH) - 1
    return sparsities[min(max(last, 0), len(sparsities) - 1)]


def load_training(path: str | Path) -> TrainingRecipe:
    """Read the recipe of a training; raise ``UserError`` if it is invalid or prunes nothing."""
    try:
        actions = [action(modifier) for modifier in read_modifiers(path)]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not any(isinstance(a, Pruning | ConstantPruning) for a in actions):
        raise UserError(f"{path} has no pruning modifier; 'capruner recipes list' names recipes that have")
    return TrainingRecipe(str(path), sorted(actions, key=_end_and_start))


def _end_and_start(action: Action) -> tuple[float, float]:
    return (math.inf if action.end_epoch == -1 else action.end_epoch, action.start_epoch)
