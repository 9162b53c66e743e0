from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import eliminate_loop, obs_weights, random_fisher_inverse

import capruner
from capruner.core.numerics import NotPositiveDefiniteError


def random_weight(n: int, B: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 75), st.integers(0, 10_000), st.sampled_from([10.0, 1e3, 1e6]))
def test_elimination_is_the_textbook_loop(n: int, B: int, seed: int, condition: float) -> None:
    w, H = random_weight(n, B, seed), random_fisher_inverse(n, B, seed, condition)
    result = capruner.eliminate(w, H)
    for block in range(n):
        order, losses, _ = eliminate_loop(w[block], H[block])
        assert result.order[block].tolist() == order
        torch.testing.assert_close(
            result.losses[block], torch.tensor(losses, dtype=torch.float64), rtol=1e-6, atol=1e-12
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 10_000), st.floats(0, 1))
def test_compensation_is_the_constrained_minimum(n: int, B: int, seed: int, share: float) -> None:
    w, H = random_weight(n, B, seed), random_fisher_inverse(n, B, seed)
    keep = torch.rand(n, B, generator=torch.Generator().manual_seed(seed)) >= share
    pruned = capruner.compensate(w, H, keep)
    assert (pruned[~keep] == 0).all()
    for block in range(n):
        expected, _ = obs_weights(w[block], H[block], keep[block])
        torch.testing.assert_close(pruned[block], expected, rtol=1e-6, atol=1e-8)


def test_compensation_equals_the_weight_trace_at_every_step() -> None:
    w, H = random_weight(2, 37), random_fisher_inverse(2, 37)
    elimination = capruner.eliminate(w, H)
    for block in range(2):
        _, losses, trace = eliminate_loop(w[block], H[block])
        for step in range(38):
            keep = elimination.keep_mask(torch.tensor([step, step]))
            torch.testing.assert_close(capruner.compensate(w, H, keep)[block], trace[step], rtol=1e-7, atol=1e-9)
            _, loss = obs_weights(w[block], H[block], keep[block])
            assert loss == pytest.approx(sum(losses[:step]), rel=1e-6, abs=1e-12)


def test_float32_finds_the_order_of_float64() -> None:
    w, H = (
        random_weight(32, 192, dtype=torch.float32),
        random_fisher_inverse(32, 192, condition=1e4, dtype=torch.float32),
    )
    single = capruner.eliminate(w, H).order
    double = capruner.eliminate(w.double(), H.double()).order
    assert (single == double).double().mean() > 0.9999


def test_inputs_are_not_modified_and_chunks_do_not_matter() -> None:
    w, H = random_weight(7, 70, dtype=torch.float32), random_fisher_inverse(7, 70, dtype=torch.float32)
    w0, H0 = w.clone(), H.clone()
    whole = capruner.eliminate(w, H)
    pieces = capruner.eliminate(w, H, blocks_in_parallel=2)
    assert torch.equal(whole.order, pieces.order)
    assert torch.equal(whole.losses, pieces.losses)
    keep = whole.keep_mask(torch.full((7,), 35))
    assert torch.equal(capruner.compensate(w, H, keep), capruner.compensate(w, H, keep, blocks_in_parallel=3))
    assert torch.equal(w, w0)
    assert torch.equal(H, H0)


@pytest.mark.parametrize("steps", [0, 1, 31, 32, 33, 64, 69, 70, 100])
def test_early_stop_is_a_prefix(steps: int) -> None:
    w, H = random_weight(3, 70), random_fisher_inverse(3, 70)
    whole, early = capruner.eliminate(w, H), capruner.eliminate(w, H, max_steps=steps)
    taken = min(steps, 70)
    assert torch.equal(early.order[:, :taken], whole.order[:, :taken])
    assert torch.equal(early.losses[:, :taken], whole.losses[:, :taken])
    assert (early.losses[:, taken:] == torch.inf).all()
    assert torch.equal(early.order.sort(dim=1).values, torch.arange(70).repeat(3, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000))
def test_dead_leave_first_and_frozen_never(B: int, seed: int) -> None:
    w, H = random_weight(3, B, seed), random_fisher_inverse(3, B, seed)
    draw = torch.rand(3, B, generator=torch.Generator().manual_seed(seed))
    dead, frozen = draw < 0.3, draw > 0.7
    result = capruner.eliminate(w, H, dead=dead, frozen=frozen)
    assert torch.equal(result.order.sort(dim=1).values, torch.arange(B).repeat(3, 1))
    assert torch.equal((result.losses == -torch.inf).sum(dim=1), dead.sum(dim=1))
    assert torch.equal((result.losses == torch.inf).sum(dim=1), frozen.sum(dim=1))
    assert torch.equal(~result.keep_mask(dead.sum(dim=1)), dead)
    assert torch.equal(result.keep_mask((~frozen).sum(dim=1)), frozen)
    # After the dead are gone the rest is the textbook on the inverse Fisher matrix of the living.
    living = ~dead[0] & ~frozen[0]
    if living.any() and not frozen[0].any():
        start, _ = obs_weights(w[0], H[0], ~dead[0])
        H_living = torch.linalg.inv(torch.linalg.inv(H[0])[living][:, living])
        order, losses, _ = eliminate_loop(start[living], H_living)
        positions = living.nonzero()[:, 0]
        assert result.order[0, int(dead[0].sum()) :].tolist() == positions[order].tolist()
        torch.testing.assert_close(
            result.losses[0, int(dead[0].sum()) :], torch.tensor(losses, dtype=torch.float64), rtol=1e-5, atol=1e-10
        )


