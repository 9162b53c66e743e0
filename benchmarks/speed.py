"""How fast the pieces are, as ratios within one run, next to the machine's own limits.

    python benchmarks/speed.py            # all tables, a few minutes on two cores
    python benchmarks/speed.py eliminate --block-size 48 --blocks 3072

Rows: elimination against the textbook loop with traces, the Fisher inverse against rank-1 updates, a list of sparsities against one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from textbook import eliminate_with_traces, rank_one_update
from torch import Tensor, nn

import capruner
from capruner.core.fisher import BlockFisher


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, CUDA waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(
    ours: Callable[[], Any], other: Callable[[], Any], device: torch.device, runs: int
) -> tuple[float, float, float]:
    """Medians of both, and the median of the ratios other/ours taken pair by pair: a machine that slows down slows both."""
    pairs = [(timed(ours, device), timed(other, device)) for _ in range(runs + 1)][1:]  # the first warms up
    a, b = zip(*pairs)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in pairs)


def random_problem(n: int, B: int, device: torch.device, m: int | None = None) -> tuple[Tensor, Tensor]:
    """Correlated gradients' inverse Fisher blocks, and weights."""
    torch.manual_seed(0)
    mix = torch.eye(B) + 0.3 * torch.randn(B, B) / B**0.5
    inverse = []
    for part in torch.empty(n).split(256):
        G = torch.randn(len(part), m or 2 * B, B) @ mix
        F = G.mT @ G / (m or 2 * B) + 1e-4 * torch.eye(B)
        inverse.append(torch.cholesky_inverse(torch.linalg.cholesky(F.double())).float())
    return torch.randn(n, B).to(device), torch.cat(inverse).to(device)


def machine_limits(device: torch.device) -> dict[str, float]:
    """Measured batched sgemm rate and copy bandwidth."""
    A, B = torch.randn(2, 256, 192, 192, device=device)
    out = torch.empty_like(A)
    x = torch.randn(2**26, device=device)
    y = torch.empty_like(x)
    gemm = min(timed(lambda: torch.bmm(A, B, out=out), device) for _ in range(10))
    copy = min(timed(lambda: y.copy_(x), device) for _ in range(10))
    return {"batched_sgemm_gflops": 2 * 256 * 192**3 / gemm / 1e9, "copy_gbytes_per_s": 2 * x.numel() * 4 / copy / 1e9}


def bench_eliminate(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    w, H = random_problem(args.blocks, args.block_size, device)
    ours, textbook, ratio = paired(
        lambda: capruner.eliminate(w, H), lambda: eliminate_with_traces(w, H), device, args.runs
    )
    same = (capruner.eliminate(w, H).order == eliminate_with_traces(w, H)[0]).double().mean()
    what = f"eliminate, {args.blocks} blocks of {args.block_size}"
    return [{"what": what, "ours_s": ours, "textbook_s": textbook, "ratio": ratio, "same_order": float(same)}]


def bench_fisher(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    n, B, m = args.blocks, args.block_size, args.num_grads
    torch.manual_seed(0)
    scales = torch.logspace(-2, -3.5, B)
    G = (torch.randn(m, n, B) * scales).to(device)
    few = max(1, m // 64)  # rank-1 updates cost the same each: a sample of them, scaled, keeps the benchmark short

    def rank_one() -> None:
        H = torch.eye(B, device=device).repeat(n, 1, 1) / 1e-8
        for g in G[:few]:
            rank_one_update(H, g, m)

    def inverse(solver: Any, dtype: torch.dtype = torch.float32, blocks: slice = slice(None)) -> Tensor:
        fisher = BlockFisher(len(G[0, blocks]), B, m, 1e-8, solver=solver, device=device, dtype=dtype)
        for slab in G[:, blocks].split(16):
            fisher.add(slab)
        return fisher.inverse()

    exact = inverse("accumulate", torch.float64, slice(0, 32))
    rows = []
    for solver, flops in (("accumulate", 2 * m * n * B * B + n * B**3), ("woodbury", 4 * m * n * B * B)):
        ours, sample, _ = paired(lambda s=solver: inverse(s), rank_one, device, args.runs)
        error = float((inverse(solver, blocks=slice(0, 32)) - exact).norm() / exact.norm())
        row = {"what": f"Fisher inverse ({solver}), {n} blocks of {B}, {m} gradients", "ours_s": ours}
        rows.append(
            row
            | {
                "textbook_s": sample * m / few,
                "ratio": sample * m / few / ours,
                "gflops": flops / ours / 1e9,
                "error": error,
            }
        )
    return rows


def bench_list(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 768), nn.GELU(), nn.Linear(768, 384), nn.GELU(), nn.Linear(384, 10)).to(device)
    data = [(torch.randn(16, 384), torch.randint(10, (16,))) for _ in range(args.num_grads)]

    def run(sparsities: list[float]) -> None:
        capruner.prune(
            model, data, nn.functional.cross_entropy, sparsities, num_grads=args.num_grads, damp=1e-6, progress=False
        )

    five, one, ratio = paired(lambda: run([0.5, 0.6, 0.75, 0.9, 0.95]), lambda: run([0.95]), device, args.runs)
    return [
        {
            "what": f"five sparsities against one, {args.num_grads} gradients",
            "ours_s": five,
            "textbook_s": one,
            "ratio": 1 / ratio,
        }
    ]


BENCHMARKS = {"eliminate": bench_eliminate, "fisher": bench_fisher, "list": bench_list}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", help=f"of {', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--blocks", type=int, default=768, help="blocks (default 768)")
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--num-grads", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5, help="timed runs after one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the rows to this file too")
    args = parser.parse_args()
    if unknown := set(args.which) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {sorted(unknown)}; there are {', '.join(BENCHMARKS)}")
    device = torch.device(args.device)
    limits = machine_limits(device)
    print(f"{args.device}, {torch.get_num_threads()} threads:", ", ".join(f"{k} {v:.0f}" for k, v in limits.items()))
    rows = []
    for name in args.which or BENCHMARKS:
        for row in BENCHMARKS[name](args, device):
            rows.append(row)
            numbers = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if k != "what")
            print(f"{row['what']}: {numbers}", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"limits": limits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
