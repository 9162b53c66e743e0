"""Accuracy after one-shot pruning: models × methods × settings × seeds, all from the same calibration images.

    python benchmarks/accuracy.py run DATA --models vit conv --methods cap magnitude --sparsities 0.9 0.95 --seeds 0 1 2
    python benchmarks/accuracy.py run DATA --models vit --methods cap --set damp=1e-8,1e-7,1e-6 --sparsities 0.9
    python benchmarks/accuracy.py run DATA --models vit --set num_grads=auto,1024 images=8192 --sparsities 0.9
    python benchmarks/accuracy.py table --models vit --by method damp
    python benchmarks/accuracy.py plot accuracy.png --models vit conv hybrid --split val

``DATA`` holds CIFAR-10 as ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``. Every case (one model, method, setting and seed) leaves one JSON file under
``--output``; a case that is there is not run again, so runs can be killed, continued and shared by several processes.

Calibration images are drawn from the training split without its first 5,000 images (of a fixed random order). Settings are chosen on those
(``--split select``); ``--split val`` is for what gets reported. All methods see the same ``--images`` per seed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from cifar import HELD_OUT, PRUNED, accuracy, load_images, load_model, normalise, top1
from peers import SPARSEML, by_sparseml
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.files import digest, replacing
from capruner.models.selection import select_parameters

OURS = ("cap", "fast_cap", "obs", "magnitude")
DEFAULTS: dict[str, Any] = {
    "images": 4096,
    "batch": 8,
    "gradients": "batch",
    "labels": "data",
    "recomputations": 1,
    "each": "share",
    "bn_batches": 0,
    "classes": 10,
    "mask_type": "unstructured",
    "fisher_block_size": None,
    "damp": None,
    "relative_damp": None,
}
"""None: the method's own default. Any other keyword of ``capruner.prune`` can be set too. ``each``: every recomputation draws its ``share`` of the
images, or ``all`` of them again. ``classes``: calibrate on images of the first so many classes only."""

# Not passed on to `prune` as they are: what data there is and how it is used.
HERE = ("images", "batch", "recomputations", "each", "bn_batches", "classes", "num_grads")


class Batches:
    """Calibration data: ``(inputs, targets)`` from the start at each iteration, as a loader does."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, model: str) -> None:
        self.images, self.labels, self.batch, self.model = images, labels, batch, model

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True):
            yield normalise(x, self.model), y


def calibration(data: tuple[Tensor, Tensor], case: dict[str, Any]) -> Batches:
    images, labels = (t[HELD_OUT:] for t in data)
    images, labels = images[labels < case["classes"]], labels[labels < case["classes"]]
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(case["seed"]))[: case["images"]]
    images, labels = images[chosen], labels[chosen]
    return Batches(images, labels, case["batch"], case["model"])


