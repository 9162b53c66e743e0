from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capruner.core.allocation import allocate, step_scores

INF = float("inf")


def layers(seed: int, count: int, values: int = 6) -> list[Tensor]:
    """Non-decreasing scores with many ties, some dead (-inf) in front and some that never leave (inf) behind."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        n, B = (int(torch.randint(1, 6, (), generator=g)) for _ in range(2))
        s = torch.randint(values, (n, B), generator=g).float()
        draw = torch.rand(n, B, generator=g)
        s = s.masked_fill(draw < 0.1, -INF).masked_fill(draw > 0.9, INF)
        made.append(s.sort(dim=1).values)
    return made


def sorted_steps(scores: list[Tensor]) -> list[tuple[float, int, int, int]]:
    return sorted(
        (float(s[b, k]), layer, b, k)
        for layer, s in enumerate(scores)
        for b in range(len(s))
        for k in range(s.shape[1])
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 100_000), st.integers(1, 4), st.floats(0, 1))
def test_it_is_the_head_of_all_steps_sorted_by_score_layer_block_step(seed: int, count: int, share: float) -> None:
    scores = layers(seed, count)
    must = sum(int((s == -INF).sum()) for s in scores)
    can = sum(int((s < INF).sum()) for s in scores)
    k = must + round(share * (can - must))
    expected = [[0] * len(s) for s in scores]
    for _, layer, block, step in sorted_steps(scores)[:k]:
        assert expected[layer][block] == step  # what leaves is always a prefix of the block's order
        expected[layer][block] += 1
    counts = allocate(scores, k)
    assert [c.tolist() for c in counts] == expected
    assert all(c.dtype == torch.int64 for c in counts)
    assert sum(int(c.sum()) for c in counts) == k


@pytest.mark.parametrize("k", range(13))
def test_every_count_of_equal_scores_is_exact(k: int) -> None:
    counts = allocate([torch.ones(2, 3), torch.ones(3, 2)], k)
    flat = torch.cat(counts).tolist()
    full = [3, 3, 2, 2, 2]
    assert sum(flat) == k
    assert flat == [max(0, min(size, k - sum(full[:i]))) for i, size in enumerate(full)]


def test_bounds_are_errors_that_name_both_numbers() -> None:
    scores = [torch.tensor([[-INF, -INF, 1.0, INF]])]
    with pytest.raises(
        ValueError, match=r"1 weights .* in head\.weight, but 2 already are .* ask for a higher sparsity"
    ):
        allocate(scores, 1, ["head.weight"])
    with pytest.raises(ValueError, match=r"4 weights .* only 3 can be"):
        allocate(scores, 4)
    assert allocate(scores, 2)[0].tolist() == [2]
    assert allocate(scores, 3)[0].tolist() == [3]


def test_zero_and_nothing() -> None:
    assert allocate([torch.rand(2, 3).sort(dim=1).values], 0)[0].tolist() == [0, 0]


def test_marginal_score_is_a_running_maximum() -> None:
    losses = torch.tensor([[-INF, 3.0, 1.0, 5.0, 4.0, INF]])
    assert step_scores(losses).tolist() == [[-INF, 3.0, 3.0, 5.0, 5.0, INF]]


def test_cumulative_score_is_the_sum_so_far() -> None:
    losses = torch.tensor([[-INF, -INF, 3.0, 1.0, 5.0, INF], [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert step_scores(losses, "cumulative").tolist() == [
        [-INF, -INF, 3.0, 4.0, 9.0, INF],
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["marginal", "cumulative"]))
def test_scores_never_fall_along_a_block(seed: int, score: str) -> None:
    g = torch.Generator().manual_seed(seed)
    losses = torch.rand(4, 30, generator=g) ** 8 * 1e6
    s = step_scores(losses, score)  # type: ignore[arg-type]
    assert (s.diff(dim=1) >= 0).all()
    assert s.dtype == losses.dtype


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match=r"score must be one of .*marginal.*got 'mean'"):
        step_scores(torch.ones(1, 1), "mean")  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_marginal_allocation_is_optimal_when_losses_rise_along_each_block(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    losses = torch.rand(3, 4, generator=g, dtype=torch.float64).sort(dim=1).values
    total = torch.cat([torch.zeros(3, 1), losses.cumsum(dim=1)], dim=1)
    for k in range(13):
        counts = allocate([step_scores(losses)], k)[0]
        best = min(
            sum(float(total[b, c]) for b, c in enumerate(split))
            for split in itertools.product(range(5), repeat=3)
            if sum(split) == k
        )
        assert float(total[range(3), counts].sum()) == pytest.approx(best, abs=1e-12)


def test_cumulative_spreads_where_marginal_does_not() -> None:
    # A block of cheap weights beside one of slightly dearer ones: the sum so far holds the cheap block back.
    losses = torch.stack([torch.full((10,), 1.0), torch.full((10,), 1.5)])
    assert allocate([step_scores(losses)], 10)[0].tolist() == [10, 0]
    cumulative = allocate([step_scores(losses, "cumulative")], 10)[0]
    assert cumulative.tolist() == [6, 4]
