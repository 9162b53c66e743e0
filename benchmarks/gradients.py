"""What ``num_grads="auto"`` looks at: the error of Fisher blocks on gradients that they have not seen, after 64 gradients, 128 and so on.

    python benchmarks/gradients.py DATA --models vit conv hybrid efficientnet
    python benchmarks/gradients.py DATA --models vit --weights 512    # of each block all weights, and not the first 128

The networks are those of ``cifar.py``, with its weights; drawing stops at the first number whose error is at most ``ENOUGH``, here in bold.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar import PRUNED, calibration_batches, load_model
from torch.nn import functional as F

from capruner.calibration import enough
from capruner.calibration.enough import ENOUGH, LEAST, Sample, milestones
from capruner.calibration.gradients import gradient_slabs
from capruner.config import PruneConfig
from capruner.distributed import Partition, agreeing
from capruner.job import Job


@agreeing
def errors(name: str, seed: int, args: argparse.Namespace) -> dict[int, float]:
    """Error by number of gradients."""
    model = load_model(name, args.vit_weights if name == "vit" else None)
    batches = calibration_batches(name, args.data, args.cache, args.most * args.batch, args.batch, seed)
    config = PruneConfig(fisher_block_size=args.block_size)
    calibration = Job.of(model, batches, F.cross_entropy, params=PRUNED[name], config=config).start(progress=False)
    sample, stops = Sample(Partition(calibration.layouts, False), torch.device("cpu")), milestones(args.most)
    stream = calibration.stream()
    slabs = gradient_slabs(
        model, stream, F.cross_entropy, calibration.parameters, args.most, stops=stops, progress=False
    )
    found = {}
    for rows in slabs:
        sample.add({layer: calibration.layouts[layer].to_blocks(rows[layer]) for layer in rows})
        if stream.taken in stops:
            found[stream.taken] = sample.error(stream.taken)
    return {count: error for count, error in found.items() if count >= LEAST}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-10 as train/<class>/*.jpg")
    parser.add_argument("--models", nargs="+", default=["vit", "conv", "hybrid"], choices=sorted(PRUNED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--most", type=int, default=1024, help="gradients")
    parser.add_argument("--batch", type=int, default=8, help="images of each gradient")
    parser.add_argument("--block-size", type=int, help="weights per Fisher block; the default is that of `prune`")
    parser.add_argument("--weights", type=int, default=enough.WEIGHTS, help="weights of each block that are looked at")
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of `vit`, which do not ship with the benchmarks")
    args = parser.parse_args()
    enough.WEIGHTS = args.weights
    counts = [count for count in milestones(args.most) if count >= LEAST]
    print("| model | seed | " + " | ".join(map(str, counts)) + " |\n" + "|---" * (len(counts) + 2) + "|")
    for name in args.models:
        for seed in args.seeds:
            row = errors(name, seed, args)
            first = next((count for count, error in row.items() if error <= ENOUGH), None)
            cells = [f"**{error:.1f}**" if count == first else f"{error:.1f}" for count, error in row.items()]
            print(f"| {name} | {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
