"""Feed spoiled files to what reads files: nothing but the documented errors may come out, in time, and no code may run.

    python qa/fuzz.py                       # 100,000 executions of each loader
    python qa/fuzz.py result --executions 5000 --seed 3

A mutator takes a good file and flips bits, cuts, repeats, splices, replaces numbers, words and JSON or YAML values by hostile ones. Every execution runs
under an alarm, with an audit hook that counts attempts to start processes, open sockets, import from elsewhere or write outside of the folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import capruner
from capruner.checkpoint import run, store
from capruner.files import digest
from capruner.result import load_result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SECONDS = 5.0
"""Of processor time: an execution that takes more counts as a hang."""
WORDS = [
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"0", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b"\x00", b"\xff\xfe"),
    *(b"../../etc/passwd", b"/etc/passwd", b"!!python/object/apply:os.system ['touch PWNED']", b"__import__('os').system('touch PWNED')"),
    *(b"eval(__import__('os').system('touch PWNED'))", b"&a [*a]", b"*a", b"!CAPruningModifier", b"!!binary aGk=", b"${HOME}", b"2:4", b"re:(a+)+$"),
]  # fmt: skip
HOSTILE_EVENTS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "ctypes.dlopen",
)


NVML = "libnvidia-ml.so.1"
"""``torch.cuda.is_available`` asks this library once Lightning has been imported, which sets ``PYTORCH_NVML_BASED_CUDA_CHECK``."""


class Hang(BaseException):
    """Past the alarm."""


class Watch:
    """What an execution tries to do besides reading."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.on, self.found = str(folder), False, collections.Counter[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "ctypes.dlopen" and arguments[0] == NVML:
            return
        if event.startswith(HOSTILE_EVENTS):
            self.found[event] += 1
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes and not str(arguments[0]).startswith((self.folder, "/dev/null")):
            self.found[f"write to {arguments[0]}"] += 1


def mutated(good: list[bytes]) -> bytes:
    """A good file, spoiled in one to four places."""
    data = bytearray(random.choice(good))
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice((1, 1, 2, 4, 8, 32, 200)))
        match random.randrange(8):
            case 0 if data:
                data[at % len(data)] ^= 1 << random.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:at] = random.randbytes(end - at)
            case 4:
                data[at:end] = random.choice(WORDS)
            case 5:
                del data[at:]
            case 6:
                other = random.choice(good)
                cut = random.randrange(len(other) + 1)
                data[at:end] = other[cut : cut + (end - at)]
            case _:
                lines = bytes(data).split(b"\n")
                random.shuffle(lines) if len(lines) < 8 else lines.insert(
                    random.randrange(len(lines)), random.choice(lines)
                )
                data = bytearray(b"\n".join(lines))
    return bytes(data)


def spoiled(value: Any) -> Any:
    """JSON values, one of them replaced by another kind of value."""
    odd: list[Any] = [None, -1, 0, 2**70, 1e308, float("nan"), "", "../up", [], {}, [[]], {"a": []}, True, "x" * 300]
    if random.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return random.choice(odd)
    if isinstance(value, dict):
        key = random.choice(list(value))
        changed = dict(value)
        if random.random() < 0.15:
            del changed[key]
        elif random.random() < 0.1:
            changed[str(random.choice(odd))] = changed.pop(key)
        else:
            changed[key] = spoiled(value[key])
        return changed
    index = random.randrange(len(value))
    return [*value[:index], spoiled(value[index]), *value[index + random.randrange(2) :]]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


DATA = [(torch.randn(4, 6), torch.randint(3, (4,))) for _ in range(8)]
ARGUMENTS: dict[str, Any] = {"num_grads": 8, "fisher_block_size": 6, "damp": 1e-3, "progress": False}


class Target:
    """A loader, good files for it, and the errors that it documents."""

    allowed: tuple[type[BaseException], ...] = (ValueError, OSError)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good: list[bytes] = []

    def one(self) -> None:
        """Read one spoiled file."""
        raise NotImplementedError


