"""Kill a training, go on, and find the weights of the one that was never killed. What several processes do together."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from training_case import ROOT, Line, rows, same_weights, updates

pytest.importorskip("timm")
from capruner.cli import arguments as cli
from capruner.methods import CAP
from capruner.vision import sparse_training, training_resume, training_watch
from capruner.vision.training_checkpoint import load_state, load_training, save_state, save_weights
from capruner.vision.training_data import GradientSamples
from capruner.vision.training_watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:timm")
SCRIPT = ROOT / "research" / "sparse_training.py"
VARIED = {
    "model_ema": True,
    "mixup": 0.5,
    "drop_path": 0.2,
    "aa": "rand-m5",
    "reprob": 0.2,
    "save_last": True,
    "epochs": 4,
}


class Killed(BaseException):
    """As sudden as a signal, but in this process."""


def train_and_kill(arguments: list[str], monkeypatch: pytest.MonkeyPatch, when: str, epoch: int) -> None:
    """Train until ``when`` is reached in ``epoch``."""
    original = getattr(sparse_training.Training, when)

    def killing(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        if self.epoch == epoch:
            raise Killed
        return result

    with monkeypatch.context() as patch:
        patch.setattr(sparse_training.Training, when, killing)
        with pytest.raises(Killed):
            sparse_training.main(arguments)


@pytest.mark.promise(
    "Resume", "Gradual training resumes from its last epoch, and within a pruning update from the gradients drawn"
)
@pytest.mark.parametrize("recipe", ["cap", "rate", "chain", "gmp"])
def test_stopped_twice_and_resumed_ends_with_the_same_bits(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    sparse_training.main(line(recipe, experiment="whole", **VARIED))
    train_and_kill(line(recipe, resume=True, **VARIED), monkeypatch, "_take_step", 2)
    train_and_kill(line(recipe, resume=True, **VARIED), monkeypatch, "_keep", 3)
    sparse_training.main(line(recipe, resume=True, **VARIED))
    whole, trial = tmp_path / "whole", tmp_path / "trial"
    assert same_weights(whole / "checkpoints" / "last.safetensors", trial / "checkpoints" / "last.safetensors")
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (trial / "checkpoints").iterdir())
    for name in names:
        assert same_weights(whole / "checkpoints" / name, trial / "checkpoints" / name), name
    assert updates(whole) == updates(trial)
    told = ("epoch", "sparsity", "train_loss", "top1", "ema_loss", "lr")
    assert [[row[key] for key in told] for row in rows(whole)] == [[row[key] for key in told] for row in rows(trial)]


@pytest.mark.promise(
    "Resume", "Gradual training resumes from its last epoch, and within a pruning update from the gradients drawn"
)
@pytest.mark.parametrize("update", [1, 2, 3])
def test_killed_within_a_pruning_update_it_ends_with_the_same_bits(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    """The second update is the last of its epoch: on the way back to it the first is done again, with the second's state in the folder."""
    sparse_training.main(line(experiment="whole", save_last=True))
    prepare, calls = CAP.prepare, itertools.count(1)

    def killing(self: CAP, *args: Any) -> None:  # all gradients are drawn, and saved
        if next(calls) == update:
            raise Killed
        prepare(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CAP, "prepare", killing)
        with pytest.raises(Killed):
            sparse_training.main(line("state", save_last=True))
    assert list((tmp_path / "trial" / "traces").glob("*/manifest-*"))
    sparse_training.main(line("state", save_last=True, resume=True))
    last = Path("checkpoints") / "last.safetensors"
    assert same_weights(tmp_path / "whole" / last, tmp_path / "trial" / last)
    assert not (tmp_path / "trial" / "traces").exists()


@pytest.mark.parametrize(
    "flags", [{"opt": "sgd", "grad_accum_steps": 2}, {"amp": True, "amp_dtype": "float16", "opt": "lamb"}]
)
def test_optimizer_and_loss_scaling_are_resumed(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any]
) -> None:
    sparse_training.main(line(experiment="whole", save_last=True, **flags))
    train_and_kill(line(save_last=True, **flags), monkeypatch, "_keep", 2)
    sparse_training.main(line(save_last=True, resume=True, **flags))
    last = Path("checkpoints") / "last.safetensors"
    assert same_weights(tmp_path / "whole" / last, tmp_path / "trial" / last)


