"""Peak memory of a calibration, beyond model and data, as a multiple of the ``d · B · 4`` bytes that the inverse Fisher blocks take.

    python benchmarks/memory.py
    python benchmarks/memory.py --width 1024 --block-size 48 --sparsities 0.9

Each configuration runs in a process of its own; peak memory is the kernel's count (``ru_maxrss``), or CUDA's allocator's on a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys

import torch
from torch import nn

import capruner


def peak_bytes(device: torch.device) -> int:
    """High-water mark of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Prune once and compare the peak with what stood before."""
    device = torch.device(args.device)
    width = args.width
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(args.layers))).to(device)
    data = [(torch.randn(1, width), torch.zeros(1, dtype=torch.int64)) for _ in range(args.num_grads)]
    nn.functional.cross_entropy(model(data[0][0].to(device)), data[0][1].to(device)).backward()
    before = peak_bytes(device)
    capruner.prune(
        model,
        data,
        nn.functional.cross_entropy,
        args.sparsities,
        num_grads=args.num_grads,
        fisher_block_size=args.block_size,
        damp=1e-6,
        progress=False,
    )
    d = width * width * args.layers
    blocks = d * args.block_size * 4
    return {
        "d": d,
        "fisher_bytes": blocks,
        "peak_bytes": peak_bytes(device) - before,
        "ratio": (peak_bytes(device) - before) / blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="layers are width x width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-size", type=int, nargs="+", default=[48, 96, 192])
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.block_size = args.block_size[0]
        print(json.dumps(measure(args)))
        return
    print(f"{'d':>10} {'B':>5} {'d·B·4 MiB':>10} {'peak MiB':>9} {'ratio':>6}")
    for B in args.block_size:
        command = [sys.executable, __file__, "--child", *sys.argv[1:], "--block-size", str(B)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        mib = 2**20
        print(
            f"{row['d']:>10} {B:>5} {row['fisher_bytes'] / mib:>10.0f} {row['peak_bytes'] / mib:>9.0f} {row['ratio']:>6.2f}"
        )


if __name__ == "__main__":
    main()