class Result(Target):
    """``capruner.load_result`` and ``PruningResult.apply``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = net()
        for sparsity in (0.5, [0.3, 0.8]):
            capruner.prune(self.model, DATA, sparsity=sparsity, **ARGUMENTS).save(folder / "good")
            self.good.append((folder / "good").read_bytes())

    def one(self) -> None:
        data, path = random.choice(self.good), self.folder / "file"
        if random.random() < 0.5:  # a header that is JSON, with values that cannot be
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            if random.random() < 0.7:
                ours = spoiled(json.loads(header["__metadata__"]["capruner"]))
                header["__metadata__"]["capruner"] = json.dumps(ours)
            else:
                header = spoiled(header)
            text = json.dumps(header).encode()
            data = len(text).to_bytes(8, "little") + text + data[8 + size :]
        else:
            data = mutated(self.good)
        path.write_bytes(data)
        result = load_result(path)
        for s in result.sparsities:
            result.layer_report(s), result.predicted_loss(s), result.model_sparsity(s)
            model = net()
            result.apply(model, s)
            assert all(torch.isfinite(p).all() for p in model.parameters()), "weights that are not finite were applied"


class Loss:
    """Interrupts a run."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.seen = stop, 0

    def __call__(self, outputs: Any, targets: Any) -> Any:
        self.seen += 1
        if self.seen == self.stop:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(outputs, targets)


class State(Target):
    """The state of a calibration: manifests, and the run that goes on from them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.place = folder / "state" / "rank-0-of-1"
        run.SAVE_EVERY = 0.0
        for stop in (8, None):
            capruner.remove_state(folder / "state")
            with contextlib.suppress(KeyboardInterrupt):
                self.run(stop)
            self.files = {path.name: path.read_bytes() for path in self.place.iterdir()}
            self.good.append(next(content for name, content in self.files.items() if name.endswith(".json")))
            if stop == 8:
                self.half = self.files
        capruner.remove_state(folder / "state")
        self.place.mkdir(parents=True)

    def run(self, stop: int | None = None) -> None:
        capruner.prune(net(), DATA, Loss(stop), 0.5, state_dir=self.folder / "state", **ARGUMENTS)

    def one(self) -> None:
        if random.random() < 0.02:  # all of it: a run that goes on from there
            for path in self.place.iterdir():
                path.unlink()
            for name, content in self.half.items():
                (self.place / name).write_bytes(content)
            name = random.choice(list(self.half))
            content = self.body() if name.endswith(".json") else mutated([self.half[name]])
            (self.place / name).write_bytes(content)
            self.run()
        else:
            path = self.folder / "manifest-00000001.json"
            path.write_bytes(self.body())
            store.read_manifest(path)

    def body(self) -> bytes:
        if random.random() < 0.3:
            return mutated(self.good)
        body = spoiled(json.loads(random.choice(self.good))["state"])
        return json.dumps({"sha256": digest([body]), "state": body}).encode()  # with the right checksum


class Recipe(Target):
    """``capruner.sparseml.recipe.load_manager``: SparseML reads it, and its modifiers are made."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from capruner.cli.arguments import UserError
        from capruner.sparseml import recipe

        self.allowed = (UserError,)
        self.load = recipe.load_manager
        files = sorted((ROOT / "research/recipes").rglob("*.yaml"))
        self.good = [path.read_bytes() for path in files]
        self.good.append(
            b"a: 0.5\nb: eval(a * 2 + 1)\nmodifiers:\n  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: eval(b)\n"
        )

    def one(self) -> None:
        path = self.folder / "recipe.yaml"
        path.write_bytes(mutated(self.good))
        self.load(str(path))


