"""The contents of a report, before it is rendered as a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RANDOM_WEIGHTS = "The weights before pruning were random: the accuracies say nothing."


@dataclass
class Measurement:
    """A model at one sparsity, or dense.

    Attributes:
        name: its label, for example "75 %".
        requested: share of the prunable weights that was asked for; None: dense.
        prunable, overall: share of zeros over the prunable weights, and over all weights of the model.
        top1, top5: accuracy in %, None where it was not measured; ``top1_bn`` after BatchNorm recalibration.
        loss: on the validation images.
        predicted: increase of the calibration loss that the quadratic model predicts.
        divergence: of the calibration images' class probabilities from those of the dense network.
        macs: multiply-adds for one input that are left.
        layers: rows with name, numel, zeros, sparsity; perhaps predicted_loss.
        checkpoints: ``(text, link)``, links relative to the page.
    """

    name: str
    requested: float | None
    prunable: float
    overall: float
    top1: float | None = None
    top1_bn: float | None = None
    top5: float | None = None
    loss: float | None = None
    predicted: float | None = None
    divergence: float | None = None
    macs: int | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Contents:
    """A report.

    Attributes:
        title: of the page.
        model: timm's name of the architecture.
        levels: the dense model first, if it was measured, then ascending in sparsity.
        macs_dense: multiply-adds of the dense model for one input; None: not counted, and a note says why.
        macs_input: size of that input.
        macs_fixed: those among them that no sparsity of weights saves.
        search: how the sparsity was chosen, if it was: ``max_drop, images, dense, sparsity, top1, curve`` (pairs of sparsity and top-1).
        stages: rows with stage, seconds, perhaps peak_memory_gib, perhaps parts ``{name: seconds}``.
        epochs: rows with epoch, sparsity, top1, perhaps ema_top1, train_loss, lr (training only).
        facts: what was run, ``{name: value}``.
        recipe: its text.
        versions: of packages.
        files: ``(text, link)`` of what else lies in the folder.
        notes: what the reader has to know.
    """

    title: str
    model: str
    levels: list[Measurement]
    macs_dense: int | None = None
    macs_input: tuple[int, ...] = ()
    macs_fixed: int = 0
    search: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Measurement | None:
        """The dense model, if it was measured."""
        return self.levels[0] if self.levels and self.levels[0].requested is None else None

    @property
    def pruned(self) -> list[Measurement]:
        """All but the dense model."""
        return [level for level in self.levels if level.requested is not None]
