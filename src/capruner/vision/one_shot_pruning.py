"""One run of one-shot pruning: the dense model, its data, a recipe or flags, and the rows of the summary."""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import capruner
from capruner import recipes
from capruner.cli.arguments import Parser, UserError
from capruner.cli.knobs import given
from capruner.models.macs import multiply_adds
from capruner.recipes.text import stored_text
from capruner.report import write_report
from capruner.rows import weight_rows
from capruner.vision import data as images
from capruner.vision import engines, evaluate, huggingface, modeling, one_shot_arguments, output, plots
from capruner.vision.wandb_log import WandbLog

COLUMNS = {
    "method": "method",
    "requested": "sparsity",
    "reached_prunable": "of prunable",
    "reached_all": "of all",
    "top1": "top-1 %",
    "top1_bn": "top-1 % (BN)",
    "top5": "top-5 %",
    "loss": "loss",
    "seconds": "seconds",
    "peak_memory_gib": "peak GiB",
}


class Run:
    """One run: the dense model, its data, and the rows of the summary so far."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.stages: list[dict[str, Any]] = []
        self._stage_began = time.perf_counter()
        path = args.sparseml_recipe
        if path:
            self.recipe = engines.open_recipe(path, args.engine, folder)
            self.recipe.override(given(args))
            text = stored_text(path)
        else:
            one_shot = one_shot_arguments.one_shot(args)
            self.recipe = engines.Native(one_shot, folder, "--params")
            text = one_shot_arguments.recipe_text(one_shot)
        if args.state_dir:
            self.recipe.override({"state_dir": args.state_dir})
        if args.allocate_by == "macs":
            self.recipe.override({"costs": None})
        self.device = modeling.pick_device(args.device)
        modeling.seed_everything(args.seed)
        self.model = modeling.build_model(args.model, args.model_kwargs, args.checkpoint, args.pretrained)
        self.model.to(self.device)
        self.names = self.recipe.names(self.model)
        self.train, val = images.open_splits(args.data_dir, args.dataset, self.model)
        if args.max_drop is not None:
            if not self.recipe.once:
                raise UserError(f"--max-drop is not supported by {self.recipe.modifier}; leave it out")
            self.train, self.held_out = images.hold_out(self.train, args.held_out, args.seed)
        self.config = images.preprocessing(args, self.model)
        self.val = images.loader(val, self.config, args.val_batch_size, args.workers, limit=args.val_limit)
        self.recipe.check_sparsities(self.model, args.sparsities)
        modeling.check_forward(self.model, self.config["input_size"], args.model)
        self.rows: list[dict[str, Any]] = []
        self.search: dict[str, Any] | None = None
        self.layers: dict[float, list[dict[str, Any]]] = {}
        self.wandb = (
            WandbLog(name=args.experiment, dir=str(folder), config=vars(args) | {"recipe": text})
            if args.log_wandb
            else None
        )
        self.macs = multiply_adds(self.model, self.config["input_size"])
        output.remove_earlier(folder)
        output.write_atomically(folder / "recipe.yaml", lambda partial: partial.write_text(text, encoding="utf-8"))
        self.stage_done("load model and data")

    @property
    def method(self) -> str:
        ours = {"cap": "CAP", "fast_cap": "FastCAP"}
        name = ours.get(self.recipe.method, self.recipe.modifier.removesuffix("PruningModifier"))
        return f"{name} + distillation" if self.recipe.distill_passes else name

    def calibration_batches(self) -> images.CalibrationBatches:
        """Batches of the training split, in an order that depends on ``--seed`` alone."""
        args = self.args
        return images.CalibrationBatches(
            self.train, self.config, args.gs_batch_size, args.workers, args.gs_aug, args.seed, self.device
        )

    def stage_done(self, stage: str, parts: dict[str, float] | None = None) -> None:
        """End a stage and begin the next. ``parts``: seconds of each of its parts."""
        now = time.perf_counter()
        row = {"stage": stage, "seconds": now - self._stage_began, "peak_memory_gib": peak_memory(self.device)}
        self.stages.append(row | ({"parts": parts} if parts else {}))
        self._stage_began = now

    def record(
        self,
        model: nn.Module,
        requested: float | None,
        seconds: float,
        stages: dict[str, float],
        predicted: dict[str, float] | None = None,
        divergence: float | None = None,
    ) -> None:
        """Measure a model, write its checkpoint and update the summary.

        Args:
            predicted: increase of the loss by layer.
            divergence: from the dense network's outputs, on calibration images.
        """
        weights = dict(model.named_parameters())
        layers = weight_rows(weights, self.names)
        zeros, prunable = (sum(layer[key] for layer in layers) for key in ("zeros", "numel"))
        shares = {layer["name"]: layer["sparsity"] for layer in layers}
        row: dict[str, Any] = {
            "method": "dense" if requested is None else self.method,
            "requested": requested,
            "reached_prunable": zeros / prunable,
            "reached_all": zeros / sum(p.numel() for p in weights.values()),
            **evaluate.evaluate(model, self.val, self.device),
            "seconds": seconds,
            **{f"seconds_{stage}": value for stage, value in stages.items()},
            "peak_memory_gib": peak_memory(self.device),
            "predicted_loss": None if predicted is None else sum(predicted.values()),
            "divergence": divergence,
            "macs_left": self.macs.left(shares),
        }
        if requested is not None:
            if predicted is not None:
                for layer in layers:
                    layer["predicted_loss"] = predicted.get(layer["name"], 0.0)
            self.layers[requested] = layers
            self.save(model, f"sparsity_{requested:g}")
            if self.args.recalibrate_bn:
                self.recalibrate(model, row)
        self.rows.append(row)
        self.stage_done("evaluate dense" if requested is None else f"evaluate at {100 * requested:g} %")
        if self.wandb:
            shares = {f"sparsity/{name}": share for name, share in shares.items()}
            self.wandb.log(row | shares)
        self.write()

    def recalibrate(self, model: nn.Module, row: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(self.args.seed)
        loader = images.loader(
            self.train, self.config, self.args.val_batch_size, self.args.workers, shuffle=True, generator=generator
        )
        if capruner.recalibrate_bn(model, loader, self.args.recalibrate_bn):
            again = evaluate.evaluate(model, self.val, self.device, "after BatchNorm recalibration")
            row |= {f"{key}_bn": again[key] for key in ("top1", "top5", "loss")}
            self.save(model, f"sparsity_{row['requested']:g}_bn")

    def save(self, model: nn.Module, name: str) -> None:
        folder = self.folder / "checkpoints"
        if not self.args.save_model:
            return
        folder.mkdir(exist_ok=True)
        if self.args.save_model == "sparse":
            capruner.save_sparse(model, folder / f"{name}.safetensors")
        elif huggingface.is_huggingface(self.args.model):
            huggingface.save(model, folder / name)
        else:
            output.save_weights(folder / f"{name}.safetensors", model)

    def write(self, finished: bool = False) -> None:
        packages = ["torch", "torchvision", "timm", "numpy"] + ["sparseml"] * (self.recipe.name == "sparseml")
        versions = {"python": platform.python_version(), "capruner": capruner.__version__}
        versions |= {name: version(name) for name in packages}
        summary = {
            "finished": finished,
            "arguments": vars(self.args),
            "recipe": recipes.read(self.folder / "recipe.yaml"),
            "engine": self.recipe.name,
            "versions": versions,
            "device": str(self.device),
            "macs": asdict(self.macs),
            "stages": self.stages,
            "rows": self.rows,
            "search": self.search,
            "layers": [{"requested": s, "layers": rows} for s, rows in self.layers.items()],
        }
        output.write_json(self.folder / "summary.json", summary)
        output.write_csv(self.folder / "summary.csv", self.rows)

    def finish(self) -> None:
        curve = [(row["requested"], row["top1"]) for row in self.rows[1:]]
        title = f"{self.args.model} pruned in one shot by {self.method}"
        plots.accuracy_vs_sparsity(
            self.folder / "accuracy_vs_sparsity.png", {self.method: curve}, self.rows[0]["top1"], title
        )
        plots.layer_sparsity(
            self.folder / "layer_sparsity.png",
            {self.method: self.layers},
            f"Weights removed from each layer by {self.method} (%)",
        )
        shown = {key: heading for key, heading in COLUMNS.items() if key != "top1_bn" or self.args.recalibrate_bn}
        percent = [
            row
            | {
                key: None if row[key] is None else round(100 * row[key], 3)
                for key in ("requested", "reached_prunable", "reached_all")
            }
            for row in self.rows
        ]
        self.write(finished=True)
        write_report(self.folder)
        print("\n" + output.table(percent, shown))
        print(f"\nwritten to {self.folder}")
        if self.wandb:
            self.wandb.finish()


def peak_memory(device: torch.device) -> float:
    """High-water mark of this process in GiB: GPU allocations, or resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def prune_by_one_calibration(run: Run) -> None:
    start = time.perf_counter()
    costs = run.macs.per_weight(run.model) if run.args.allocate_by == "macs" else None
    result = run.recipe.prune(run.model, run.args.sparsities, run.calibration_batches(), costs=costs)
    record_levels(run, result, time.perf_counter() - start)


