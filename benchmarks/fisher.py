"""The Fisher stage, sums of outer products and the inverse: compiled against torch's operations, as ratios within one run.

    python benchmarks/fisher.py                           # blocks of 64 to 512, float32 and float64, one core
    python benchmarks/fisher.py --block-sizes 192 --num-grads 1024 4096

Seconds are those of one core's work (``time.process_time``), so that other processes disturb little. Torch's operations are what a machine without numba does.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from capruner.core import factors
from capruner.core.fisher import BlockFisher
from capruner.core.products import FullSums

KERNEL = factors.matrices_kernel_for


def stage(gradients: Tensor, num_grads: int, by_torch: bool) -> tuple[float, float]:
    """Seconds of the sums and of the inverse; ``gradients`` ``(k, n, B)``, a slab that is added again and again."""
    k, n, B = gradients.shape
    factors.matrices_kernel_for = (lambda device: None) if by_torch else KERNEL
    start = time.process_time()
    fisher = BlockFisher(n, B, num_grads, 0.01, relative_damp=True, shrinkage=None, dtype=gradients.dtype)
    if by_torch:
        assert fisher._blocks is not None
        fisher._sums = FullSums(fisher._blocks, norms=True)
    for first in range(0, num_grads, k):
        fisher.add(gradients[: num_grads - first])
    assert fisher._sums is not None
    fisher._sums.settle(None)
    middle = time.process_time()
    phase_of = torch.zeros(n, dtype=torch.int64)
    fisher.set_common(fisher.sums(phase_of, 1, n), phase_of)
    fisher.inverse()
    return middle - start, time.process_time() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[64, 128, 192, 256, 512])
    parser.add_argument("--num-grads", type=int, nargs="+", default=[1024])
    parser.add_argument("--megabytes", type=int, default=32, help="of Fisher blocks")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| dtype | B | gradients | sums, s | by torch, s | ratio | inverse, s | by torch, s | ratio | both, ratio |")
    print("|---" * 10 + "|")
    for dtype in (torch.float32, torch.float64):
        for B in args.block_sizes:
            blocks = max(1, args.megabytes * 2**20 // (B * B * dtype.itemsize))
            gradients = torch.randn(max(6, B // 12), blocks, B, dtype=dtype)
            for m in args.num_grads:
                pairs = [(stage(gradients, m, False), stage(gradients, m, True)) for _ in range(args.runs + 1)][1:]
                cells = [str(dtype).removeprefix("torch."), B, m]
                for i in (0, 1):
                    cells += [f"{statistics.median(run[i] for run in version):.2f}" for version in zip(*pairs)]
                    cells.append(f"{statistics.median(before[i] / after[i] for after, before in pairs):.2f}")
                cells.append(f"{statistics.median(sum(before) / sum(after) for after, before in pairs):.2f}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