def given(case: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not left to their defaults."""
    return {k: v for k, v in case["settings"].items() if k not in HERE and v is not None}


def num_grads(case: dict[str, Any]) -> int | str:
    """Per calibration: what ``images`` allow, shared out over the recomputations, unless it is set."""
    if "num_grads" in case:
        return case["num_grads"]
    per_gradient = 1 if case["gradients"] == "sample" else case["batch"]
    return case["images"] // per_gradient // (case["recomputations"] if case["each"] == "share" else 1)


class Iterate:
    """An iterator over an iterable that begins again when it ends: recomputations read on where the last one stopped."""

    def __init__(self, batches: Batches) -> None:
        self.batches = itertools.cycle(batches)

    def __iter__(self) -> Iterate:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self.batches)


def pruned_models(
    case: dict[str, Any], model: nn.Module, batches: Batches
) -> Iterator[tuple[float, nn.Module, dict[str, Any]]]:
    """Per sparsity: the pruned model, seconds by stage, and of our methods the predicted loss increase and the number of gradients."""
    if case["method"] in SPARSEML:
        for sparsity in case["sparsities"]:
            pruned, start = copy.deepcopy(model), time.perf_counter()
            settings = {k: v for k, v in given(case).items() if k in ("damp", "fisher_block_size", "mask_type")}
            params = PRUNED[case["model"]]
            by_sparseml(case["method"], pruned, batches, sparsity, params, num_grads(case), **settings)
            if passes := case["settings"].get("distill_passes"):
                capruner.distill(pruned, model, batches, passes=passes, progress=False)
            yield sparsity, pruned, {"seconds": {"total": time.perf_counter() - start}}
        return
    result = capruner.prune(
        model,
        Iterate(batches) if case["recomputations"] > 1 else batches,
        F.cross_entropy,
        case["sparsities"],
        method=case["method"],
        params=PRUNED[case["model"]],
        num_grads=num_grads(case),
        num_recomputations=case["recomputations"],
        progress=False,
        **given(case),
    )
    for note in result.settings["distill"]:
        print(note, flush=True)
    for sparsity in result.sparsities:
        pruned = copy.deepcopy(model)
        result.apply(pruned, sparsity)
        facts = {"predicted_loss": result.predicted_loss(sparsity), "drawn": result.settings["num_grads"]}
        yield sparsity, pruned, {"seconds": result.timings, **facts}


def run_case(case: dict[str, Any], data: dict[str, tuple[Tensor, Tensor]], weights: Path | None) -> dict[str, Any]:
    torch.manual_seed(case["seed"])
    model = load_model(case["model"], weights if case["model"] == "vit" else None)
    images, labels = data["val"] if case["split"] == "val" else tuple(t[:HELD_OUT] for t in data["train"])
    images, labels = images[: case["limit"]], labels[: case["limit"]]
    batches = calibration(data["train"], case)
    if case["model"] == "imagenet":
        # Statistics of these images, which are not ImageNet's: re-estimating them later must not change the dense network.
        capruner.recalibrate_bn(model, Batches(*(t[:1024] for t in data["train"]), 256, "imagenet"))
        labels, batches.labels = top1(model, images, "imagenet"), top1(model, batches.images, "imagenet")
    rows = []
    for sparsity, pruned, facts in pruned_models(case, model, batches):
        chosen = select_parameters(pruned, PRUNED[case["model"]]).values()
        row = {
            "sparsity": sparsity,
            "reached": sum(int((p == 0).sum()) for p in chosen) / sum(p.numel() for p in chosen),
            "top1": accuracy(pruned, images, labels, case["model"]),
            **facts,
        }
        if case["bn_batches"]:
            size = min(256, len(batches.images))
            recalibration = Batches(batches.images, batches.labels, size, case["model"])
            capruner.recalibrate_bn(pruned, recalibration, min(case["bn_batches"], len(batches.images) // size))
            row["top1_bn"] = accuracy(pruned, images, labels, case["model"])
        rows.append(row)
    return {"case": case, "dense": accuracy(model, images, labels, case["model"]), "rows": rows}


def cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    items = (item.split("=") for item in args.set)
    grid = {key: [parsed(v) for v in values.split(",")] for key, values in items}
    for seed, model, method in itertools.product(args.seeds, args.models, args.methods):
        for values in itertools.product(*grid.values()):
            settings = DEFAULTS | dict(zip(grid, values, strict=True))
            yield {
                "model": model,
                "method": method,
                "seed": seed,
                "split": args.split,
                "limit": args.limit,
                "sparsities": sorted(args.sparsities),
                "settings": {k: v for k, v in settings.items() if k not in HERE},
                **{k: settings[k] for k in HERE if k in settings},
                "gradients": settings["gradients"],
                "mask_type": settings["mask_type"],
            }


def parsed(text: str) -> Any:
    """A value as recipes write it; YAML takes ``1e-7`` for a string, and ``2:4`` for the number 124, which `prune` understands."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    data: dict[str, tuple[Tensor, Tensor]] = {}
    for case in cases(args):
        file = args.output / f"{digest([case])[:16]}.json"
        claim = file.with_suffix(".claim")
        if file.exists() or (claim.exists() and alive(claim)):
            continue
        claim.write_text(str(os.getpid()))
        data = data or {split: load_images(args.data, split, args.cache) for split in ("train", "val")}
        start = time.perf_counter()
        result = run_case(case, data, args.vit_weights)
        with replacing(file) as partial:
            partial.write_text(json.dumps(result, indent=1))
        claim.unlink()
        shown = " ".join(f"{100 * r['sparsity']:g}%:{r.get('top1_bn', r['top1']):.2f}" for r in result["rows"])
        changed = {k: v for k, v in (case["settings"] | case).items() if k in DEFAULTS and v != DEFAULTS[k]}
        print(
            f"{case['model']} {case['method']} seed {case['seed']} {changed}: dense {result['dense']:.2f}, {shown} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


def alive(claim: Path) -> bool:
    try:
        os.kill(int(claim.read_text()), 0)
    except (ProcessLookupError, ValueError, FileNotFoundError):
        return False
    return True


def collected(args: argparse.Namespace) -> dict[tuple[str, ...], dict[float, list[float]]]:
    """Per model and setting, at each sparsity (0: dense), the values of all seeds."""
    found: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for file in sorted(args.output.glob("*.json")):
        result = json.loads(file.read_text())
        case = result["case"] | result["case"]["settings"]
        if case["split"] != args.split or case["model"] not in args.models:
            continue
        if any(str(case[k]) not in v.split(",") for k, v in (item.split("=") for item in args.where)):
            continue
        key = tuple(str(case.get(k)) for k in ["model", *args.by])
        for row in result["rows"]:
            if row.get(args.column) is not None:
                found.setdefault(key, {}).setdefault(row["sparsity"], []).append(row[args.column])
        found.setdefault(key, {}).setdefault(0.0, []).append(result["dense"])
    if not found:
        raise SystemExit(f"nothing in {args.output} of {', '.join(args.models)} on {args.split}: `run` first")
    return found


def table(args: argparse.Namespace) -> None:
    """Mean over seeds, and half the difference between the largest and the smallest."""
    found = collected(args)
    columns = sorted({s for row in found.values() for s in row})
    print("| " + " | ".join(["model", *args.by] + [f"{100 * s:g} %" for s in columns]) + " |")
    print("|---" * (len(args.by) + 1 + len(columns)) + "|")
    for key, row in sorted(found.items(), key=lambda item: sort_key(item[0])):
        print("| " + " | ".join([*key, *(shown(row.get(s)) for s in columns)]) + " |")


def plot(args: argparse.Namespace) -> None:
    """Accuracy against sparsity, a panel for each model; bars from the worst to the best seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = collected(args)
    figure, panels = plt.subplots(1, len(args.models), figsize=(4.2 * len(args.models), 3.6), squeeze=False)
    # Lines that are all high up are looked at closely.
    least = min(v for row in found.values() for values in row.values() for v in values)
    lowest = max(0, 10 * math.floor(least / 10) - 10)
    colours = {label: f"C{i}" for i, label in enumerate(sorted({key[1:] for key in found}))}
    for axes, model in zip(panels[0], args.models):
        for (_, *label), row in sorted(item for item in found.items() if item[0][0] == model):
            sparsities = sorted(s for s in row if s > 0)
            places = [-math.log2(1 - s) for s in sparsities]
            means = [statistics.fmean(row[s]) for s in sparsities]
            spread = [[m - min(row[s]), max(row[s]) - m] for m, s in zip(means, sparsities)]
            colour = colours[tuple(label)]
            said = [
                v if by == "method" else f"{by.replace('_', ' ')} {v}" for by, v in zip(args.by, label) if v != "None"
            ]
            axes.errorbar(places, means, list(zip(*spread)), marker="o", markersize=4, capsize=3, color=colour, label=", ".join(said))  # fmt: skip
        dense = statistics.fmean(next(row for key, row in found.items() if key[0] == model)[0.0])
        axes.axhline(dense, color="grey", linestyle=":", linewidth=1, label="dense")
        ticks = sorted({s for key, row in found.items() if key[0] == model for s in row if s > 0})
        axes.set_xticks([-math.log2(1 - s) for s in ticks], [f"{100 * s:g}" for s in ticks])
        axes.set(title=model, xlabel="weights removed (%)", ylabel="top-1 (%)")
        axes.set_ylim(lowest, 100 if lowest == 0 else None)
        axes.grid(alpha=0.3)
    named = {label: line for axes in panels[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=min(6, len(named)), frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(args.picture, dpi=120)


def sort_key(key: tuple[str, ...]) -> list[tuple[float, str]]:
    """Numbers by size, before words."""
    values = [parsed(k) for k in key]
    return [(v, "") if isinstance(v, int | float) else (float("inf"), str(v)) for v in values]


def shown(values: list[float] | None) -> str:
    if not values:
        return "–"
    spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run", help="run what is missing")
    runner.add_argument("data", type=Path)
    runner.add_argument("--methods", nargs="+", default=["cap"], choices=[*OURS, *SPARSEML])
    runner.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.75, 0.9, 0.95, 0.98])
    runner.add_argument("--seeds", nargs="+", type=int, default=[0])
    runner.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=V1,V2", help="settings; several values make a grid"
    )
    runner.add_argument("--limit", type=int, default=2000, help="evaluate on this many images")
    runner.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    runner.add_argument("--vit-weights", type=Path, help="weights of the ViT when they are not in benchmarks/models")
    runner.set_defaults(function=run)
    printer = commands.add_parser("table", help="print a Markdown table of what has been run")
    printer.set_defaults(function=table)
    painter = commands.add_parser("plot", help="draw what has been run")
    painter.add_argument("picture", type=Path, help="file to write, a .png say")
    painter.set_defaults(function=plot)
    for command in (printer, painter):
        command.add_argument("--by", nargs="+", default=["method"], help="what the rows, or lines, are")
        command.add_argument("--where", nargs="*", default=[], metavar="KEY=V1,V2", help="only these cases")
        command.add_argument(
            "--column",
            default="top1",
            choices=["top1", "top1_bn", "predicted_loss", "reached", "drawn"],
            help="default top1",
        )
    for command in (runner, printer, painter):
        command.add_argument("--models", nargs="+", default=["vit"], choices=sorted(PRUNED))
        command.add_argument("--split", default="select", choices=["select", "val"])
        command.add_argument("--output", type=Path, default=Path("output/accuracy"))
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