def prune_within_a_drop(run: Run) -> None:
    """Find the largest sparsity within ``--max-drop`` on held-out training images, and measure it."""
    args, start = run.args, time.perf_counter()
    costs = run.macs.per_weight(run.model) if args.allocate_by == "macs" else None
    calibration = run.recipe.calibrate(run.model, run.calibration_batches(), costs=costs)
    held_out = images.loader(run.held_out, run.config, args.val_batch_size, args.workers)

    def top1(model: nn.Module) -> float:
        return evaluate.evaluate(model, held_out, run.device, "held-out images")["top1"]

    best = calibration.sparsest(top1, within=args.max_drop)
    run.search = {
        "max_drop": args.max_drop,
        "images": len(run.held_out),
        "dense": best.dense,
        "sparsity": best.sparsity,
        "top1": best.value,
        "curve": best.curve,
    }
    print(
        f"within {args.max_drop:g} points on {len(run.held_out)} held-out training images: {100 * best.sparsity:.1f} %, "
        f"top-1 {best.value:.2f} % (dense {best.dense:.2f} %)"
    )
    record_levels(run, best.result, time.perf_counter() - start)


def record_levels(run: Run, result: capruner.PruningResult, seconds: float) -> None:
    """Measure every level of a result that took ``seconds``."""
    run.stage_done("calibrate and prune", result.timings)
    capruner.measure_divergence(result, run.model, images.PlainBatches(run.calibration_batches(), {}))
    output.write_atomically(run.folder / "result.safetensors", result.save)
    run.stage_done("measure divergence")
    for sparsity in result.sparsities:
        model = copy.deepcopy(run.model)
        result.apply(model, sparsity)
        level = result.level(sparsity)
        run.record(model, sparsity, seconds, result.timings, dict(level.losses), level.divergence)
        asked, found = (
            sum(r["zeros"] for r in result.layer_report(sparsity)),
            sum(r["zeros"] for r in run.layers[sparsity]),
        )
        if found < asked:
            raise RuntimeError(f"{found} zeros in the model where the masks have {asked}: please report this")


