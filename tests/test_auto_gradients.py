"""``num_grads="auto"``: the number it chooses is all that differs from choosing that number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from torch import Tensor, nn

import capruner
from capruner.calibration import driver, enough
from capruner.calibration.memory_plan import WORKING_SET
from capruner.core.blocks import BlockLayout
from capruner.distributed import Partition

ARGUMENTS: dict[str, Any] = {"sparsity": [0.5, 0.8], "fisher_block_size": 40, "progress": False}
TWO_GROUPS = WORKING_SET + 60 * 60 * (40 + 6 + 8) * 4 + 1000


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 5))


def batches(count: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 40, generator=generator), torch.randint(5, (size,), generator=generator)) for _ in range(count)]  # fmt: skip


def prune(data: Any, **more: Any) -> capruner.PruningResult:
    return capruner.prune(net(), data, **(ARGUMENTS | more))


def equal(a: capruner.PruningResult, b: capruner.PruningResult) -> bool:
    return all(
        torch.equal(x.weights[name], y.weights[name]) and torch.equal(x.masks[name], y.masks[name])
        for x, y in zip(a.levels, b.levels, strict=True)
        for name in x.weights
    )


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds at which a small test has something to decide."""
    monkeypatch.setattr(enough, "LEAST", 8)
    monkeypatch.setattr(driver, "LEAST", 8)
    monkeypatch.setattr(driver, "ENOUGH", 1e9)


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradients": "sample"},
        {"method": "fast_cap"},
        {"method": "obs"},
        {"damp": 1e-4, "solver": "accumulate"},
        {"num_recomputations": 2, "sparsity": 0.8},
        {"memory_budget": TWO_GROUPS},
    ],
    ids=str,
)
def test_bit_identical_to_the_number_that_it_chose(more: dict[str, Any]) -> None:
    data = batches(300)
    chosen = prune(data, **more)
    count = chosen.settings["num_grads"]
    assert count == 8
    assert equal(chosen, prune(data, num_grads=count, **more))


@pytest.mark.usefixtures("quickly")
def test_a_smaller_error_takes_more_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    data, counts = batches(1000), []
    for bound in (1e9, 3.0, 0.0):
        monkeypatch.setattr(driver, "ENOUGH", bound)
        counts.append(prune(data).settings["num_grads"])
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (8, 1000)


def test_the_first_weights_of_large_blocks_are_looked_at() -> None:
    layout = BlockLayout((6, 300), 300)
    sample = enough.Sample(Partition({"layer": layout}), torch.device("cpu"))
    gradients = torch.randn(5, 6, 300)
    sample.add({"layer": gradients})
    chosen = gradients[:, enough.sample_blocks({"layer": layout})["layer"], : enough.WEIGHTS].double()
    torch.testing.assert_close(sample.sums["layer"].blocks, torch.einsum("kni,knj->nij", chosen, chosen))


def test_no_more_batches_than_there_are(caplog: pytest.LogCaptureFixture) -> None:
    data = batches(11)
    chosen = prune(data)
    assert chosen.settings["num_grads"] == 11
    assert "started again" not in caplog.text
    assert equal(chosen, prune(data, num_grads=11))


class Unknown:
    """A loader without a length, which can be started again."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(batches(9))


@pytest.mark.usefixtures("quickly")
def test_a_loader_without_a_length_is_started_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(driver, "ENOUGH", 0.0)
    monkeypatch.setattr(driver, "MOST", 32)
    assert prune(Unknown()).settings["num_grads"] == 32
    assert "ends after 9 batches" in caplog.text


def choose(rank: int, size: int) -> dict[str, Any]:
    data = batches(300)[rank::size]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enough, "LEAST", 8)
        patch.setattr(driver, "LEAST", 8)
        patch.setattr(driver, "ENOUGH", 1e9)
        chosen = prune(data)
        again = prune(data, num_grads=chosen.settings["num_grads"])
    return {"count": torch.tensor(chosen.settings["num_grads"]), "same": torch.tensor(equal(chosen, again))}


def test_several_processes_choose_the_same(tmp_path: Path) -> None:
    alone = choose(0, 1)
    for found in run(3, tmp_path / "ranks", choose):
        assert found["count"] == alone["count"]
        assert found["same"]


def test_woodbury_has_to_know_the_number() -> None:
    with pytest.raises(ValueError, match="num_grads='auto' needs solver='accumulate'"):
        capruner.PruneConfig(solver="woodbury")
