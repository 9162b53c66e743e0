"""Blocks on every core: the same bits on one and on several, in order, and the number of threads as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import capruner
from capruner.core.elimination import compensate_prefixes
from capruner.core.fisher import BlockFisher
from capruner.core.numerics import NotPositiveDefiniteError
from capruner.core.parallel import chunk_size, in_chunks, on_every_core

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_parts_run_side_by_side_each_on_one_core_without_gradients() -> None:
    together = threading.Barrier(2, timeout=20)

    def work(part: int) -> tuple[int, int, bool]:
        together.wait()  # would time out if one ran after the other
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    assert on_every_core(work, range(4)) == [(part, 1, False) for part in range(4)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.usefixtures("two_threads")
def test_the_first_error_in_order_comes_out_and_the_threads_are_as_they_were() -> None:
    def work(part: slice) -> None:
        if part.start:
            raise ValueError(f"part {part.start}")

    with pytest.raises(ValueError, match="part 3"):
        in_chunks(12, 3, work, "counting", CPU)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("total", "chunk"), [(0, 4), (1, 4), (7, 2), (8, 100)])
@pytest.mark.usefixtures("two_threads")
def test_everything_is_worked_on_once_in_order(total: int, chunk: int) -> None:
    parts = in_chunks(total, chunk, lambda part: list(range(total))[part], "counting", CPU)
    assert [item for part in parts for item in part] == list(range(total))
    assert all(len(part) <= chunk for part in parts)
    assert len(parts) == 2 or total != 8  # both cores have something to do


def test_the_bits_do_not_depend_on_the_threads_or_the_chunks() -> None:
    n, B, m = 300, 24, 40
    torch.manual_seed(1)
    G, w = torch.randn(m, n, B), torch.randn(n, B)
    counts = torch.randint(B, (3, n))

    def run(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        try:
            fisher = BlockFisher(n, B, m, 1e-2)
            fisher.add(G)
            H = fisher.inverse()
            order = capruner.eliminate(w, H, blocks_in_parallel=17).order
            return [H, order, *compensate_prefixes(w, H, order, counts, blocks_in_parallel=11)]
        finally:
            torch.set_num_threads(1)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.usefixtures("two_threads")
def test_blocks_that_climbed_the_ladder_are_counted_in_all_threads() -> None:
    n, B = 200, 12
    fisher = BlockFisher(n, B, 16, 1e-12, solver="accumulate")
    rows = torch.randn(16, n, B)
    rows[:, ::4] = rows[:1, ::4] * 10  # of rank 1, far above the damping
    fisher.add(rows)
    fisher.inverse(rungs=12)
    assert fisher.damped == n // 4
    fisher = BlockFisher(n, B, 16, 1e-12, solver="accumulate")
    fisher.add(rows)
    with pytest.raises(NotPositiveDefiniteError, match="Fisher block 0 "):
        fisher.inverse()


def test_chunks_fit_the_caches_and_a_size_that_cannot_be_is_refused() -> None:
    assert chunk_size(None, 192, 8, CPU) * 192**2 * 8 <= 4 * 2**20
    assert chunk_size(None, 192, 8, torch.device("cuda")) > chunk_size(None, 192, 8, CPU)
    assert chunk_size(None, 10**5, 8, CPU) == 1
    assert chunk_size(7, 192, 8, CPU) == 7
    with pytest.raises(ValueError, match="blocks_in_parallel must be at least 1"):
        chunk_size(0, 192, 8, CPU)
