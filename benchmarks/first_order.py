"""CAP with the term of first order that a pruned network's loss has: recomputations that also step back towards the dense network's outputs.

    python benchmarks/first_order.py DATA --model vit --ladder 0.92 0.945 0.96 0.97 0.976 0.98
    python benchmarks/first_order.py DATA --model vit --ladder 0.92 0.945 0.96 0.97 0.976 0.98 --plain      # without that term

The expansion ``L(w + δ) ≈ L + gᵀδ + ½ δᵀFδ`` has ``g = 0`` where training has ended, and only there. From the second recomputation on the weights are
elsewhere. So before any more leave, the survivors take one step ``−α F⁻¹ g``, ``L`` being the Kullback-Leibler divergence of the outputs from the dense
network's. Blocks of ``F`` know nothing of each other, and each would make up for all of the error: ``α`` is searched for on 1,024 of the calibration
images. No labels are used.

CIFAR-10 and calibration images as in ``benchmarks/accuracy.py``: 4,096 in batches of 8, labels drawn from the model. Not in the library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accuracy import Batches, calibration
from cifar import HELD_OUT, PRUNED, accuracy, load_images, load_model, normalise
from torch import Tensor, nn
from torch.nn import functional as F

from capruner.calibration import Calibration
from capruner.labels import drawn_labels
from capruner.methods import CAP, Settings, Target
from capruner.selection import select_parameters

SEARCHED = 1024
"""Images that the length of a step is searched on."""


class Divergence:
    """``KL(dense ‖ model)`` in nats, the mean over calibration images."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        with torch.no_grad():
            self.goals = torch.cat([model(normalise(x)).log_softmax(1) for x in images.split(256)])

    def _parts(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images[:count].split(256), self.goals[:count].split(256)))

    def _of(self, x: Tensor, goal: Tensor, count: int) -> Tensor:
        outputs = self.model(normalise(x)).log_softmax(1)
        return F.kl_div(outputs, goal, log_target=True, reduction="sum") / count

    @torch.no_grad()
    def value(self, count: int) -> float:
        return sum(float(self._of(x, goal, count)) for x, goal in self._parts(count))

    def gradient(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for x, goal in self._parts(len(self.images)):
            parts = torch.autograd.grad(self._of(x, goal, len(self.images)), list(parameters.values()))
            for total, part in zip(found.values(), parts):
                total += part
        return found


@torch.no_grad()
def step_back(
    cal: Calibration, pruner: CAP, kept: Mapping[str, Tensor], divergence: Divergence, share: float
) -> tuple[float, float, float]:
    """Move the survivors along ``−F⁻¹ g``, as far as pays, and rank them anew.

    Args:
        share: of the divergence, that a step is first expected to win; what the last one was best at.

    Returns:
        The share that was best, the divergence before and after.
    """
    with torch.enable_grad():
        gradient = divergence.gradient(cal.parameters)
    start = {name: p.clone() for name, p in cal.parameters.items()}
    way, slope = {}, 0.0
    for name, layout in cal.layouts.items():
        blocks = layout.to_blocks(gradient[name] * kept[name])
        way[name] = layout.from_blocks(torch.einsum("nij,nj->ni", pruner._inverses[name], blocks)) * kept[name]
        slope += float((way[name] * gradient[name]).sum())

    def at(length: float) -> float:
        for name, p in cal.parameters.items():
            p.copy_(start[name] - length * way[name])
        return divergence.value(SEARCHED)

    before = divergence.value(SEARCHED)
    length = share * before / slope
    tried = {0.0: before}
    for _ in range(4):  # the minimum of the parabola through the start, its slope and the last try
        tried[length] = at(length)
        bend = (tried[length] - before + slope * length) / length**2
        best = min(max(slope / (2 * bend), length / 4), 2 * length) if bend > 0 else 2 * length
        if abs(best / length - 1) < 0.2:
            break
        length = best
    length = min(tried, key=tried.__getitem__)
    at(length)
    for name, p in cal.parameters.items():
        layout = cal.layouts[name]
        dead = layout.to_blocks(~kept[name], torch.bool)
        weight = layout.to_blocks(p).masked_fill(dead, 0)
        pruner._weights[name] = weight
        pruner._rank(name, pruner._order(weight, pruner._inverses[name], dead, layout.is_padding()))
    return (length * slope / before or 0.1), before, tried[length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit", choices=sorted(PRUNED))
    parser.add_argument("--ladder", nargs="+", type=float, default=[0.92, 0.945, 0.96, 0.97, 0.976, 0.98])
    parser.add_argument("--plain", action="store_true", help="recomputations without the term of first order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("output/cache"))
    parser.add_argument("--vit-weights", type=Path, help="weights of the ViT when they are not in benchmarks/models")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = load_model(args.model, args.vit_weights if args.model == "vit" else None)
    train, val = (load_images(args.data, split, args.cache) for split in ("train", "val"))
    case = {"seed": args.seed, "images": 4096, "batch": 8, "labels": "data"}
    images: Batches = calibration(train, case, model)
    batches, loss = drawn_labels(images, F.cross_entropy)
    parameters = select_parameters(model, PRUNED[args.model])
    numel = sum(p.numel() for p in parameters.values())
    settings = Settings(num_grads=512, damp=CAP.default_damp, relative_damp=True)
    divergence = Divergence(model, images.images)
    kept = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters.items()}
    share, began = 0.3, time.perf_counter()

    for index, sparsity in enumerate(args.ladder):
        cal = Calibration(model, batches, loss, parameters, settings, progress=False)
        pruner = cal.run(CAP, kept)
        assert isinstance(pruner, CAP)
        moved = ""
        if index and not args.plain:
            share, before, after = step_back(cal, pruner, kept, divergence, share)
            moved = f", after a step back: divergence {before:.3f} -> {after:.3f}"
        solution = pruner.solve([[Target(tuple(parameters), numel, sparsity)]])[0]
        level = cal.level(pruner.shards, sparsity, solution)
        kept = dict(level.masks)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(level.weights[name])
        held_out = accuracy(model, *(t[:2000] for t in (train[0][:HELD_OUT], train[1][:HELD_OUT])))
        seconds = time.perf_counter() - began
        print(f"{sparsity:.1%}: {held_out:.2f} on training images held out{moved} ({seconds:.0f} s)", flush=True)
    print(f"on all validation images: {accuracy(model, *val):.2f}")


if __name__ == "__main__":
    main()
