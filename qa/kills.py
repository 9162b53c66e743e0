"""Kill a run with SIGKILL at random moments, go on each time, and compare what comes out with a run that was never killed.

    python qa/kills.py gradual --kills 10
    python qa/kills.py gradual --kills 10 --processes 2      # one of the processes is killed
    python qa/kills.py oneshot --kills 20                    # with --state-dir, saved every second instead of every two minutes
    python qa/kills.py stages --processes 4                  # one of four gloo processes, at each of five stages

Needs no data: the images are made here. Prints the number of results that differ, of unreadable checkpoints, and the seconds of work lost at each kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor, nn

import capruner
from capruner.checkpoint import run, store
from capruner.distributed import PeerError
from capruner.files import digest, file_digest
from capruner.methods import CAP

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = ["img_size=16", "patch_size=4", "embed_dim=32", "depth=2", "num_heads=2", "num_classes=3"]
RECIPE = """
modifiers:
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: 12.0
  - !CAPruningModifier
      params: ['re:.*blocks.[0-9]+.(attn|mlp).*weight$']
      init_sparsity: 0.3
      final_sparsity: 0.9
      start_epoch: 1.0
      end_epoch: 11.0
      update_frequency: 1.0
      num_grads: 32
      damp: 1e-5
      fisher_block_size: 64
