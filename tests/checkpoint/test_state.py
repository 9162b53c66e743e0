"""Interrupted runs resume with bit-identical results."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from interruptions import ARGUMENTS, Data, Killed, net
from untouched import same, snapshot

import capruner
from capruner.calibration.memory_plan import WORKING_SET
from capruner.checkpoint import run
from capruner.methods.base import SecondOrderMethod

BUDGET = WORKING_SET + 31 * 24 * (72 + 6 + 8) * 4 + 50_000

CASES: dict[str, dict[str, Any]] = {
    "woodbury": {"sparsity": [0.5, 0.8]},
    "accumulate": {"sparsity": 0.8, "num_grads": 90, "solver": "accumulate"},
    "samples": {"sparsity": 0.8, "gradients": "sample", "num_grads": 200},
    "recomputations": {"sparsity": [0.5, 0.8], "num_recomputations": 3, "num_grads": 16},
    "distillation": {"sparsity": [0.5, 0.8], "num_grads": 20, "distill_passes": 0.1},
    "distillation, recomputed": {"sparsity": 0.8, "num_recomputations": 3, "num_grads": 16, "distill_passes": 0.1},
    "groups": {"sparsity": 0.8, "memory_budget": BUDGET},
    "groups of their own targets": {"sparsity": 0.8, "memory_budget": BUDGET, "global_sparsity": False},
    "fast_cap": {"sparsity": 0.8, "method": "fast_cap", "num_grads": 20},
    "obs": {"sparsity": 0.8, "method": "obs"},
    "as many gradients as it takes": {"sparsity": [0.5, 0.8], "num_grads": "auto", "fisher_block_size": 20},
    "labels of the model": {"sparsity": 0.8, "labels": "model"},
    "2:4": {"sparsity": 0.5, "mask_type": "2:4", "params": ["0.weight", "4.weight"]},
}


def prune(data: Data, **more: Any) -> capruner.PruningResult:
    return capruner.prune(net(), data, data.loss, **(ARGUMENTS | more))


def equal(a: capruner.PruningResult, b: capruner.PruningResult) -> bool:
    """Bitwise, but for the clock."""
    return (
        same(
            [[*x.weights.values(), *x.others.values()] for x in a.levels],
            [[*x.weights.values(), *x.others.values()] for x in b.levels],
        )
        and same([list(x.masks.values()) for x in a.levels], [list(x.masks.values()) for x in b.levels])
        and [(x.sparsity, dict(x.losses), list(x.weights)) for x in a.levels]
        == [(x.sparsity, dict(x.losses), list(x.weights)) for x in b.levels]
        and (a.settings, a.method, a.total_weights) == (b.settings, b.method, b.total_weights)
    )


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every slab."""
    monkeypatch.setattr(run, "SAVE_EVERY", 0.0)


@pytest.mark.promise("Resume", "A calibration killed at any moment resumes with bit-identical results on a CPU")
@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again_it_ends_with_the_same_bits(case: str, tmp_path: Path) -> None:
    sizes = (5, 9, 16) if case == "samples" else (4,)
    whole = Data(sizes=sizes)
    expected = prune(whole, **CASES[case])
    survived = 0
    for attempt in itertools.count():
        data = Data(kill_at=max(7, whole.seen // 4), sizes=sizes)
        try:
            found = prune(data, state_dir=tmp_path / "state", **CASES[case])
            break
        except Killed:
            survived += 1
            assert attempt < 30
    assert survived >= 2
    assert equal(found, expected)
    capruner.remove_state(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("Resume", "Killed after its last gradient, it continues with the data that was next")
@pytest.mark.parametrize(
    ("case", "at"),
    [
        ("distillation", 1),
        ("as many gradients as it takes", 1),
        *((case, at) for case in ("recomputations", "distillation, recomputed") for at in (1, 2)),
    ],
)
def test_killed_after_the_gradients_the_next_pass_is_still_the_next(
    case: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Data()
    expected = prune(whole, **CASES[case])
    solve, calls = SecondOrderMethod.solve_counts, 0

    def killed(self: Any, counts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return solve(self, counts)

    monkeypatch.setattr(SecondOrderMethod, "solve_counts", killed)
    with pytest.raises(Killed):
        prune(Data(), state_dir=tmp_path, **CASES[case])
    again = Data()
    assert equal(prune(again, state_dir=tmp_path, **CASES[case]), expected)
    assert again.seen == whole.seen - at * expected.settings["num_grads"]


@pytest.mark.promise("Resume", "No gradient is computed twice")
@pytest.mark.usefixtures("often")
def test_no_gradient_is_computed_twice(tmp_path: Path) -> None:
    slab = 72 // 12
    first = Data(kill_at=3 * slab + 2)
    with pytest.raises(Killed):
        prune(first, sparsity=0.5, state_dir=tmp_path)
    second = Data()
    prune(second, sparsity=0.5, state_dir=tmp_path)
    assert second.seen == ARGUMENTS["num_grads"] - 3 * slab
    third = Data()
    prune(third, sparsity=0.5, state_dir=tmp_path)  # all is done: the state waits for the result to be safe
    assert third.seen == 0


def test_without_a_reason_it_is_saved_at_the_end_of_the_gradients_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = run.RunCheckpoint.save
    monkeypatch.setattr(
        run.RunCheckpoint, "save", lambda self, *a: (saved.append(a[1]["stream"]["taken"]), save(self, *a))
    )
    expected = prune(Data(), sparsity=0.5)
    assert equal(prune(Data(), sparsity=0.5, state_dir=tmp_path), expected)
    assert saved == [40]


@pytest.mark.usefixtures("often")
def test_the_model_is_as_it_was_after_each_kill(tmp_path: Path) -> None:
    model = net()
    before = snapshot(model)
    data = Data(kill_at=20)
    with pytest.raises(Killed):
        capruner.prune(
            model, data, data.loss, 0.8, num_recomputations=2, state_dir=tmp_path, **(ARGUMENTS | {"num_grads": 16})
        )
    assert same(snapshot(model), before)