def test_worker_processes_see_the_same_images_after_resuming(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {**VARIED, "workers": 1, "epochs": 2}
    sparse_training.main(line(experiment="whole", **flags))
    train_and_kill(line(**flags), monkeypatch, "_keep", 1)
    sparse_training.main(line(resume=True, **flags))
    last = Path("checkpoints") / "last.safetensors"
    assert same_weights(tmp_path / "whole" / last, tmp_path / "trial" / last)


def test_resuming_a_finished_run_changes_nothing(line: Line, tmp_path: Path) -> None:
    sparse_training.main(line("oneshot"))
    before = (tmp_path / "trial" / "summary.csv").read_bytes()
    sparse_training.main(line("oneshot", resume=True))
    assert (tmp_path / "trial" / "summary.csv").read_bytes() == before


def test_an_earlier_run_is_not_overwritten(line: Line) -> None:
    sparse_training.main(line("oneshot", epochs=1))
    with pytest.raises(cli.UserError, match=r"belongs to an earlier run; continue it with --resume"):
        sparse_training.main(line("oneshot", epochs=1))


def arguments_of(line: Line, **changes: Any) -> list[str]:
    return line("gmp", **{"epochs": 2, "opt": "sgd", "lr": 0.05, "momentum": 0.9, "save_last": True, **changes})


def lr_of(folder: Path) -> list[float]:
    return [float(row["lr"]) for row in rows(folder)[1:]]


def test_more_epochs_follow_the_longer_schedule(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse_training.main(arguments_of(line, experiment="whole", epochs=4))
    sparse_training.main(arguments_of(line))
    sparse_training.main(arguments_of(line, epochs=4, resume=True))
    assert "note: --epochs was 2, it is 4 from here on" in capsys.readouterr().out
    assert lr_of(tmp_path / "trial")[2:] == lr_of(tmp_path / "whole")[2:]
    assert lr_of(tmp_path / "trial")[2] > 0.02


TAKEN = [
    ({"lr": 0.01}, "lr", 0.01),
    ({"sched": "none", "lr": 0.01}, "lr", 0.01),
    ({"sched": "step", "decay_epochs": 1, "decay_rate": 0.5}, "lr", 0.025),
    ({"min_lr": 0.04}, "lr", 0.045),
    ({"weight_decay": 0.5}, "weight_decay", 0.5),
    ({"momentum": 0.3}, "momentum", 0.3),
    ({"opt_args": ["nesterov=False"]}, "nesterov", False),
    ({"smoothing": 0.3}, None, None),
    ({"seed": 3}, None, None),
]


@pytest.mark.promise(
    "Resume", "`--resume` with a changed argument: it takes effect, with a line that says so, or is refused by name"
)
@pytest.mark.parametrize(("changes", "key", "value"), TAKEN, ids=lambda value: str(value))
def test_a_changed_argument_takes_effect(
    line: Line, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], key: str | None, value: Any
) -> None:
    unscheduled = {"sched": "none"} if changes.get("sched") == "none" else {}
    train_and_kill(arguments_of(line, **unscheduled), monkeypatch, "_keep", 1)
    monkeypatch.setattr(sparse_training.Training, "run", lambda self: ran.append(self))
    ran: list[Any] = []
    sparse_training.main(arguments_of(line, **changes, resume=True))
    (training,) = ran
    if key:
        expected = [value / 2 if changes == {"lr": 0.01} else value]  # half of the cosine is over
        assert training.optimizer.param_groups[-1][key] == pytest.approx(expected[0])


REFUSED: list[dict[str, Any]] = [
    {"opt": "adamw"},
    {"weight_decay": 0},
    {"batch_size": 6},
    {"grad_accum_steps": 2},
    {"model_ema": True},
    {"amp": True},
    {"drop_path": 0.1},
    {"mean": [0.1, 0.2, 0.3]},
    {"val_limit": 3},
    {"sparsities": [0.6, 0.7]},
    {"layer_decay": 0.9},
    {"opt_betas": [0.8, 0.9]},
    {"lr_base": 3.0},
    {"sched": "plateau"},
    {"checkpoint": "other.pth"},
    {"model_kwargs": ["img_size=16", "depth=3"]},
]


@pytest.mark.promise(
    "Resume", "`--resume` with a changed argument: it takes effect, with a line that says so, or is refused by name"
)
@pytest.mark.parametrize("changes", REFUSED, ids=lambda value: next(iter(value)))
def test_a_changed_argument_that_cannot_take_effect_is_refused(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    train_and_kill(arguments_of(line), monkeypatch, "_keep", 1)
    before = (tmp_path / "trial" / "last.pt").read_bytes()
    with pytest.raises(
        cli.UserError, match=rf"--resume: --{next(iter(changes)).replace('_', '-')} was .* and is .* now"
    ):
        sparse_training.main(arguments_of(line, **changes, resume=True))
    assert (tmp_path / "trial" / "last.pt").read_bytes() == before


def test_every_argument_is_in_one_table() -> None:
    """Those in none are refused; no name in a table is a misspelt one."""
    from capruner.vision.training_arguments import add_arguments

    parser = cli.Parser()
    add_arguments(parser)
    known = {action.dest for action in parser._actions}
    tables = [training_resume.WITHOUT_EFFECT, training_resume.EACH_EPOCH, training_resume.SCHEDULE]
    tables += [training_resume.OPTIMIZER, training_resume.RATE_SOURCES, training_resume.STARTING]
    assert not set.union(*tables) - known
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_other_surroundings_are_refused(line: Line, training_place: Path, tmp_path: Path) -> None:
    sparse_training.main(line("oneshot", epochs=1))
    last = tmp_path / "trial" / "last.pt"
    with pytest.raises(cli.UserError, match="the recipe has another text than before"):
        sparse_training.main(line("cap", epochs=1, resume=last, experiment="third"))
    save_state(last, load_state(last) | {"epoch": 2})
    with pytest.raises(cli.UserError, match="--epochs 1, but 2 epochs are done already"):
        sparse_training.main(line("oneshot", epochs=1, resume=True))
    save_state(last, load_state(last) | {"epoch": 1, "processes": 4})
    with pytest.raises(cli.UserError, match="processes: 4 before, 1 now"):
        sparse_training.main(line("oneshot", epochs=2, resume=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_plateau_is_resumed_with_its_counters(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"sched": "plateau", "patience_epochs": 1, "epochs": 5, "decay_rate": 0.5, "lr_noise": [0.2, 0.9]}
    sparse_training.main(arguments_of(line, experiment="whole", **flags))
    rates = lr_of(tmp_path / "whole")
    assert rates[0] == 0.05
    assert min(rates) < 0.05
    for epoch in (1, 2, 3, 4):
        train_and_kill(arguments_of(line, resume=True, **flags), monkeypatch, "_keep", epoch)
    sparse_training.main(arguments_of(line, resume=True, **flags))
    assert lr_of(tmp_path / "trial") == rates
    last = Path("checkpoints") / "last.safetensors"
    assert same_weights(tmp_path / "whole" / last, tmp_path / "trial" / last)
    with pytest.raises(cli.UserError, match=r"--lr was 0.05 and is 0.1 now.*plateau keeps its rate"):
        sparse_training.main(arguments_of(line, resume=True, **flags | {"lr": 0.1}))


def test_a_file_of_weights_is_called_that(line: Line, tmp_path: Path) -> None:
    save_file({"head.bias": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(cli.UserError, match=r"to start from weights, use --checkpoint .*weights.safetensors$"):
        load_state(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_torn_checkpoint_is_recognised(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"weights": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(cli.UserError, match=r"cut short, or not a checkpoint"):
        load_state(path)


def test_a_flipped_bit_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"weights": torch.randn(1000)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(cli.UserError, match=r"the checksum of .* is wrong"):
        load_state(path)


class Foreign:
    """Something that unpickling would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_a_foreign_checkpoint_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(2, 2).state_dict(), "weights.pt")
    with pytest.raises(cli.UserError, match=r"to start from weights, use --checkpoint"):
        load_state(Path("weights.pt"))
    torch.save(Foreign(), "evil.pt")
    with pytest.raises(cli.UserError, match=r"not a checkpoint of sparse_training.py"):
        load_state(Path("evil.pt"))
    assert not Path("was_run").exists()


def test_a_checkpoint_without_all_it_needs_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "last.pt", {"epoch": 1, "model": {}, "steps": "many"})
    with pytest.raises(cli.UserError, match=r"--resume .*last.pt: steps, optimizer, .* are missing or of another kind"):
        load_training(tmp_path / "last.pt")


def test_a_disk_without_room_is_said(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(cli.UserError, match=r"last.pt cannot be written: .* is there room on the disk"):
            save_state(tmp_path / "last.pt", {"weights": torch.randn(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"value": 1})

    def die(state: Any, file: Path) -> None:
        Path(file).write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(Killed):
        save_state(path, {"value": 2})
    assert load_state(path)["value"] == 1


def test_weights_that_break_their_mask_are_not_written(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, :2] = False
    with pytest.raises(RuntimeError, match=r"2 pruned weights of weight are not zero in best.safetensors"):
        save_weights(tmp_path / "best.safetensors", model, {"weight": mask}, {})
    assert not list(tmp_path.iterdir())


def test_all_processes_together_draw_what_one_would(tmp_path: Path) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(22), torch.arange(22))

    def drawn(rank: int, size: int, count: int, step: int = 3) -> list[list[int]]:
        args = SimpleNamespace(gs_batch_size=4, gs_aug=False, workers=0, seed=1)
        processes = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))
        samples = GradientSamples(data, {"input_size": (3, 8, 8)}, args, processes, lambda: step)  # type: ignore[arg-type]
        batches = samples({})()
        return [next(batches)[2].tolist() for _ in range(count)]

    alone = drawn(0, 1, 12)
    assert len({image for batch in alone[:5] for image in batch}) == 20
    for size in (2, 3, 4):
        shares = [drawn(rank, size, 12 // size) for rank in range(size)]
        assert [batch for together in zip(*shares) for batch in together] == alone
    assert drawn(0, 1, 12, step=4) != alone


def test_the_watch_names_who_is_silent_and_who_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    store, now = dist.HashStore(), 0.0
    watches = [Watch(store, rank, 3, timeout=4.0) for rank in range(3)]
    alive = [0, 1, 2]

    def sleep(seconds: float) -> None:  # what the threads of those alive do meanwhile
        nonlocal now
        now += seconds
        for rank in alive:
            watches[rank]._beat(str(now))
        for rank in alive:
            watches[rank]._look()

    monkeypatch.setattr(training_watch, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    sleep(0.1)
    alive.remove(2)  # it says nothing any more, not even that it is done
    assert watches[0].explain(RuntimeError("Connection closed")).startswith("rank 2 died or froze")
    alive.append(2)
    store.set("failed/1", "the loss is nan")
    assert watches[0].explain(RuntimeError("Connection closed")) == "rank 1 failed: the loss is nan"


def launch(arguments: list[str], log: Path, launcher: list[str] | None = None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(launcher or []), str(SCRIPT), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent)


@pytest.mark.slow
def test_killed_at_a_random_moment(line: Line, tmp_path: Path) -> None:
    sparse_training.main(line(experiment="whole", **VARIED))
    log, last = tmp_path / "log", Path("checkpoints") / "last.safetensors"
    running = launch(line(**VARIED), log)
    began = time.monotonic()
    while not (tmp_path / "trial" / "last.pt").exists() and time.monotonic() - began < 100:
        time.sleep(0.05)
    time.sleep(random.uniform(0.0, 1.5))
    running.send_signal(signal.SIGKILL)
    running.wait()
    sparse_training.main(line(resume=True, **VARIED))
    assert same_weights(tmp_path / "whole" / last, tmp_path / "trial" / last)


@pytest.mark.slow
def test_two_processes_prune_alike_and_climb_as_one_does(line: Line, tmp_path: Path) -> None:
    sparse_training.main(line("chain", experiment="one", epochs=3))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = line("chain", batch_size=2, epochs=3, model_ema=True, timeout=60, val_limit=7)
    running = launch(arguments, tmp_path / "log", launcher)
    assert running.wait() == 0, (tmp_path / "log").read_text()
    # The first calibration is at the same weights with the same gradient samples; later weights differ in their last bits.
    one, two = (json.loads((tmp_path / name / "layer_sparsity.json").read_text()) for name in ("one", "trial"))
    assert [update["sparsity"] for update in one] == [update["sparsity"] for update in two]
    assert one[0]["layers"] == two[0]["layers"]


WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import timm  # as the script does: its imports of torch, made while the model is wrapped, would hold the group
from capruner.cli import arguments as cli
from capruner.vision.training_processes import parallel, started

def main(argv=None):
    with started(torch.device("cpu"), 20.0) as processes:
        weights = {{"fc1.weight": torch.ones(3, 4), "fc2.weight": torch.zeros(5, dtype=torch.bool)}}
        processes.check_equal(weights, "before")
        assert processes.sum(processes.rank, 1) == [1, 2]
        if processes.rank == 1 and {fault} == "bits":
            weights["fc1.weight"][2, 3] = 1 + 1e-7
        if processes.rank == 1 and {fault} == "error":
            raise ValueError("the loss of batch 7 is nan")
        processes.check_equal(weights, "pruning update at step 5")
        model = parallel(torch.nn.Linear(2, 2), processes)
        model.cycle = [model]
        del model
    print(sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm")), "threads left")

sys.exit(cli.run(main))
"""


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("bits", "pruning update at step 5: rank 1 has other bits than rank 0 in fc1.weight"),
        ("error", "rank 1 failed: the loss of batch 7 is nan"),
        ("none", "0 threads left"),
    ],
)
def test_every_process_tells_which_one_is_at_fault(tmp_path: Path, fault: str, told: str) -> None:
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), fault=repr(fault)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "worker.py"],
            cwd=tmp_path,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    for process in running:
        output, _ = process.communicate(timeout=100)
        assert told in output
        assert "Traceback" not in output
        assert process.returncode == (0 if fault == "none" else 2)
