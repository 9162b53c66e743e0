"""A model whose inverse Fisher blocks do not fit: pruned in groups of layers, inside a memory budget.

    python benchmarks/budget.py                          # ViT-Base, B = 192: 66 GB of blocks at once, 6.5 GiB given
    python benchmarks/budget.py --depth 2 --memory-budget 2GiB
    python benchmarks/budget.py --method fast_cap        # needs no groups

Small random images keep the gradients cheap. What is printed is the whole process's peak, model, data and interpreter included.
"""

from __future__ import annotations

import argparse
import json
import time

import timm
import torch
from memory import peak_bytes
from torch.nn import functional as F

import capruner
from capruner.models.selection import select_parameters

PARAMS = ["re:blocks.[0-9]+.(attn|mlp).*weight$"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=int, help="transformer blocks, when not the model's own")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--method", default="cap")
    parser.add_argument("--memory-budget", default="6.5GiB")
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--num-grads", type=int, default=32)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75])
    parser.add_argument("--per-layer", action="store_true", help="the same sparsity in each layer: one pass per group")
    args = parser.parse_args()
    torch.manual_seed(0)
    depth = {} if args.depth is None else {"depth": args.depth}
    model = timm.create_model(args.model, img_size=args.img_size, num_classes=10, **depth).eval()
    weights = sum(p.numel() for p in select_parameters(model, PARAMS).values())
    data = [(torch.randn(8, 3, args.img_size, args.img_size), torch.randint(10, (8,))) for _ in range(args.num_grads)]
    before, start = peak_bytes(torch.device("cpu")), time.perf_counter()
    result = capruner.prune(
        model,
        data,
        F.cross_entropy,
        args.sparsities,
        method=args.method,
        params=PARAMS,
        num_grads=args.num_grads,
        fisher_block_size=args.block_size,
        global_sparsity=not args.per_layer,
        damp=None if args.method == "fast_cap" else 1e-6,
        memory_budget=args.memory_budget,
        progress=False,
    )
    zeros = sum(int((~mask).sum()) for mask in result.masks(args.sparsities[-1]).values())
    row = {
        "weights": weights,
        "all_blocks_gib": weights * args.block_size * 4 / 2**30,
        "start_gib": before / 2**30,
        "peak_gib": peak_bytes(torch.device("cpu")) / 2**30,
        "seconds": time.perf_counter() - start,
        "sparsity": zeros / weights,
        "stages": result.timings,
    }
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
