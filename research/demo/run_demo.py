#!/usr/bin/env python
"""CAP beside SparseML's OBS beside magnitude pruning, on a vision transformer small enough for any machine.

  python research/demo/run_demo.py

Needs no data and no network: the digits come with scikit-learn, the trained weights with this repository. Each method goes through the real script,
research/one_shot_pruning.py, with a recipe of research/recipes/one_shot/*/digits_vit.yaml; everything is written to output/demo.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from research import one_shot_pruning
from research.demo.digits import MODEL, MODEL_KWARGS, PREPROCESSING, WEIGHTS, write_folders
from research.utils import output, plots

SPARSITIES = (0.5, 0.75, 0.85, 0.9, 0.95)
METHODS = {"gm": "magnitude", "obs": "SparseML OBS", "cap": "CAP (this library)"}


def main() -> None:
    start = time.perf_counter()
    folder = output.make_folder(str(ROOT / "output"), "demo")
    if not (folder / "data").is_dir():
        write_folders(folder / "data")
    summaries = {}
    for method, label in METHODS.items():
        print(f"\n=== {label}", flush=True)
        recipe = ROOT / "research" / "recipes" / "one_shot" / method / "digits_vit.yaml"
        one_shot_pruning.main(
            [
                *("--data-dir", str(folder / "data"), "--model", MODEL, "--checkpoint", str(WEIGHTS)),
                *("--model-kwargs", *(f"{key}={value}" for key, value in MODEL_KWARGS.items())),
                *("--mean", *map(str, PREPROCESSING["mean"]), "--std", *map(str, PREPROCESSING["std"])),
                *("--crop-pct", str(PREPROCESSING["crop_pct"]), "--sparseml-recipe", str(recipe)),
                *("--sparsities", *map(str, SPARSITIES), "-gb", "8", "--workers", "0", "--save-model"),
                *("--output", str(folder), "--experiment", method),
            ]
        )
        summaries[label] = json.loads((folder / method / "summary.json").read_text())
    compare(folder, summaries)
    print(f"{time.perf_counter() - start:.0f} seconds in all")


def compare(folder: Path, summaries: dict[str, dict]) -> None:
    """One table and one picture out of the three summaries."""
    curves = {label: [(row["requested"], row["top1"]) for row in s["rows"][1:]] for label, s in summaries.items()}
    dense = next(iter(summaries.values()))["rows"][0]["top1"]
    plots.accuracy_vs_sparsity(
        folder / "accuracy_vs_sparsity.png",
        curves,
        dense,
        "Vision transformer on digits, pruned in one shot, no retraining",
    )
    rows = [{"method": "dense", "0": dense}]
    for label, curve in curves.items():
        rows.append({"method": label, **{f"{s:g}": top1 for s, top1 in curve}})
    heads = {"method": "top-1 % at sparsity", "0": "0"} | {f"{s:g}": f"{100 * s:g} %" for s in SPARSITIES}
    print("\n" + output.table(rows, heads))
    print(f"\npictures: {folder / 'accuracy_vs_sparsity.png'}\n          {folder / 'cap' / 'layer_sparsity.png'}")


if __name__ == "__main__":
    sys.exit(main())
