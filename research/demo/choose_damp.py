#!/usr/bin/env python
"""The damping of the demo's recipes: accuracy on the training digits for a range of values, for CAP and for SparseML's OBS.

python research/demo/choose_damp.py

The validation digits are not looked at. The best damp is the one with the highest mean over the sparsities.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from capruner import NotPositiveDefiniteError
from capruner.vision import output
from research.demo.digits import write_folders
from research.demo.run_demo import METHODS, RECIPES, SPARSITIES, prune

DAMPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_folders(folder)
        shutil.rmtree(folder / "val")
        shutil.copytree(folder / "train", folder / "val")
        for method in ("cap", "obs"):
            text = (RECIPES / method / "digits_vit.yaml").read_text(encoding="utf-8")
            for damp in DAMPS:
                recipe = folder / "digits_vit.yaml"
                recipe.write_text(re.sub(r"damp: .*", f"damp: {damp:.1e}", text), encoding="utf-8")
                row = {"method": METHODS[method], "damp": f"{damp:.0e}"}
                try:
                    found = prune(recipe, folder, folder / "output", f"{method}-{damp:.0e}", SPARSITIES)["rows"][1:]
                except NotPositiveDefiniteError:  # too little damping for single precision
                    found = []
                row |= {f"{r['requested']:g}": r["top1"] for r in found}
                row["mean"] = sum(r["top1"] for r in found) / len(found) if found else None
                rows.append(row)
    headings = {key: key for key in ("method", "damp", *(f"{s:g}" for s in SPARSITIES), "mean")}
    print("\nTop-1 accuracy in % on the training digits\n\n" + output.table(rows, headings))


if __name__ == "__main__":
    main()
