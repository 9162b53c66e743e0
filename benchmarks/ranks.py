"""One calibration shared out over processes (gloo, one CPU thread each): wall time, each rank's memory, bytes on the wire, equal masks.

    python benchmarks/ranks.py                 # 1, 2 and 4 processes
    python benchmarks/ranks.py --depth 4 --block-size 128 --num-grads 128 --sizes 1 2

The model is a ViT with random weights on random images: neither changes time or memory. More processes than cores share the cores: watch the column
``cpu``, the CPU seconds of the busiest rank, where the wall clock cannot show what a machine with more cores would.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

import capruner
from capruner.core.blocks import BlockLayout
from capruner.files import digest
from capruner.models.selection import select_parameters

PARAMS = ["re:blocks.[0-9]+.(attn|mlp).*weight$"]


def batches(num_grads: int, rank: int, size: int) -> list:
    """Every ``size``-th batch of one common stream."""
    generator = torch.Generator().manual_seed(1)
    stream = [
        (torch.randn(4, 3, 32, 32, generator=generator), torch.randint(10, (4,), generator=generator))
        for _ in range(num_grads)
    ]
    return stream[rank::size]


def counted(size: int) -> dict[str, int]:
    """Bytes that this process sends to others from now on, by collective."""
    sent = {"all_to_all_single": 0, "all_gather": 0}
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted_exchange(received: Tensor, mine: Tensor, takes: list[int], gives: list[int]) -> Any:
        sent["all_to_all_single"] += (mine.numel() - gives[dist.get_rank()]) * mine.element_size()
        return exchange(received, mine, takes, gives)

    def counted_gather(parts: list[Tensor], mine: Tensor) -> Any:
        sent["all_gather"] += (size - 1) * mine.numel() * mine.element_size()
        return gather(parts, mine)

    dist.all_to_all_single, dist.all_gather = counted_exchange, counted_gather
    return sent


def work(rank: int, size: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=args.width,
        depth=args.depth,
        num_heads=3,
        num_classes=10,
    ).eval()
    data = batches(args.num_grads, rank, size)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()  # what a step of training takes is not the calibration's
    model.zero_grad()
    dist.barrier()
    sent = counted(size)
    before, cpu, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.perf_counter()
    result = capruner.prune(
        model,
        data,
        F.cross_entropy,
        args.sparsities,
        params=PARAMS,
        num_grads=args.num_grads,
        fisher_block_size=args.block_size,
        progress=False,
    )
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    levels = [result.level(s) for s in result.sparsities]
    outcome = digest(part for v in levels for name in sorted(v.masks) for part in (v.masks[name], v.weights[name]))
    zeros = [sum(int((~m).sum()) for m in result.masks(s).values()) for s in result.sparsities]
    torch.save(
        {
            "wall": wall,
            "cpu": cpu,
            "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
            "digest": outcome,
            "zeros": zeros,
            "timings": result.timings,
            "sent": sent,
        },
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=args.width, depth=args.depth, num_heads=3
    )
    shapes = [p.shape for p in select_parameters(model, PARAMS).values()]
    layouts = [BlockLayout.of(shape, args.block_size) for shape in shapes]
    fisher = sum(layout.num_blocks * layout.block_size**2 * 4 for layout in layouts)
    print(
        f"{sum(s.numel() for s in shapes):,} weights, B = {args.block_size}, {args.num_grads} gradients; Fisher blocks {fisher / 2**20:.0f} MiB; "
        f"{os.cpu_count()} cores"
    )
    print(
        f"{'ranks':>5} {'wall s':>7} {'cpu s, busiest':>15} {'Fisher MiB/rank':>16} {'peak MiB, worst rank':>21} {'sent MiB/rank':>14}  masks and weights"
    )
    digests = set()
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(work, (size, folder, args), nprocs=size, start_method="spawn")
            ranks = [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(size)]
        digests |= {r["digest"] for r in ranks}
        versions, traffic = len({r["digest"] for r in ranks}), max(sum(r["sent"].values()) for r in ranks)
        print(
            f"{size:>5} {max(r['wall'] for r in ranks):>7.1f} {max(r['cpu'] for r in ranks):>15.1f} {fisher / size / 2**20:>16.0f} "
            f"{max(r['bytes'] for r in ranks) / 2**20:>21.0f} {traffic / 2**20:>14.1f}  {ranks[0]['digest'][:12]} on {versions} version(s), "
            f"zeros {ranks[0]['zeros']}"
        )
        print(f"{'':>5} " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in ranks[0]["timings"].items()))
    print("all equal" if len(digests) == 1 else f"{len(digests)} different results")


if __name__ == "__main__":
    main()
