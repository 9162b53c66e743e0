"""Every scheduler of timm begins at --lr, and is where it was after a resume."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from capruner.vision.training_arguments import parse
from capruner.vision.training_schedule import Schedule

SCHEDULERS = ("cosine", "tanh", "step", "constant", "multistep", "plateau", "poly", "wsd", "rsqrt", "none")
SCORES = [10.0, 20.0, 15.0, 15.0, 15.0, 15.0, 30.0, 12.0, 12.0, 12.0, 12.0]


def schedule(sched: str, *more: str) -> tuple[Schedule, torch.optim.Optimizer]:
    more = (*more, *(["--lr-stable-timescale", "1"] if sched == "rsqrt" else []))
    words = [
        "data",
        "--model",
        "m",
        "--sparseml-recipe",
        "r",
        "--lr",
        "0.05",
        "--epochs",
        "10",
        "--sched",
        sched,
        *more,
    ]
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.05)
    return Schedule(optimizer, parse(words), 4, active=True), optimizer


def train(made: Schedule, optimizer: torch.optim.Optimizer, epochs: range) -> list[float]:
    rates = []
    for epoch in epochs:
        for step in range(4):
            rates.append(optimizer.param_groups[0]["lr"])
            made.after_step(4 * (epoch - 1) + step + 1)
        made.after_epoch(epoch, SCORES[epoch])
    return rates


@pytest.mark.promise("Resume", "Every scheduler of timm starts at `--lr`")
@pytest.mark.parametrize("sched", SCHEDULERS)
@pytest.mark.parametrize("more", [[], ["--sched-on-updates"]], ids=["epochs", "updates"])
def test_the_first_epoch_is_trained_at_lr(sched: str, more: list[str]) -> None:
    if sched == "plateau" and more:
        pytest.skip("plateau has epochs only")
    made, optimizer = schedule(sched, *more)
    made.after_epoch(0, 50.0)  # the model before training
    assert train(made, optimizer, range(1, 2))[0] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("sched", SCHEDULERS)
def test_warmup_begins_at_its_rate_and_reaches_lr(sched: str) -> None:
    made, optimizer = schedule(sched, "--warmup-epochs", "2", "--warmup-lr", "1e-3")
    rates = train(made, optimizer, range(1, 4))[::4]
    if sched != "none":
        assert rates[0] == pytest.approx(1e-3)
        assert 0.02 < rates[1] < 0.03
    if sched != "tanh":  # which goes on from there as if it had decayed meanwhile
        assert rates[2] == pytest.approx(0.05, rel=0.2)


@pytest.mark.promise("Resume", "Every scheduler of timm resumes with the same learning rates")
@pytest.mark.parametrize("sched", SCHEDULERS)
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resumed_rates_are_the_same_bits(sched: str, stop: int) -> None:
    more = ["--patience-epochs", "1", "--lr-noise", "0.2", "0.8", "--decay-milestones", "3", "6"]
    whole = train(*schedule(sched, *more), range(1, 11))
    made, optimizer = schedule(sched, *more)
    begun = train(made, optimizer, range(1, stop + 1))
    saved, groups = made.state_dict(), optimizer.state_dict()
    again, resumed = schedule(sched, *more)
    resumed.load_state_dict(groups)
    again.load_state_dict(saved)
    again.place(stop, 4 * stop)
    assert begun + train(again, resumed, range(stop + 1, 11)) == whole
    assert sched in ("constant", "none") or len(set(whole)) > 1
