"""What ``capruner.plan`` says a run will take, against the run: seconds and peak memory on five networks.

    python benchmarks/plan.py
    python benchmarks/plan.py --models mobilenetv3_large_100 deit_tiny_patch16_224 --num-grads 32 --batch 2 --threads 1
    python benchmarks/plan.py --data DATA --models vit vit_tiny conv hybrid efficientnet --num-grads auto    # trained on CIFAR-10

Plan and run are processes of their own, after a small run that compiles; weights and images are random without ``--data``. Peak memory is the kernel's
count (``ru_maxrss``) beyond what one gradient took before; the run has one sparsity.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
from cifar import ARCHITECTURES, PRUNED, SIZE, build, calibration_batches, load_model
from memory import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import capruner

CPU = torch.device("cpu")
RANDOM = ["vit", "conv", "hybrid", "deit_tiny_patch16_224", "mobilenetv3_large_100"]
MODELS = PRUNED | {
    "deit_tiny_patch16_224": PRUNED["vit"],
    "mobilenetv3_large_100": ["re:blocks.*conv_pwl?.weight$", "conv_head.weight"],
}


def problem(name: str, args: argparse.Namespace) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network and its calibration data: trained on CIFAR-10, or random."""
    torch.manual_seed(0)
    if args.data:
        model = load_model(name, args.vit_weights if name == "vit" else None)
        return model, calibration_batches(name, args.data, args.cache, 8192, args.batch, 0)
    ours = name in ARCHITECTURES
    model, size = (build(name), SIZE) if ours else (timm.create_model(name, num_classes=10), 224)
    shapes = [(args.batch, 3, size, size)] * 32
    return model.eval(), [(torch.randn(shape), torch.randint(10, shape[:1])) for shape in shapes]


def warm_up() -> None:
    """Load and compile what a run needs, whose seconds and bytes are not the model's."""
    data = [(torch.randn(4, 32), torch.randint(32, (4,))) for _ in range(16)]
    capruner.prune(nn.Linear(32, 32), data, F.cross_entropy, num_grads=16, progress=False)


def measure(what: str, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of a plan's estimate, or of a run."""
    if args.threads:
        torch.set_num_threads(args.threads)
    warm_up()
    model, data = problem(name, args)
    knobs = {"params": MODELS[name], "num_grads": args.num_grads}
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    before, start = peak_bytes(CPU), time.perf_counter()
    if what == "plan":
        plan = capruner.plan(model, data, F.cross_entropy, **knobs)
        return {"seconds": plan.seconds, "bytes": plan.memory["peak"], "planning": time.perf_counter() - start}
    result = capruner.prune(model, data, F.cross_entropy, 0.75, progress=False, **knobs)
    seconds, grads = time.perf_counter() - start, result.settings["num_grads"]
    return {"seconds": seconds, "bytes": peak_bytes(CPU) - before, "gradients": grads}


def child(what: str, name: str) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", what, name]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=RANDOM, choices=list(MODELS))
    parser.add_argument("--data", type=Path, help="CIFAR-10 as train/<class>/*.jpg, for trained networks")
    parser.add_argument("--cache", type=Path, default=Path("output/cache"), help="where decoded images are kept")
    parser.add_argument("--vit-weights", type=Path, help="weights of `vit`, which do not ship with the benchmarks")
    parser.add_argument("--num-grads", type=lambda text: text if text == "auto" else int(text), default=128)
    parser.add_argument("--batch", type=int, default=8, help="images of each gradient")
    parser.add_argument("--threads", type=int, help="of torch; default: its own number")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(*args.child, args)))
        return
    print(
        "| network | gradients | planned, s | measured, s | ratio | planned, MiB | measured, MiB | ratio | planning, s |"
    )
    print("|---" * 9 + "|")
    for name in args.models:
        plan, run = child("plan", name), child("prune", name)
        cells = [name, str(run["gradients"])]
        for what, unit, digits in (("seconds", 1, 1), ("bytes", 2**20, 0)):
            cells += [f"{row[what] / unit:.{digits}f}" for row in (plan, run)] + [f"{plan[what] / run[what]:.2f}"]
        cells.append(f"{plan['planning']:.1f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