class Checkpoint(Target):
    """The report's reader of checkpoints: safetensors, and ``torch.load`` with ``weights_only``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from capruner.report.checkpoint import read_weights

        self.load: Callable[[Path], Any] = read_weights
        save_file(net().state_dict(), folder / "good")
        self.good.append((folder / "good").read_bytes())
        for content in (net().state_dict(), {"state_dict": net().state_dict(), "epoch": 3}):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            self.good.append(buffer.getvalue())

    def one(self) -> None:
        path = self.folder / random.choice(("file.safetensors", "file.pth"))
        path.write_bytes(mutated(self.good))
        self.load(path)


class Report(Target):
    """``capruner report`` of a folder whose summary.json was edited."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import timm

        from capruner.report import write_report

        self.write: Callable[[Path], Any] = write_report
        names = ("0.weight", "2.weight")
        fixed = {
            "method": "CAP",
            "top1": 90.0,
            "top5": 99.0,
            "loss": 0.5,
            "images": 50,
            "seconds": 1.0,
            "macs_left": 100,
        }
        rows = [
            fixed | {"requested": s, "reached_prunable": s or 0.0, "reached_all": s or 0.0, "predicted_loss": s}
            for s in (None, 0.5, 0.75)
        ]
        layers = [
            {"requested": s, "layers": [{"name": n, "numel": 8, "zeros": int(8 * s), "sparsity": s} for n in names]}
            for s in (0.5, 0.75)
        ]
        self.summary = {
            "arguments": {"model": "resnet18", "checkpoint": "a.pth"},
            "recipe": "modifiers: []",
            "versions": {"torch": "2"},
            "device": "cpu",
            "rows": rows,
            "stages": [{"stage": "calibrate", "seconds": 3.0, "peak_memory_gib": 1.5, "parts": {"gradients": 2.0}}],
            "macs": {"input_size": [3, 16, 16], "weights": dict.fromkeys(names, 125), "activations": 200},
            "layers": layers,
        }
        self.good.append(json.dumps(self.summary, indent=1).encode())
        (folder / "summary.json").write_bytes(self.good[0])
        self.write(folder)  # what this imports, and how, is not a report's doing
        timm.create_model("test_vit", pretrained=False)

    def one(self) -> None:
        edited = mutated(self.good) if random.random() < 0.3 else json.dumps(spoiled(self.summary)).encode()
        (self.folder / "summary.json").write_bytes(edited)
        self.write(self.folder)


TARGETS: dict[str, type[Target]] = {
    "report": Report,
    "result": Result,
    "state": State,
    "recipe": Recipe,
    "checkpoint": Checkpoint,
}


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, executions: int, minutes: float, seed: int = 0) -> dict[str, Any]:
    """Counts of what came of so many executions, or as many as there is time for."""
    random.seed(seed)
    crashes: collections.Counter[str] = collections.Counter()
    counts = collections.Counter[str]()
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target, watch = TARGETS[name](Path(folder)), Watch(Path(folder))
        os.chdir(folder)
        began = time.monotonic()
        try:
            for _ in range(executions):
                if time.monotonic() - began > 60 * minutes:
                    break
                counts["executions"] += 1
                silent = contextlib.redirect_stdout(io.StringIO())
                watch.on = True
                try:
                    with alarm(SECONDS), silent, contextlib.redirect_stderr(io.StringIO()):
                        target.one()
                    counts["accepted"] += 1
                except target.allowed:
                    counts["refused"] += 1
                except Hang:
                    counts["hangs"] += 1
                except BaseException as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    crashes[
                        f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:80]}"
                    ] += 1
                finally:
                    watch.on = False
        finally:
            os.chdir(here)
        planted = (Path(folder) / "PWNED").exists()
    found = {key: counts[key] for key in ("executions", "refused", "accepted", "hangs")}
    return found | {
        "crashes": sum(crashes.values()),
        "code": sum(watch.found.values()) + planted,
        "seconds": time.monotonic() - began,
        "details": [*crashes.most_common(12), *watch.found.most_common(5)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loaders", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--executions", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60, help="at most, for each loader")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in args.loaders or TARGETS:
        found = fuzz(name, args.executions, args.minutes, args.seed)
        details = found.pop("details")
        print(f"{name}: " + ", ".join(f"{value:,.0f} {key}" for key, value in found.items()), flush=True)
        for what, count in details:
            print(f"    {count:6d}  {what}", flush=True)
        failed |= bool(found["crashes"] or found["hangs"] or found["code"])
    sys.exit(failed)


if __name__ == "__main__":
    main()
