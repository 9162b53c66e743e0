"""How time and memory grow with the weights d, the gradients m and the block size B: fitted exponents, JSON and a picture.

    python benchmarks/scaling.py --plot scaling.png --json scaling.json

Whole calls of ``capruner.prune`` on a stack of Linear layers, each configuration in a process of its own (peak memory is the kernel's count, or CUDA's
allocator's on a GPU), medians over ``--runs``. An exponent is the slope of a least-squares line through the logarithms.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_bytes
from torch import nn

import capruner
from capruner.calibration.memory_plan import WORKING_SET

WIDTH = 384
BASE = {"layers": 2, "num_grads": 512, "block_size": 96}
AXES = {
    "d": ("layers", [1, 2, 4, 8]),
    "m": ("num_grads", [256, 512, 1024, 2048]),
    "B": ("block_size", [24, 48, 96, 192, 384]),
}
STAGES = ("gradients", "fisher", "eliminate", "allocate", "compensate")
# Linear in the weights and the gradients; accumulating and inverting B x B blocks of d / B rows takes m·d·B and d·B² operations.
ALLOWED = {"d": 1.05, "m": 1.05, "B": 2.0}


def measure(layers: int, num_grads: int, block_size: int, runs: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of each stage, and peak bytes beyond model and data as a multiple of ``d · B · 4``."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(device)
    x, y = torch.randn(num_grads, 1, WIDTH), torch.randint(10, (num_grads, 1))
    nn.functional.cross_entropy(model(x[0].to(device)), y[0].to(device)).backward()
    before, timings = peak_bytes(device), []
    for _ in range(runs):
        result = capruner.prune(
            model,
            list(zip(x, y)),
            nn.functional.cross_entropy,
            [0.5, 0.75, 0.9],
            num_grads=num_grads,
            fisher_block_size=block_size,
            damp=1e-6,
            progress=False,
        )
        timings.append(result.timings)
    d = layers * WIDTH**2
    stages = {stage: statistics.median(t[stage] for t in timings) for stage in STAGES}
    memory = (peak_bytes(device) - before) / (d * block_size * 4)
    return {"d": d, "m": num_grads, "B": block_size, "seconds": stages, "memory_ratio": memory}


def exponent(xs: list[float], ys: list[float]) -> float:
    """Slope of the logarithms."""
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def pruning_seconds(row: dict[str, Any]) -> float:
    """Everything but the gradients, which are the model's."""
    return sum(row["seconds"][stage] for stage in STAGES[1:])


def plot(rows: dict[str, list[dict[str, Any]]], exponents: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"d": "weights d", "m": "gradients m", "B": "block size B"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained")
    for column, axis in enumerate(rows):
        xs = [row[axis] for row in rows[axis]]
        time, memory = axes[:, column]
        for stage in ("fisher", "eliminate", "compensate"):
            time.loglog(xs, [row["seconds"][stage] for row in rows[axis]], marker="o", label=stage)
        time.loglog(xs, [pruning_seconds(row) for row in rows[axis]], "k--", marker="s", label="all of these")
        time.set(title=f"exponent {exponents[axis]:.2f}", ylabel="seconds" if column == 0 else None)
        blocks = [4 * row["d"] * row["B"] / 2**20 for row in rows[axis]]
        memory.loglog(
            xs, [row["memory_ratio"] * b for row, b in zip(rows[axis], blocks)], "C3", marker="o", label="peak"
        )
        memory.loglog(xs, blocks, "k--", label="4·d·B bytes")
        memory.loglog(xs, [b + WORKING_SET / 2**20 for b in blocks], "k:", label="and a working set of 128 MiB")
        memory.set(xlabel=titles[axis], ylabel="MiB beyond model and data" if column == 0 else None)
        for panel in (time, memory):
            panel.set_xticks(xs, [f"{x / 1000:.0f}k" if x > 9999 else str(x) for x in xs])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    axes[0, 0].legend()
    axes[1, 0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="write a picture to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(**args.child, runs=args.runs, device=torch.device(args.device))))
        return
    print(f"{'d':>9} {'m':>5} {'B':>4}" + "".join(f"{stage:>11}" for stage in STAGES) + f"{'memory':>8}")
    rows: dict[str, list[dict[str, Any]]] = {}
    for axis, (key, values) in AXES.items():
        rows[axis] = []
        for value in values:
            child = json.dumps(BASE | {key: value})
            command = [sys.executable, __file__, "--runs", str(args.runs), "--device", args.device, "--child", child]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows[axis].append(row)
            seconds = "".join(f"{row['seconds'][stage]:11.3f}" for stage in STAGES)
            print(f"{row['d']:9} {row['m']:5} {row['B']:4}{seconds}{row['memory_ratio']:8.2f}", flush=True)
    exponents = {
        axis: exponent([row[axis] for row in found], [pruning_seconds(row) for row in found])
        for axis, found in rows.items()
    }
    for axis, value in exponents.items():
        print(f"time grows as {axis}^{value:.2f} (at most {ALLOWED[axis]:g} asked)")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "exponents": exponents}, indent=1) + "\n")
    if args.plot:
        plot(rows, exponents, args.plot)


if __name__ == "__main__":
    main()
