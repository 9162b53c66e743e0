"""What FastCAP's shared Fisher costs: time and quadratic loss per layer beside CAP and magnitude, on the CIFAR-10 ViT.

    python benchmarks/fast_cap.py DATA --vit-weights FILE

The loss is ``½ mean((g·δ)²)`` over gradients of images that no method has calibrated on: the model they all minimise, measured on new data.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from cifar import HELD_OUT, PRUNED, load_images, load_model, normalise
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.models.selection import select_parameters

METHODS = ("cap", "fast_cap", "magnitude")
STAGES = ("fisher", "eliminate", "allocate", "compensate")


def quadratic_losses(
    model: nn.Module, deltas: dict[str, dict[str, Tensor]], batches: list
) -> dict[str, dict[str, float]]:
    """Per method and parameter ``½ mean((g·δ)²)``; gradients are drawn once for all methods."""
    parameters = select_parameters(model, PRUNED["vit"])
    sums = {method: dict.fromkeys(parameters, 0.0) for method in deltas}
    for x, y in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values()))
        for name, g in zip(parameters, gradients, strict=True):
            for method, delta in deltas.items():
                sums[method][name] += float((g * delta[name]).sum()) ** 2 / 2 / len(batches)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--vit-weights", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("output/cache"))
    parser.add_argument("--num-grads", type=int, default=512)
    parser.add_argument("--fisher-block-size", type=int, default=192)
    parser.add_argument("--sparsity", type=float, default=0.75, help="at which the losses are compared, in every layer")
    parser.add_argument("--damp", type=float, help="of FastCAP, when not its default")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()

    images, labels = load_images(args.data, "train", args.cache)
    model = load_model("vit", args.vit_weights)
    batch = 8
    pairs = [
        (normalise(x), y) for x, y in zip(images[HELD_OUT:].split(batch), labels[HELD_OUT:].split(batch), strict=True)
    ]
    results, seconds = {}, {method: [] for method in METHODS}
    for _ in range(args.runs):
        for method in METHODS:
            results[method] = capruner.prune(
                model,
                pairs[: args.num_grads],
                F.cross_entropy,
                [args.sparsity, 0.9, 0.95],
                method=method,
                params=PRUNED["vit"],
                num_grads=args.num_grads,
                fisher_block_size=args.fisher_block_size,
                global_sparsity=False,
                damp=args.damp if method == "fast_cap" else None,
                progress=False,
            )
            seconds[method].append(results[method].timings)
    print(f"{'seconds':12}" + "".join(f"{stage:>12}" for stage in ("gradients", *STAGES, "no gradients", "all")))
    for method, runs in seconds.items():
        rows = [[run.get(s, 0.0) for s in ("gradients", *STAGES)] for run in runs]
        rows = [[*row, sum(row[1:]), sum(row)] for row in rows]
        print(f"{method:12}" + "".join(f"{statistics.median(column):12.2f}" for column in zip(*rows, strict=True)))
    ratios = [
        sum(a.get(s, 0.0) for s in STAGES) / sum(b.get(s, 0.0) for s in STAGES)
        for a, b in zip(seconds["cap"], seconds["fast_cap"], strict=True)
    ]
    print(f"CAP / FastCAP without the gradients that both need: {statistics.median(ratios):.1f}")

    weights = {name: p.detach() for name, p in select_parameters(model, PRUNED["vit"]).items()}
    deltas = {m: {n: r.level(args.sparsity).weights[n] - w for n, w in weights.items()} for m, r in results.items()}
    losses = quadratic_losses(model, deltas, pairs[args.num_grads : 2 * args.num_grads])
    print(f"\nquadratic loss at {100 * args.sparsity:g} % of each layer, on gradients not calibrated on")
    print(f"{'':28}" + "".join(f"{method:>12}" for method in METHODS))
    for name in weights:
        print(f"{name:28}" + "".join(f"{losses[method][name]:12.2e}" for method in METHODS))
    worse = [name for name in weights if losses["fast_cap"][name] >= losses["magnitude"][name]]
    print(f"layers where FastCAP is not below magnitude: {worse or 'none'}")


if __name__ == "__main__":
    main()
