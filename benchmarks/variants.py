"""Three variants of the pruner beside its default: blocks along columns and corrected biases, which are not in the library, and allocation by cost.

    python benchmarks/variants.py columns DATA --model vit    # blocks along columns (inputs of many neurons) instead of rows
    python benchmarks/variants.py flops DATA --model conv     # costs: weights leave by loss per multiply-add, at equal multiply-adds
    python benchmarks/variants.py bias DATA --model vit       # biases, or also scales, moved until each layer's outputs have the dense network's moments

CIFAR-10 as in ``benchmarks/accuracy.py``: 4,096 calibration images in batches of 8, one shot; top-1 in % on 2,000 training images that no calibration sees.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import Batches, calibration
from cifar import HELD_OUT, PRUNED, accuracy, load_images, load_model, normalise
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.models.selection import select_parameters


class Transposed(nn.Module):
    """A Linear or Conv2d whose parameter is the transposed matrix, so that blocks of it run over neurons."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = [layer]  # in a list: no submodule, no second parameter
        self.shape = layer.weight.shape
        self.weight = nn.Parameter(layer.weight.detach().flatten(1).T.clone())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.T.view(self.shape)
        (layer,) = self.layer
        return layer._conv_forward(x, weight, self.bias) if weight.dim() == 4 else F.linear(x, weight, self.bias)


def prune(
    model: nn.Module, batches: Batches, name: str, sparsities: list[float], **more: Any
) -> capruner.PruningResult:
    return capruner.prune(
        model, batches, F.cross_entropy, sparsities, params=PRUNED[name], num_grads=512, progress=False, **more
    )


def columns(name: str, model: nn.Module, batches: Batches, sparsities: list[float], score: Callable) -> None:
    for what in ("rows", "columns"):
        varied = copy.deepcopy(model)
        if what == "columns":
            for parameter in select_parameters(model, PRUNED[name]):
                place = parameter.removesuffix(".weight")
                varied.set_submodule(place, Transposed(varied.get_submodule(place)))
        result = prune(varied, batches, name, sparsities)
        shown = []
        for sparsity in sparsities:
            pruned = copy.deepcopy(varied)
            result.apply(pruned, sparsity)
            shown.append(f"{sparsity:.0%} {score(pruned):.2f}")
        print(f"blocks along {what}:", *shown, flush=True)


def flops(name: str, model: nn.Module, batches: Batches, sparsities: list[float], score: Callable) -> None:
    used = capruner.multiply_adds(model, batches.images.shape[1:])
    fine = [round(0.5 + 0.01 * step, 2) for step in range(49)]
    plain = prune(model, batches, name, sparsities)
    costly = prune(model, batches, name, fine, costs=used.per_weight(model))
    pruned_macs = sum(used.weights[layer] for layer in select_parameters(model, PRUNED[name]))

    def left(result: capruner.PruningResult, sparsity: float) -> float:
        rows = result.layer_report(sparsity)
        return sum(used.weights[row["name"]] * (1 - row["sparsity"]) for row in rows) / pruned_macs

    for sparsity in sparsities:
        goal = left(plain, sparsity)
        equal = min(fine, key=lambda s: abs(left(costly, s) - goal))
        for what, result, at in (("loss", plain, sparsity), ("loss per multiply-add", costly, equal)):
            pruned = copy.deepcopy(model)
            result.apply(pruned, at)
            share = left(result, at)
            print(f"by {what}: {share:.1%} of multiply-adds left, sparsity {at:.0%}, {score(pruned):.2f}", flush=True)


@torch.no_grad()
def match_moments(model: nn.Module, dense: nn.Module, names: list[str], images: Tensor, scale: bool) -> None:
    """Move biases (and scales) of pruned layers so that their outputs have the dense network's means (and deviations), layer after layer in one pass."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    goals: dict[str, tuple[Tensor, Tensor]] = {}

    def moments(layer: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
        rows = out.movedim(1, -1).flatten(0, -2) if isinstance(layer, nn.Conv2d) else out.flatten(0, -2)
        return rows.mean(0), rows.std(0)

    def mend(layer: nn.Module, out: Tensor, name: str) -> Tensor:
        (goal, deviation), (mean, own) = goals[name], moments(layer, out)
        factor = deviation / own.clamp(min=1e-6) if scale else torch.ones_like(own)
        found[name].append((factor, goal - factor * mean))
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        return out * factor.view(shape) + (goal - factor * mean).view(shape)

    hooks = []
    for name in names:
        watched, mended = dense.get_submodule(name), model.get_submodule(name)
        hooks.append(watched.register_forward_hook(lambda m, _, out, n=name: goals.update({n: moments(m, out)})))
        hooks.append(mended.register_forward_hook(lambda m, _, out, n=name: mend(m, out, n)))
    for x in images.split(512):
        dense(normalise(x))
        model(normalise(x))
    for hook in hooks:
        hook.remove()
    for name in names:
        layer = model.get_submodule(name)
        factor, shift = (torch.stack(values).mean(0) for values in zip(*found[name]))
        layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias * factor + shift)


def bias(name: str, model: nn.Module, batches: Batches, sparsities: list[float], score: Callable) -> None:
    names = [parameter.removesuffix(".weight") for parameter in select_parameters(model, PRUNED[name])]
    result = prune(model, batches, name, sparsities)
    for what in ("nothing", "biases", "biases and scales"):
        shown = []
        for sparsity in sparsities:
            pruned = copy.deepcopy(model)
            result.apply(pruned, sparsity)
            if what != "nothing":
                match_moments(pruned, model, names, batches.images[:2048], scale="scales" in what)
            shown.append(f"{sparsity:.0%} {score(pruned):.2f}")
        print(f"{what} corrected:", *shown, flush=True)


VARIANTS = {"columns": columns, "flops": flops, "bias": bias}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit", choices=sorted(PRUNED))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of the ViT when they are not in benchmarks/models")
    args = parser.parse_args()
    images, labels = load_images(args.data, "train", args.cache)
    model = load_model(args.model, args.vit_weights if args.model == "vit" else None)
    case = {"seed": args.seed, "images": 4096, "labels": "data", "batch": 8}
    batches = calibration((images, labels), case, model)
    print(f"{args.model}, dense {accuracy(model, images[:HELD_OUT][:2000], labels[:HELD_OUT][:2000]):.2f}", flush=True)
    VARIANTS[args.variant](
        args.model, model, batches, args.sparsities, lambda m: accuracy(m, images[:2000], labels[:2000])
    )


if __name__ == "__main__":
    main()
