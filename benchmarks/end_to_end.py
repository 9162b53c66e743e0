"""A whole one-shot run, from gradients to the weights at six sparsities, against doing it the published way and SparseML's.

    python benchmarks/end_to_end.py                          # ViT-Tiny, 5.3 M weights, B = 192, 1,024 gradients; some minutes and 6 GB
    python benchmarks/end_to_end.py --depth 3 --num-grads 256
    python benchmarks/end_to_end.py --device cuda --model deit_small_patch16_224 --img-size 224 --num-grads 4096 --gradients sample

Ours is measured whole. The others would take hours: they draw the same gradients (measured), and their updates are measured on the blocks of
``--sample`` weights and a few gradients, then scaled by blocks and gradients, in which their cost is linear. Both calibrate anew for each sparsity, as they do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")

import timm
import torch
from speed import machine_limits, random_problem, timed
from textbook import eliminate_with_traces, rank_one_update
from torch import nn
from torch.nn import functional as F

import capruner
from capruner.models.selection import select_parameters

SPARSITIES = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
PARAMS = ["re:blocks.[0-9]+.(attn|mlp).*weight$"]


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    depth = {} if args.depth is None else {"depth": args.depth}
    return timm.create_model(args.model, img_size=args.img_size, num_classes=10, **depth).to(device).eval()


def run_ours(model: nn.Module, data: list, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    start = time.perf_counter()
    result = capruner.prune(
        model,
        data,
        F.cross_entropy,
        SPARSITIES,
        params=PARAMS,
        num_grads=args.num_grads,
        fisher_block_size=args.block_size,
        gradients=args.gradients,
        progress=False,
    )
    return time.perf_counter() - start, result.timings


def textbook_seconds(blocks: int, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Rank-1 updates of all gradients, and one elimination with traces, scaled from a sample."""
    n, few = args.sample, 8
    w, H = random_problem(n, args.block_size, device)
    g = torch.randn(few, n, args.block_size, device=device) * 1e-2

    def updates() -> None:
        for row in g:
            rank_one_update(H, row, args.num_grads)

    updates()
    rank_one = timed(updates, device) / few * args.num_grads
    w, H = random_problem(n, args.block_size, device)
    return rank_one * blocks / n, timed(lambda: eliminate_with_traces(w, H), device) * blocks / n


def sparseml_seconds(blocks: int, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """The Fisher updates of SparseML's OBS and M-FAC, scaled from a sample; nothing where it is not installed."""
    try:
        from sparseml.pytorch.sparsification.pruning import modifier_pruning_mfac as mfac
        from sparseml.pytorch.sparsification.pruning.modifier_pruning_obs import EmpiricalBlockFisherInverse
    except ImportError:
        return {}
    n, few, B = args.sample, 8, args.block_size
    g = torch.randn(few, n * B, device=device) * 1e-2
    fisher = EmpiricalBlockFisherInverse(args.num_grads, B, n * B, 1e-7, device)

    def obs() -> None:
        for row in g:
            fisher.add_grad(row)

    def m_fac() -> None:
        # Blocks of this size get explicit inverses and rank-1 updates there, like OBS, row by row.
        mfac._compute_hessian_inv(g, 1e-5, B, 1, ["cpu" if device.type == "cpu" else "cuda:0"])

    seconds = {}
    for name, updates in (("SparseML's OBS", obs), ("SparseML's M-FAC", m_fac)):
        updates()
        seconds[name] = timed(updates, device) / few * args.num_grads * blocks / n
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=64, help="small images keep the gradients cheap (default 64)")
    parser.add_argument("--depth", type=int, help="transformer blocks, when not the model's own")
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--gradients", choices=["batch", "sample"], default="batch")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images of each gradient, or of each batch of samples"
    )
    parser.add_argument("--sample", type=int, default=768, help="blocks on which the others are measured")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file too")
    args = parser.parse_args()
    device = torch.device(args.device)
    model = build(args, device)
    size, count = (
        args.batch_size,
        args.num_grads if args.gradients == "batch" else -(-args.num_grads // args.batch_size),
    )
    data = [
        (torch.randn(size, 3, args.img_size, args.img_size, device=device), torch.randint(10, (size,), device=device))
        for _ in range(count)
    ]
    shapes = [p.numel() for p in select_parameters(model, PARAMS).values()]
    blocks = sum(-(-numel // args.block_size) for numel in shapes)
    print(
        f"{args.model}: {sum(shapes):,} weights in {blocks:,} blocks of {args.block_size}, {args.num_grads} gradients, {len(SPARSITIES)} sparsities"
    )
    limits = machine_limits(device)
    print(f"{args.device}, {torch.get_num_threads()} threads: " + ", ".join(f"{k} {v:.0f}" for k, v in limits.items()))
    rows: list[dict[str, Any]] = []
    for _ in range(args.runs):
        ours, stages = run_ours(model, data, args)
        rank_one, elimination = textbook_seconds(blocks, args, device)
        peers = sparseml_seconds(blocks, args, device)
        drawing = stages["gradients"]
        textbook = len(SPARSITIES) * (drawing + rank_one + elimination)
        whole = {name: len(SPARSITIES) * (drawing + once) for name, once in peers.items()}
        rows.append({"ours": ours, "stages": stages, "textbook": textbook, **whole})
        print(f"ours {ours:.0f} s: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in stages.items()))
        print(
            f"textbook {textbook:.0f} s ({drawing:.0f} gradients + {rank_one:.0f} updates + {elimination:.0f} elimination, six times): {textbook / ours:.1f}×"
        )
        for name, seconds in whole.items():
            print(
                f"{name} {seconds:.0f} s ({drawing:.0f} gradients + {peers[name]:.0f} updates, six times): {seconds / ours:.1f}×",
                flush=True,
            )
    print(f"median ratio to the textbook: {statistics.median(r['textbook'] / r['ours'] for r in rows):.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"limits": limits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
