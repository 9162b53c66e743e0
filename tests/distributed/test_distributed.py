"""Several processes over gloo: each test starts them anew, as ``torchrun`` would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ARGUMENTS, batches, net, run

import capruner
from capruner.core.blocks import BlockLayout
from capruner.distributed import Partition, PeerError


def prune_all_ways(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in ("cap", "obs", "fast_cap", "magnitude"):
        for global_ in (True, False):
            result = capruner.prune(
                net(), batches(rank, size), sparsity=[0.5, 0.9], method=method, global_sparsity=global_, **ARGUMENTS
            )
            for s in (0.5, 0.9):
                for name, weight in result.level(s).weights.items():
                    found[f"{method} {global_} {s} {name}"] = weight
                found[f"{method} {global_} {s} loss"] = result.predicted_loss(s)
    climbed = capruner.prune(net(), batches(rank, size), sparsity=0.8, num_recomputations=3, **ARGUMENTS)
    drawn = capruner.prune(net(), batches(rank, size), sparsity=0.8, labels="model", **ARGUMENTS)
    found |= {f"drawn {name}": weight for name, weight in drawn.level().weights.items()}
    return found | {f"climbed {name}": weight for name, weight in climbed.level().weights.items()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_end_with_the_bytes_of_one_process(size: int, tmp_path: Path) -> None:
    alone = prune_all_ways(0, 1)
    for found in run(size, tmp_path / "ranks", prune_all_ways):
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            if isinstance(value, float):
                assert found[key] == pytest.approx(value, rel=1e-3), key
            elif size == 3:
                # Slabs of 8 gradients do not divide by 3: other sums, other rounding, a near-tie may go the other way.
                assert ((found[key] == 0) != (value == 0)).sum() <= 0.01 * value.numel(), key
            else:
                assert torch.equal(found[key] == 0, value == 0), key
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)
    others = [torch.load(tmp_path / "ranks" / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for other in others[1:]:
        assert all(torch.equal(torch.as_tensor(other[key]), torch.as_tensor(others[0][key])) for key in other)


def uneven(rank: int, size: int) -> dict[str, Any]:
    """Seven gradients over three processes; the last one has bad data."""
    data = batches(rank, size)
    if rank == size - 1:
        data[0] = (torch.full((4, 20), torch.nan), data[0][1])
    good = capruner.prune(net(), batches(rank, size), sparsity=0.5, **(ARGUMENTS | {"num_grads": 7}))
    try:
        capruner.prune(net(), data, sparsity=0.5, **(ARGUMENTS | {"num_grads": 7}))
    except (ValueError, PeerError) as error:
        return {"zeros": sum(row["zeros"] for row in good.layer_report()), "error": f"{type(error).__name__}: {error}"}
    return {"error": "none"}


def test_uneven_shares_and_a_failing_rank_is_named_on_all(tmp_path: Path) -> None:
    found = run(3, tmp_path / "ranks", uneven)
    assert [f["zeros"] for f in found] == [388, 388, 388]
    assert found[2]["error"].startswith("BadBatchError: the loss of batch 0 is nan")
    for rank in (0, 1):
        assert found[rank]["error"].startswith("PeerError: rank 2 failed while drawing gradients")


def owned_share(rank: int, size: int) -> dict[str, Any]:
    layouts = {"a": BlockLayout.of((100, 10), 10), "b": BlockLayout.of((7,), 10), "c": BlockLayout.of((33, 5), 10)}
    balanced, whole = Partition(layouts), Partition(layouts, whole_layers=True)
    covered = {}
    for kind, partition in (("balanced", balanced), ("whole", whole)):
        for name, layout in layouts.items():
            local = torch.arange(layout.num_blocks)[partition.own(name)]
            covered[f"{kind} {name}"] = partition.gather(name, local)
    covered["blocks"] = sum(len(torch.arange(layouts[n].num_blocks)[balanced.own(n)]) for n in layouts)
    return covered


def test_every_block_has_one_owner_and_shares_are_balanced(tmp_path: Path) -> None:
    found = run(4, tmp_path / "ranks", owned_share)
    for f in found:
        for kind in ("balanced", "whole"):
            assert f[f"{kind} a"].tolist() == list(range(100))
            assert f[f"{kind} b"].tolist() == [0]
            assert f[f"{kind} c"].tolist() == list(range(17))
        assert 28 <= f["blocks"] <= 31
