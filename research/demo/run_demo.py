#!/usr/bin/env python
"""CAP beside magnitude pruning beside SparseML's OBS (where it can be imported), on a vision transformer small enough for any machine.

  python research/demo/run_demo.py

Needs no data and no network: the digits come with scikit-learn, the trained weights with this repository. Each method goes through the real script,
research/one_shot_pruning.py, with a recipe of research/recipes/one_shot/*/digits_vit.yaml; everything is written to output/demo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from capruner.cli import arguments as cli
from capruner.vision import one_shot_pruning, output, plots
from research.demo.digits import MODEL, MODEL_KWARGS, PREPROCESSING, WEIGHTS, write_folders

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "research" / "recipes" / "one_shot"
SPARSITIES = (0.75, 0.9, 0.95, 0.98, 0.99)  # from where the first method suffers to where CAP does too
METHODS = {"cap": "CAP", "gm": "magnitude", "obs": "OBS (SparseML)"}


def prune(recipe: Path, data: Path, folder: Path, experiment: str, sparsities: Sequence[float]) -> dict[str, Any]:
    """Run the one-shot script on the digits; its summary."""
    one_shot_pruning.main(
        [
            *("--data-dir", str(data), "--model", MODEL, "--checkpoint", str(WEIGHTS)),
            *("--model-kwargs", *(f"{key}={value}" for key, value in MODEL_KWARGS.items())),
            *("--mean", *map(str, PREPROCESSING["mean"]), "--std", *map(str, PREPROCESSING["std"])),
            *("--crop-pct", str(PREPROCESSING["crop_pct"]), "--sparseml-recipe", str(recipe)),
            *("--sparsities", *map(str, sparsities), "-gb", "8", "-vb", "200", "--workers", "0", "--device", "cpu"),
            *("--output", str(folder), "--experiment", experiment, "--save-model", "--overwrite"),
        ]
    )
    return json.loads((folder / experiment / "summary.json").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "output"), help="parent folder (default output/ of this clone)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # faster than more on a model of this size
    folder = output.make_folder(args.output, "demo")
    write_folders(folder / "data")
    summaries = {}
    for method, label in methods().items():
        print(f"\n=== {label}", flush=True)
        summaries[label] = prune(RECIPES / method / "digits_vit.yaml", folder / "data", folder, method, args.sparsities)
    compare(folder, summaries)
    print(f"{time.perf_counter() - start:.0f} seconds in all")


def methods() -> dict[str, str]:
    """What is compared, by its folder of recipes: SparseML's OBS where SparseML can be imported."""
    try:
        importlib.import_module("capruner.sparseml")
    except ImportError as error:
        print(f"note: without {METHODS['obs']}: {error}")
        return {method: label for method, label in METHODS.items() if method != "obs"}
    return METHODS


def compare(folder: Path, summaries: dict[str, dict[str, Any]]) -> None:
    """One table and two pictures out of the summaries."""
    dense = next(iter(summaries.values()))["rows"][0]
    curves = {label: [(row["requested"], row["top1"]) for row in s["rows"][1:]] for label, s in summaries.items()}
    layers = {label: {e["requested"]: e["layers"] for e in s["layers"]} for label, s in summaries.items()}
    accuracy, by_layer = folder / "accuracy_vs_sparsity.png", folder / "layer_sparsity.png"
    plots.accuracy_vs_sparsity(
        accuracy, curves, dense["top1"], "A vision transformer on digits, pruned in one shot without retraining"
    )
    plots.layer_sparsity(by_layer, layers, "Weights removed from each layer (%)")
    rows = [{"sparsity": "dense", **{label: dense["top1"] for label in curves}}]
    for i, (sparsity, _) in enumerate(next(iter(curves.values()))):
        rows.append({"sparsity": f"{100 * sparsity:g} %", **{label: c[i][1] for label, c in curves.items()}})
    rows.append({"sparsity": "seconds", **{label: _seconds(s["rows"]) for label, s in summaries.items()}})
    print(f"\n=== Top-1 accuracy in % on {dense['images']} images the model has not seen\n")
    print(output.table(rows, {"sparsity": "sparsity", **{label: label for label in curves}}))
    print(f"\npictures: {accuracy}\n          {by_layer}")


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Time spent on pruning; what one calibration did for all sparsities counts once."""
    shared = "seconds_gradients" in rows[1]
    return rows[1]["seconds"] if shared else sum(row["seconds"] for row in rows[1:])


if __name__ == "__main__":
    sys.exit(cli.run(main))