def test_ties_go_to_the_first_position() -> None:
    w = torch.ones(2, 45, dtype=torch.float64)
    result = capruner.eliminate(w, torch.eye(45, dtype=torch.float64).repeat(2, 1, 1))
    assert torch.equal(result.order, torch.arange(45).repeat(2, 1))


def test_zero_weights_leave_at_no_cost() -> None:
    w = random_weight(1, 20)
    w[0, [3, 9]] = 0
    result = capruner.eliminate(w, torch.eye(20, dtype=torch.float64)[None])
    assert result.order[0, :2].tolist() == [3, 9]
    assert (result.losses[0, :2] == 0).all()


def test_huge_values_neither_overflow_nor_repeat() -> None:
    w = torch.tensor([[1e30, 1.0, 2.0]])
    result = capruner.eliminate(w, torch.eye(3)[None])
    assert result.order.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("weight", "fisher_inv", "message"),
    [
        (torch.zeros(3), torch.eye(3)[None], "expected weight"),
        (torch.zeros(1, 3), torch.eye(4)[None], "expected weight"),
        (torch.zeros(1, 3), torch.eye(3).double()[None], "share a floating dtype"),
        (torch.full((1, 3), torch.nan), torch.eye(3)[None], "NaN"),
    ],
)
def test_bad_tensors(weight: torch.Tensor, fisher_inv: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capruner.eliminate(weight, fisher_inv)
    with pytest.raises(ValueError, match=message):
        capruner.compensate(weight, fisher_inv, torch.ones_like(weight, dtype=torch.bool))


@pytest.mark.promise("Numbers", "An inverse that is not positive definite is an error, never replaced by a guess")
def test_not_positive_definite_is_said_and_never_replaced() -> None:
    for value in (-1, 0, torch.nan, torch.inf):
        bad = torch.eye(3).repeat(3, 1, 1)
        bad[1:, 2, 2] = value
        with pytest.raises(NotPositiveDefiniteError, match=r"in 2 of 3 blocks \(the first is block 1\)"):
            capruner.eliminate(torch.ones(3, 3), bad)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(2, 1, 1)
    with pytest.raises(NotPositiveDefiniteError, match="block 0 will not factor"):
        capruner.compensate(torch.ones(2, 2), indefinite, torch.zeros(2, 2, dtype=torch.bool))


def test_mask_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="keep must be a bool"):
        capruner.compensate(torch.ones(1, 2), torch.eye(2)[None], torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"dead must be a bool tensor of shape \(1, 2\)"):
        capruner.eliminate(torch.ones(1, 2), torch.eye(2)[None], dead=torch.ones(1, 1, dtype=torch.bool))


def test_blocks_in_parallel_must_be_positive() -> None:
    w, H = random_weight(3, 4), random_fisher_inverse(3, 4)
    for count in (0, -1):
        with pytest.raises(ValueError, match="blocks_in_parallel must be at least 1"):
            capruner.eliminate(w, H, blocks_in_parallel=count)
        with pytest.raises(ValueError, match="blocks_in_parallel must be at least 1"):
            capruner.compensate(w, H, torch.ones(3, 4, dtype=torch.bool), blocks_in_parallel=count)


def test_a_block_on_the_edge_of_its_rounding_error_is_lifted_by_just_that() -> None:
    B, eps = 6, torch.finfo(torch.float32).eps
    Q = torch.linalg.qr(torch.randn(B, B, dtype=torch.float64))[0]
    values = torch.linspace(1, 2, B, dtype=torch.float64)
    values[0] = -eps  # what rounding makes of a very small one
    H = ((Q * values) @ Q.T).float()[None]
    assert torch.linalg.cholesky_ex(H.double())[1].any()
    w = torch.randn(1, B)
    keep = torch.tensor([[True, False, True, False, False, True]])
    lifted = H[0].double() + 4 * eps * H[0].diagonal().max().double() * torch.eye(B, dtype=torch.float64)
    gone = ~keep[0]
    moved = lifted[:, gone] @ torch.linalg.solve(lifted[gone][:, gone], w[0, gone].double())
    expected = (w[0].double() - moved).masked_fill(gone, 0).float()
    torch.testing.assert_close(capruner.compensate(w, H, keep)[0], expected)
    good = torch.eye(B)[None] * 2  # its neighbour is not lifted
    both = capruner.compensate(w.repeat(2, 1), torch.cat([good, H]), keep.repeat(2, 1))
    assert torch.equal(both[0], w[0].masked_fill(gone, 0))


@pytest.mark.promise(
    "Numbers", "An inverse that rounding has made indefinite gets its rounding error added, with a warning"
)
def test_an_inverse_that_rounding_has_made_indefinite_is_lifted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    H = torch.eye(4)[None].repeat(2, 1, 1)
    H[1, 2:, 2:] = torch.tensor([[1.0, 1.0001], [1.0001, 1.0]])  # its smallest eigenvalue is −1e-4
    keep = torch.tensor([[True, True, False, False]] * 2)
    weight = capruner.compensate(torch.ones(2, 4), H, keep)
    assert torch.equal(weight, torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2))
    assert "1 inverse Fisher blocks were not positive definite" in caplog.text
    H[1, 2:, 2:] = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(NotPositiveDefiniteError, match="inverse Fisher block 1 will not factor"):
        capruner.compensate(torch.ones(2, 4), H, keep)
