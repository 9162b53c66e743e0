"""One-shot runs of this version of capruner against those of an older one, in turns: seconds, peak memory and accuracy.

    git worktree add ../before 7f91fc6                                     # before `plan` and num_grads="auto"
    python benchmarks/versions.py ../before/src DATA --network conv        # six sparsities, each version with its own defaults
    python benchmarks/models/train.py vit_tiny DATA --epochs 6 --lr 1e-3   # 5.3 M weights
    python benchmarks/versions.py ../before/src DATA --before-grads 1024

Each run is a process of its own. Both versions get the same batches; a number of gradients that is not given is left to the version's default. Seconds of all
cores are those of the process alone, so that other processes disturb little.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from cifar import PRUNED, accuracy, calibration_batches, load_images, load_model
from memory import peak_bytes
from torch.nn import functional as F

import capruner

HERE = Path(capruner.__file__).parents[1]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run in this process, with the version that ``PYTHONPATH`` says."""
    torch.manual_seed(args.seed)
    model = load_model(args.network, args.vit_weights if args.network == "vit" else None)
    data = calibration_batches(args.network, args.data, args.cache, args.images, args.batch, args.seed)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    cpu = torch.device("cpu")
    before = peak_bytes(cpu)
    given = {} if args.num_grads is None else {"num_grads": args.num_grads}
    start, busy = time.perf_counter(), time.process_time()
    result = capruner.prune(
        model, data, F.cross_entropy, args.sparsities, params=PRUNED[args.network], progress=False, **given
    )
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = peak_bytes(cpu) - before
    images, labels = (t[: args.limit] for t in load_images(args.data, "val", args.cache))
    top1 = {}
    for sparsity in result.sparsities:
        pruned = copy.deepcopy(model)
        result.apply(pruned, sparsity)
        top1[sparsity] = accuracy(pruned, images, labels, args.network)
    grads = result.settings["num_grads"]
    return {
        "seconds": seconds,
        "cpu": busy,
        "stages": result.timings,
        "num_grads": grads,
        "peak": peak,
        "top1": top1,
    }


def child(source: Path, grads: str | None, seed: int) -> dict[str, Any]:
    """:func:`measure` in a process that imports capruner from ``source``."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", "--seed", str(seed)]
    command += [] if grads is None else ["--num-grads", grads]
    paths = os.pathsep.join([str(source.resolve()), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the `src` of the older version")
    parser.add_argument("data", type=Path, help="CIFAR-10 as train/<class>/*.jpg and val/<class>/*.jpg")
    parser.add_argument("--network", default="vit_tiny", choices=sorted(PRUNED.keys() - {"imagenet"}))
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of `vit`, which do not ship with the benchmarks")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--images", type=int, default=8192, help="calibration images")
    parser.add_argument("--batch", type=int, default=8, help="images of each gradient")
    parser.add_argument("--before-grads", help="gradients of the older version")
    parser.add_argument("--after-grads", help="gradients of this version")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration images; a pair each"
    )
    parser.add_argument("--limit", type=int, default=10_000, help="evaluate on this many validation images")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--num-grads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    pairs = []
    print(
        "| seed | version | gradients | seconds | of all cores | by stage | peak, MiB | top-1, % |\n" + "|---" * 8 + "|"
    )
    for seed in args.seeds:
        pair = []
        for version, source, grads in (("before", args.before, args.before_grads), ("now", HERE, args.after_grads)):
            pair.append(run := child(source, grads, seed))
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run["stages"].items() if seconds >= 0.05)
            top1 = ", ".join(f"{value:.1f}" for value in run["top1"].values())
            cells = [seed, version, run["num_grads"], f"{run['seconds']:.1f}", f"{run['cpu']:.1f}", stages]
            print("| " + " | ".join(map(str, [*cells, run["peak"] >> 20, top1])) + " |", flush=True)
        pairs.append(pair)
    for what, name in (("seconds", "seconds"), ("cpu", "seconds of all cores")):
        ratios = [before[what] / now[what] for before, now in pairs]
        print(f"{name}, before / now: {', '.join(f'{r:.2f}' for r in ratios)}; median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
