from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from memory_case import TWO_GROUPS, net
from torch import Tensor

import capruner
from capruner.core.memory import parse_bytes


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 40), torch.randint(5, (4,))) for _ in range(24)]


class Counted:
    """Counts the passes over a list of batches."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(data())


ARGUMENTS = {"num_grads": 24, "fisher_block_size": 60, "damp": 1e-3, "progress": False}


@pytest.mark.promise("Memory", "A memory budget does not change the result")
@pytest.mark.parametrize("method", ["cap", "obs"])
@pytest.mark.parametrize(("global_", "passes"), [(True, 6), (False, 3)])
def test_the_same_result_layer_by_layer(method: str, global_: bool, passes: int) -> None:
    batches = Counted()
    whole = capruner.prune(net(), data(), sparsity=[0.4, 0.8], method=method, global_sparsity=global_, **ARGUMENTS)
    parts = capruner.prune(
        net(),
        batches,
        sparsity=[0.4, 0.8],
        method=method,
        global_sparsity=global_,
        memory_budget=TWO_GROUPS,
        **ARGUMENTS,
    )  # type: ignore[arg-type]
    assert batches.passes == passes
    for s in (0.4, 0.8):
        assert list(parts.masks(s)) == list(whole.masks(s))
        for name, weight in whole.level(s).weights.items():
            assert torch.equal(parts.level(s).masks[name], whole.level(s).masks[name])
            assert torch.equal(parts.level(s).weights[name], weight)
        assert parts.predicted_loss(s) == whole.predicted_loss(s)


def test_one_group_where_it_fits_and_none_needed_for_fast_cap() -> None:
    for method, budget in (("cap", "1GiB"), ("fast_cap", "1MiB"), ("magnitude", 1)):
        batches = Counted()
        capruner.prune(net(), batches, sparsity=0.5, method=method, memory_budget=budget, **ARGUMENTS)  # type: ignore[arg-type]
        assert batches.passes == (0 if method == "magnitude" else 1)


def test_recomputation_within_a_budget() -> None:
    whole = capruner.prune(net(), data(), sparsity=0.8, num_recomputations=2, **ARGUMENTS)
    parts = capruner.prune(net(), data(), sparsity=0.8, num_recomputations=2, memory_budget=TWO_GROUPS, **ARGUMENTS)
    assert all(torch.equal(parts.masks()[name], mask) for name, mask in whole.masks().items())


def test_it_says_what_it_will_take_before_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    capruner.prune(net(), data(), sparsity=0.5, memory_budget=TWO_GROUPS, **(ARGUMENTS | {"progress": True}))
    assert "3 groups of layers fit 129 MiB" in capsys.readouterr().err


@pytest.mark.promise(
    "Memory",
    "A memory budget that is too small is an error before the first allocation, and names the smallest that works",
)
def test_a_budget_that_cannot_work_names_the_smallest_that_would() -> None:
    with pytest.raises(ValueError, match=r"memory_budget=100 MiB is too small: 2\.weight alone needs 130 MiB"):
        capruner.prune(net(), data(), sparsity=0.5, memory_budget="100MiB", **ARGUMENTS)
    with pytest.raises(ValueError, match="`batches` is an iterator, which ends after one"):
        capruner.prune(net(), iter(data()), sparsity=0.5, memory_budget=TWO_GROUPS, **ARGUMENTS)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("1.5 GB", 1_500_000_000), ("512mib", 2**29), (77, 77), ("77", 77)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 gigs", "-1GiB", "GiB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="memory_budget must be bytes or a size"):
        parse_bytes(text)
