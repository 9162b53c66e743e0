"""Prune again and again in one process: memory must stay flat, and no file may stay open.

    python qa/soak.py --minutes 40

Each round is a whole one-shot run of ``capruner.prune`` (CAP, FastCAP, with a state folder, per sample, in groups, with recomputations, in turns), a result
saved and loaded. Reports the slope of the resident memory by least squares over the rounds after a warm-up, and the open file handles.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import capruner

MIB = 2**20
ROUNDS: list[dict[str, Any]] = [
    {"sparsity": [0.5, 0.8]},
    {"sparsity": 0.8, "method": "fast_cap"},
    {"sparsity": 0.8, "state": True},
    {"sparsity": 0.8, "gradients": "sample"},
    {"sparsity": 0.8, "memory_budget": "140MiB"},
    {"sparsity": 0.8, "num_recomputations": 2},
    {"sparsity": 0.5, "mask_type": "2:4"},
    {"sparsity": 0.8, "labels": "model"},
]


def resident() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128), nn.GELU(), nn.Linear(128, 16))


def one_round(arguments: dict[str, Any], folder: Path) -> None:
    model = net()
    data = [(torch.randn(16, 128), torch.randint(16, (16,))) for _ in range(64)]
    given = {k: v for k, v in arguments.items() if k != "state"}
    place = folder / "state" if "state" in arguments else None
    result = capruner.prune(
        model, data, num_grads=64, fisher_block_size=64, damp=1e-4, state_dir=place, progress=False, **given
    )
    result.save(folder / "result.safetensors")
    capruner.load_result(folder / "result.safetensors").apply(model, result.sparsities[-1])
    if place is not None:
        capruner.remove_state(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument(
        "--warm-up", type=float, default=0.1, help="share of the time that does not count (default 0.1)"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.monotonic()
    rows: list[tuple[float, float, int]] = []
    shown = 0.0
    with tempfile.TemporaryDirectory() as folder:
        while (minute := (time.monotonic() - began) / 60) < args.minutes:
            for arguments in ROUNDS:
                one_round(arguments, Path(folder))
            gc.collect()
            rows.append((minute, resident(), handles()))
            if minute - shown >= 1 or not shown:
                shown = minute or 1e-9
                print(
                    f"{minute:5.1f} min  {len(rows) * len(ROUNDS):6d} runs  {rows[-1][1]:7.1f} MiB  {rows[-1][2]} handles",
                    flush=True,
                )
    counted = [row for row in rows if row[0] >= args.warm_up * args.minutes]
    minutes, memory, opened = (np.array(column) for column in zip(*counted))
    slope = np.polyfit(minutes, memory, 1)[0] if len(counted) > 1 else float("nan")
    print(
        f"{len(rows) * len(ROUNDS)} runs in {args.minutes:g} minutes: {slope:+.3f} MiB per minute "
        f"({slope * (minutes[-1] - minutes[0]) / (len(counted) * len(ROUNDS)) * 1024:+.2f} KiB per run), {memory.min():.1f} to {memory.max():.1f} MiB, "
        f"{opened.min():.0f} to {opened.max():.0f} open handles"
    )


if __name__ == "__main__":
    main()