def prune_at_each_sparsity(run: Run) -> None:
    wanted = run.args.sparsities or [run.recipe.final_sparsity]
    for sparsity in sorted(set(wanted)):
        model = copy.deepcopy(run.model)
        modeling.seed_everything(run.args.seed)
        start = time.perf_counter()
        run.recipe.apply_at(str(run.folder / "recipe.yaml"), model, sparsity, run.calibration_batches)
        run.stage_done(f"prune to {100 * sparsity:g} %")
        run.record(model, sparsity, time.perf_counter() - start, {})


def prune(args: argparse.Namespace) -> None:
    """Prune as ``args`` (see :mod:`capruner.vision.one_shot_arguments`) say."""
    with output.new_folder(args.output, args.experiment) as folder:
        output.check_unused(folder, args.overwrite, args.checkpoint)
        run = Run(args, folder)
    run.record(run.model, None, 0.0, {})
    dense = run.rows[0]
    print(f"dense: top-1 {dense['top1']:.2f} % of {dense['images']} images; {len(run.names)} layers to prune")
    if run.recipe.once:
        print(f"\n{run.recipe.plan(run.model, run.calibration_batches())}\n")
        run.stage_done("plan")
        (prune_by_one_calibration if args.max_drop is None else prune_within_a_drop)(run)
    else:
        prune_at_each_sparsity(run)
    run.finish()
    if run.recipe.once:
        run.recipe.remove_state()


def main(argv: Sequence[str] | None = None) -> None:
    """Prune as a command line says."""
    parser = Parser()
    one_shot_arguments.add_arguments(parser)
    prune(one_shot_arguments.checked(parser.parse_args(argv)))