"""


def make_images(folder: Path) -> None:
    noise = np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 8)):
        for label in range(3):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 80, (16, 16, 3)) + np.array([60 * label, 90, 120 - 40 * label])
                Image.fromarray(pixels.astype("uint8")).save(place / f"{index}.png")


def command(place: Path, experiment: str, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [
        *(sys.executable, *launcher, str(ROOT / "research/sparse_training.py"), "--data-dir", str(place / "data")),
        *("--model", "vit_tiny_patch16_224", "--model-kwargs", *SIZES, "--sparseml-recipe", str(place / "recipe.yaml")),
        *(
            "--experiment",
            experiment,
            "--output",
            str(place),
            "-b",
            "8",
            "-gb",
            "4",
            "--workers",
            "0",
            "--device",
            "cpu",
        ),
        *(
            "--opt",
            "adamw",
            "--lr",
            "1e-3",
            "--model-ema",
            "--mixup",
            "0.2",
            "--save-last",
            "--timeout",
            "60",
            "--resume",
        ),
    ]


def start(place: Path, experiment: str, words: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NM_DISABLE_ANALYTICS": "1"}
    with (place / f"{experiment}.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)


def weights_digest(place: Path, experiment: str) -> str:
    names = ("last", "best_sparsity_0.9000")
    files = [place / experiment / "checkpoints" / f"{name}.safetensors" for name in names]
    return digest([file_digest(file) for file in files])


def kill(running: subprocess.Popen[bytes], processes: int) -> None:
    """The whole process, or of several a random one, upon which the launcher ends the others."""
    if processes > 1:
        children = subprocess.run(["pgrep", "-P", str(running.pid)], capture_output=True, text=True).stdout.split()
        if children:
            os.kill(int(random.choice(children)), signal.SIGKILL)
            running.wait()
            return
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def gradual(args: argparse.Namespace, place: Path) -> bool:
    """Kill the training script; whether all went well."""
    from capruner.vision.training_checkpoint import load_state

    def begin(experiment: str) -> subprocess.Popen[bytes]:
        return start(place, experiment, command(place, experiment, args.processes))

    (place / "recipe.yaml").write_text(RECIPE)
    began = time.monotonic()
    if begin("whole").wait():
        sys.exit((place / "whole.log").read_text()[-3000:])
    whole = time.monotonic() - began
    expected = weights_digest(place, "whole")
    print(f"a run that nobody kills: {whole:.1f} s", flush=True)
    tally = Tally()
    while len(tally.lost) < args.kills:
        tally.runs += 1
        experiment, kills = f"trial{tally.runs}", 0
        saved_to = place / experiment / "last.pt"
        while kills < args.in_a_row and len(tally.lost) < args.kills:
            running, woke = begin(experiment), time.monotonic()
            before = saved_to.stat().st_mtime if saved_to.exists() else 0.0
            while running.poll() is None and (not saved_to.exists() or saved_to.stat().st_mtime == before):
                if random.random() < 0.002:  # now and then it dies before it has done anything
                    break
                time.sleep(0.02)
            time.sleep(random.uniform(0.0, 0.1 * whole))
            if running.poll() is not None:
                break
            saved = saved_to.stat().st_mtime if saved_to.exists() else 0.0
            since = time.time() - saved if saved > before else time.monotonic() - woke
            kill(running, args.processes)
            kills += 1
            tally.lost.append(since)
            if saved_to.exists():
                tally.read(lambda saved_to=saved_to: load_state(saved_to))
        if begin(experiment).wait():
            sys.exit((place / f"{experiment}.log").read_text()[-3000:])
        tally.ended(weights_digest(place, experiment) == expected, kills)
    return tally.report()


def one_shot(args: argparse.Namespace, place: Path) -> bool:
    """Kill the one-shot script, which saves its calibration; whether all went well."""

    def begin(experiment: str, *more: str) -> subprocess.Popen[bytes]:
        hurried = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from capruner.checkpoint import run; run.SAVE_EVERY = 1.0; "
            "from capruner.cli import arguments as cli; from capruner.vision import one_shot_pruning; sys.exit(cli.run(one_shot_pruning.main))"
        )
        words = [sys.executable, "-c", hurried, "--data-dir", str(place / "data"), "--model", "vit_tiny_patch16_224"]
        words += ["--model-kwargs", *SIZES, "--num-grads", "400", "--fisher-block-size", "128", "--damp", "1e-5"]
        words += ["--sparsities", "0.5", "0.9", "--experiment", experiment, "--output", str(place), "-gb", "4"]
        return start(place, experiment, [*words, "--workers", "0", "--device", "cpu", "--gs-aug", *more])

    def outcome(experiment: str) -> str:
        levels = capruner.load_result(place / experiment / "result.safetensors").levels
        return digest(part for v in levels for name in sorted(v.masks) for part in (v.masks[name], v.weights[name]))

    began = time.monotonic()
    if begin("whole").wait():
        sys.exit((place / "whole.log").read_text()[-3000:])
    whole = time.monotonic() - began
    expected = outcome("whole")
    print(f"a run that nobody kills: {whole:.1f} s", flush=True)
    tally = Tally()
    while len(tally.lost) < args.kills:
        tally.runs += 1
        experiment, kills = f"trial{tally.runs}", 0
        folder = place / f"state{tally.runs}"
        while kills < args.in_a_row and len(tally.lost) < args.kills:
            known = set(folder.glob("*/manifest-*"))
            running, woke = begin(experiment, "--state-dir", str(folder)), time.time()
            # Once it has saved something new, or so that it dies at any moment at all.
            until = woke + random.uniform(0.3, 1.5) * whole
            while running.poll() is None and time.time() < until and set(folder.glob("*/manifest-*")) <= known:
                time.sleep(0.02)
            time.sleep(random.uniform(0.0, 3.0))
            if running.poll() is not None:
                break
            saved = max((path.stat().st_mtime for path in folder.glob("*/manifest-*")), default=0.0)
            kill(running, 1)
            kills += 1
            tally.lost.append(time.time() - max(saved, woke))
            for path in folder.glob("*/manifest-*.json"):
                tally.read(lambda path=path: store.read_manifest(path))
        # Killed in its last moments a run is finished all the same, and would refuse to begin again.
        summary = place / experiment / "summary.json"
        finished = summary.is_file() and bool(json.loads(summary.read_bytes())["finished"])
        if not finished and begin(experiment, "--state-dir", str(folder)).wait():
            sys.exit((place / f"{experiment}.log").read_text()[-3000:])
        tally.ended(outcome(experiment) == expected and (finished or not folder.exists()), kills)
    return tally.report()


class Tally:
    """What came of the kills."""

    def __init__(self) -> None:
        self.lost: list[float] = []
        self.runs = self.unreadable = self.different = 0

    def read(self, load: Any) -> None:
        """A state that a kill has left."""
        try:
            load()
        except Exception as error:
            self.unreadable += 1
            print(f"kill {len(self.lost)}: {error}")

    def ended(self, same: bool, kills: int) -> None:
        """A run has come to its end."""
        self.different += not same
        print(f"run {self.runs}: killed {kills} times, {'same bits' if same else 'OTHER BITS'}", flush=True)

    def report(self) -> bool:
        """Print it; whether all went well."""
        print(
            f"{len(self.lost)} kills over {self.runs} runs: {self.different} results differ, {self.unreadable} unreadable states, "
            f"work lost {statistics.median(self.lost):.1f} s (median), {max(self.lost):.1f} s (most, start-up included)"
        )
        return not self.different and not self.unreadable


STAGES: dict[str, tuple[Any, str] | None] = {
    "gradients": None,
    "saving": (run.RunCheckpoint, "save"),
    "inverting": (CAP, "prepare"),
    "solving": (CAP, "solve_counts"),
    "finishing": (run.RunCheckpoint, "_finish"),
}


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def worker(rank: int, size: int, folder: str, name: str, victim: int, stage: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.store", rank=rank, world_size=size)
    run.SAVE_EVERY = 0.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 31), nn.Tanh(), nn.Linear(31, 5))
    data = [(torch.randn(4, 20), torch.randint(5, (4,))) for _ in range(96)][rank::size]
    seen = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if rank == victim and stage == "gradients" and seen == 12:
            die()
        return nn.functional.cross_entropy(outputs, targets)

    if rank == victim and (place := STAGES.get(stage)):
        setattr(*place, die)
    saved = f"{folder}/{stage}" if stage else None
    try:
        result = capruner.prune(
            model, data, loss, 0.8, num_grads=96, fisher_block_size=96, damp=1e-4, state_dir=saved, progress=False
        )
        Path(f"{folder}/{name}.{rank}").write_text(digest(result.level().weights.values()))
    except PeerError as error:
        Path(f"{folder}/{name}.{rank}").write_text(str(error))
    os._exit(0)


def stages(args: argparse.Namespace, place: Path) -> bool:
    """Kill one of several processes at each stage; whether the others name it, end in time, and all go on to the same bits."""
    size, context, well = max(2, args.processes), mp.get_context("spawn"), True

    def together(name: str, victim: int, stage: str) -> tuple[list[str], float]:
        workers = [context.Process(target=worker, args=(r, size, str(place), name, victim, stage)) for r in range(size)]
        for process in workers:
            process.start()
        died = 0.0
        if victim >= 0:
            workers[victim].join()
            died = time.monotonic()
        for process in workers:
            process.join(600)  # an idle machine needs some ten seconds, most of them for imports
            if process.is_alive():
                process.kill()
        texts = [path.read_text() if (path := place / f"{name}.{r}").exists() else "" for r in range(size)]
        return texts, time.monotonic() - died

    (expected, *others), _ = together("whole", -1, "")
    well &= set(others) == {expected}
    for stage in STAGES:
        victim = random.randrange(size)
        said, seconds = together(f"{stage}.killed", victim, stage)
        named = [f"rank {victim} died" in text or f"{victim}" in text.split(" died")[0] for text in said]
        first = any(text.startswith(f"rank {victim} died") for text in said)
        again, _ = together(f"{stage}.again", -1, stage)
        ok = first and all(n for r, n in enumerate(named) if r != victim) and set(again) == {expected}
        well &= ok
        print(
            f"{stage}: rank {victim} of {size} killed, the others named it and had ended after {seconds:.1f} s, "
            f"{'resumed to the same bits' if ok else f'BUT: {said} {again}'}",
            flush=True,
        )
    return well


def main() -> None:
    kinds = {"gradual": gradual, "oneshot": one_shot, "stages": stages}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--in-a-row", type=int, default=10, help="kills of one run before it may finish")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_images(place / "data")
        sys.exit(not kinds[args.kind](args, place))


if __name__ == "__main__":
    main()
