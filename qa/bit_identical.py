"""Digests of masks, weights and losses of a matrix of small calibrations on the CPU: a refactoring must not change one of them.

    python qa/bit_identical.py before.json                        # on the old code
    python qa/bit_identical.py after.json --compare before.json   # on the new code, same machine

Cases: every method and mask type, recomputations, a memory budget that needs groups of layers, gradients of samples, labels of the model, distillation,
skipped batches, masks of earlier pruning, calibrations that are killed and resumed, and one and two processes. Takes less than a minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import capruner
from capruner.files import digest

WORKING_SET = 128 * 2**20
METHODS = ("cap", "fast_cap", "obs", "magnitude")
COMMON: dict[str, Any] = {"num_grads": 20, "fisher_block_size": 32, "sparsity": [0.5, 0.8], "progress": False}
GROUPS = {"memory_budget": WORKING_SET + 400_000}


class Killed(BaseException):
    """An interruption in the midst of a calibration."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(128, 15), nn.Linear(15, 5)
    )  # fmt: skip


class Stream:
    """Batches that continue from pass to pass, as a seeded loader's do; every ``size``-th of one stream on each of ``size`` processes."""

    def __init__(self, rank: int = 0, size: int = 1, bad: int = -1) -> None:
        self.generator, self.rank, self.size, self.bad = torch.Generator().manual_seed(1), rank, size, bad

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(24):
            x, y = (
                torch.randn(4, 4, 6, 6, generator=self.generator),
                torch.randint(5, (4,), generator=self.generator),
            )
            if index == self.bad:
                x[1] = torch.nan
            if index % self.size == self.rank:
                yield x, y


class Loss:
    """Cross-entropy that is killed at its ``last`` call."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.calls = last, 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.last:
            raise Killed
        return F.cross_entropy(outputs, targets)


def cases() -> dict[str, dict[str, Any]]:
    """``{name: arguments}``."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        for mask_type in ("unstructured", "2:4", "block4"):
            more = {"method": method, "mask_type": mask_type, "skip_unsupported": True}
            found[f"{method} {mask_type}"] = more | ({"sparsity": 0.5} if mask_type == "2:4" else {})
        found[f"{method} recomputed"] = {"method": method, "num_recomputations": 2, "recomputation_inter_func": "cubic"}
        found[f"{method} samples"] = {"method": method, "gradients": "sample", "num_grads": 50}
        found[f"{method} labels"] = {"method": method, "labels": "model"}
        found[f"{method} layers"] = {"method": method, "global_sparsity": False}
        found[f"{method} groups"] = {"method": method, **GROUPS}
    return found | {
        "distilled": {"distill_passes": 0.5, "num_grads": 10, "sparsity": 0.5},
        "damp": {"damp": 1e-3, "shrinkage": 0.1, "solver": "accumulate"},
        "woodbury": {"damp": 1e-3, "solver": "woodbury"},
        "own sparsities": {"sparsity": {0.5: ["0", "3"], 0.9: ["5"]}},
        "masks": {"masks": "zeros", "zeroed": True},
        "masks, recomputed": {"masks": "zeros", "zeroed": True, "num_recomputations": 2},
        "skipped": {"on_bad_batch": "skip", "bad": 3},
        "skipped samples": {"on_bad_batch": "skip", "bad": 3, "gradients": "sample", "num_grads": 50},
        "groups, recomputed, distilled": {"num_recomputations": 2, "distill_passes": 0.5, "sparsity": 0.8, **GROUPS},
        "groups, layers": {"global_sparsity": False, **GROUPS},
    }


KILLED = (
    *("cap unstructured", "cap recomputed", "cap samples", "cap labels", "distilled", "fast_cap unstructured"),
    *("obs groups", "skipped", "skipped samples", "groups, recomputed, distilled", "groups, layers"),
)

SEVERAL = (
    *(f"{method} {case}" for method in METHODS for case in ("unstructured", "recomputed")),
    *("cap samples", "cap labels", "cap 2:4", "obs block4", "fast_cap layers", "distilled", "cap groups", "skipped"),
)


def prune(rank: int, size: int, case: dict[str, Any], last: int | None = None, **more: Any) -> capruner.PruningResult:
    """Run a case."""
    arguments = COMMON | case | more
    bad, zeroed = arguments.pop("bad", -1), arguments.pop("zeroed", False)
    model = net()
    if zeroed:
        with torch.no_grad():
            model[5].weight[torch.arange(15 * 128).view(15, 128) % 3 == 0] = 0
    return capruner.prune(model, Stream(rank, size, bad), Loss(last), **arguments)


def killed(rank: int, size: int, case: dict[str, Any]) -> capruner.PruningResult:
    """A case that is killed after every 9 losses, and resumed."""
    monotonic, now = time.monotonic, iter(range(0, 10**9, 1000))
    time.monotonic = lambda: float(next(now))  # a save is due after each slab
    try:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(100):
                try:
                    return prune(rank, size, case, last=9, state_dir=folder)
                except Killed:
                    pass
    finally:
        time.monotonic = monotonic
    raise RuntimeError("it never ends")


def of(result: capruner.PruningResult) -> str:
    """Digest of all that a result holds but for its settings and timings."""
    parts: list[Any] = []
    for level in result.levels:
        parts += [level.sparsity, dict(level.losses)]
        for named in (level.masks, level.weights, level.others):
            parts += [part for name in sorted(named) for part in (name, str(named[name].dtype), named[name])]
    return digest(parts)


def attempt(run: Callable[[], capruner.PruningResult]) -> str:
    """The digest, or the kind of error of arguments that are refused."""
    try:
        return of(run())
    except ValueError as error:
        return type(error).__name__


def work(rank: int, size: int) -> dict[str, str]:
    """Digests by case."""
    chosen = {name: case for name, case in cases().items() if size == 1 or name in SEVERAL}
    found = {name: attempt(lambda case=case: prune(rank, size, case)) for name, case in chosen.items()}
    if size == 1:
        found |= {f"{name}, killed": attempt(lambda name=name: killed(rank, size, cases()[name])) for name in KILLED}
        calibration = capruner.calibrate(net(), Stream(), num_grads=20, fisher_block_size=32, progress=False)
        found["calibrate, solve"] = of(calibration.solve([0.5, 0.8]))
    given = {name: mask for name, mask in prune(0, 1, {"method": "magnitude", "sparsity": 0.5}).masks().items()}
    compensated = capruner.compensate_masks(
        net(), Stream(rank, size), F.cross_entropy, given, num_grads=20, progress=False
    )
    return found | {"given masks": of(compensated)}


def entry(rank: int, size: int, folder: str) -> None:
    """One of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    Path(folder, f"{rank}.json").write_text(json.dumps(work(rank, size)))
    dist.destroy_process_group()


def main() -> int:
    """Write the digests, and name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="name the cases that differ from this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {f"1 process: {name}": value for name, value in work(0, 1).items()}
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(entry, (2, folder), nprocs=2, start_method="spawn")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    found |= {f"2 processes: {name}": value for name, value in ranks[0].items()}
    wrong = [f"2 processes: {name}: rank 1 differs" for name, value in ranks[1].items() if ranks[0][name] != value]
    for name in KILLED:
        if found[f"1 process: {name}, killed"] != found[f"1 process: {name}"]:
            wrong.append(f"1 process: {name}: resumed, it differs")
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.compare:
        before = json.loads(options.compare.read_text())
        wrong += [
            f"{name}: differs" for name in sorted(before.keys() | found.keys()) if before.get(name) != found.get(name)
        ]
    print("\n".join(wrong) or f"{len(found)} cases, no difference", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
