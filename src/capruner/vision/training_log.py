"""The log of a training: a line per epoch, summary.csv, a plot, layer sparsities at each update, Weights & Biases."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capruner.recipes import read as read_recipe
from capruner.rows import mask_rows, zero_share
from capruner.vision import output
from capruner.vision.plots import COLOURS, plt
from capruner.vision.wandb_log import WandbLog

LINE = {
    "sparsity": "sparsity {:.4f}",
    "top1": "top-1 {:.2f}",
    "ema_top1": "EMA {:.2f}",
    "train_loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
}


class Log:
    """Rows of all epochs so far, restored on resuming: every file is written from them, so nothing is doubled or lost.

    Attributes:
        rows: one per epoch; row 0 is the model before training.
        updates: one per pruning update, with its layers.
        wandb_id: the run to continue in Weights & Biases.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, title: str) -> None:
        self.folder, self.args, self.title = folder, args, title
        self.rows: list[dict[str, Any]] = []
        self.updates: list[dict[str, Any]] = []
        self.wandb_id: str | None = None
        self._wandb: WandbLog | None = None

    def open_wandb(self) -> None:
        """Start or continue a run in Weights & Biases, if asked for."""
        if not self.args.log_wandb:
            return
        self._wandb = WandbLog(
            name=self.args.experiment,
            dir=str(self.folder),
            config=vars(self.args) | {"recipe": read_recipe(self.args.sparseml_recipe)},
            id=self.wandb_id,
            resume="allow" if self.wandb_id else None,
        )
        self.wandb_id = self._wandb.id or self.wandb_id

    def update(self, epoch: float, masks: Mapping[str, Tensor]) -> None:
        """Record a pruning update at ``epoch``."""
        layers = mask_rows(masks)
        self.updates.append({"epoch": epoch, "sparsity": zero_share(masks.values()), "layers": layers})
        output.write_json(self.folder / "layer_sparsity.json", self.updates)
        if self.args.log_sparsity:
            shown = [row | {"sparsity": 100 * row["sparsity"]} for row in layers]
            print(output.table(shown, {"name": "layer", "numel": "weights", "zeros": "removed", "sparsity": "%"}))

    def epoch(self, row: dict[str, Any], model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        """Record a finished epoch."""
        self.rows.append(row)
        parts = [text.format(row[key]) for key, text in LINE.items() if row.get(key) is not None]
        print(f"epoch {row['epoch']:>3}: " + ", ".join(parts) + f", {row['seconds']:.1f} s", flush=True)
        self.write()
        if self._wandb:
            shown = row | {f"sparsity/{layer['name']}": layer["sparsity"] for layer in mask_rows(masks)}
            if self.args.log_param_histogram:
                shown |= self._histograms(model, masks)
            self._wandb.log(shown, step=row["epoch"])

    def _histograms(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        import wandb

        parameters = dict(model.named_parameters())
        remaining = {name: parameters[name].detach()[mask].float().cpu().numpy() for name, mask in masks.items()}
        return {f"weights/{name}": wandb.Histogram(values) for name, values in remaining.items() if len(values)}

    def write(self) -> None:
        """Write all files."""
        output.write_csv(self.folder / "summary.csv", self.rows)
        output.write_json(self.folder / "layer_sparsity.json", self.updates)
        if len(self.rows) > 1:
            output.write_atomically(
                self.folder / "training.png", lambda partial: training_curves(partial, self.rows, self.title)
            )

    def close(self) -> None:
        """End the run in Weights & Biases."""
        if self._wandb:
            self._wandb.finish()


def training_curves(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Plot accuracy (above) and sparsity (below) over epochs."""
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5.5), height_ratios=(3, 2))
    epochs = [row["epoch"] for row in rows]
    for key, label, colour in (("top1", "model", COLOURS[0]), ("ema_top1", "moving average", COLOURS[1])):
        if any(row.get(key) is not None for row in rows):
            above.plot(
                epochs, [row.get(key) for row in rows], color=colour, linewidth=2, marker="o", markersize=4, label=label
            )
    above.axhline(rows[0]["top1"], color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    above.annotate(
        f"before training {rows[0]['top1']:.1f} %",
        (epochs[-1], rows[0]["top1"]),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#555555",
    )
    if any(row.get("ema_top1") is not None for row in rows):
        above.legend(frameon=False, loc="lower right")
    above.set_ylabel("top-1 accuracy (%)")
    above.set_title(title, loc="left", fontsize=11)
    below.step(epochs, [100 * row["sparsity"] for row in rows], where="pre", color=COLOURS[2], linewidth=2)
    below.set_ylabel("weights removed (%)")
    below.set_xlabel("epoch")
    below.set_ylim(0, 100)
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight", format="png")
    plt.close(figure)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return sum(rates) / len(rates)
