"""Kill a run with SIGKILL at random moments, go on each time, and compare what comes out with a run that was never killed.

    python benchmarks/kills.py gradual --kills 10
    python benchmarks/kills.py gradual --kills 10 --processes 2      # one of the processes is killed

Needs no data: the images are made here. Prints the number of results that differ, of unreadable checkpoints, and the seconds of work lost at each kill.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

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


def start(place: Path, experiment: str, processes: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NM_DISABLE_ANALYTICS": "1"}
    with (place / f"{experiment}.log").open("ab") as log:
        return subprocess.Popen(
            command(place, experiment, processes), stdout=log, stderr=log, env=environment, start_new_session=True
        )


def digest(place: Path, experiment: str) -> str:
    names = ("last", "best_sparsity_0.9000")
    files = [place / experiment / "checkpoints" / f"{name}.safetensors" for name in names]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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


def main() -> None:
    from research.utils.training_checkpoint import load_state

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["gradual"])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--in-a-row", type=int, default=10, help="kills of one run before it may finish")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_images(place / "data")
        (place / "recipe.yaml").write_text(RECIPE)
        began = time.monotonic()
        if start(place, "whole", args.processes).wait():
            sys.exit((place / "whole.log").read_text()[-3000:])
        whole = time.monotonic() - began
        expected = digest(place, "whole")
        print(f"a run that nobody kills: {whole:.1f} s", flush=True)
        lost, unreadable, different, runs = [], 0, 0, 0
        while len(lost) < args.kills:
            runs += 1
            experiment, kills = f"trial{runs}", 0
            state = place / experiment / "last.pt"
            while kills < args.in_a_row and len(lost) < args.kills:
                running, woke = start(place, experiment, args.processes), time.monotonic()
                before = state.stat().st_mtime if state.exists() else 0.0
                while running.poll() is None and (not state.exists() or state.stat().st_mtime == before):
                    if random.random() < 0.002:  # now and then it dies before it has done anything
                        break
                    time.sleep(0.02)
                time.sleep(random.uniform(0.0, 0.1 * whole))
                if running.poll() is not None:
                    break
                saved = state.stat().st_mtime if state.exists() else 0.0
                since = time.time() - saved if saved > before else time.monotonic() - woke
                kill(running, args.processes)
                kills += 1
                lost.append(since)
                try:
                    if state.exists():
                        load_state(state)
                except Exception as error:
                    unreadable += 1
                    print(f"kill {len(lost)}: {error}")
            if start(place, experiment, args.processes).wait():
                sys.exit((place / f"{experiment}.log").read_text()[-3000:])
            same = digest(place, experiment) == expected
            different += not same
            print(f"run {runs}: killed {kills} times, {'same bits' if same else 'OTHER BITS'}", flush=True)
    print(
        f"{len(lost)} kills over {runs} runs: {different} results differ, {unreadable} unreadable states, "
        f"work lost {statistics.median(lost):.1f} s (median), {max(lost):.1f} s (most, start-up included)"
    )
    sys.exit(bool(different or unreadable))


if __name__ == "__main__":
    main()
