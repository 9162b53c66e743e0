from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import fisher_inverse_rank_one

from capruner.core.fisher import BlockFisher
from capruner.core.numerics import NotPositiveDefiniteError
from capruner.core.scaling import NO_GRADIENT


def gradients(m: int, n: int, B: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(m, n, B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(H: torch.Tensor, reference: torch.Tensor) -> float:
    return float((H.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("solver", ["woodbury", "accumulate"])
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 40), n=st.integers(1, 3), B=st.integers(1, 20), slab=st.integers(1, 17), seed=st.integers(0, 1000)
)
def test_inverse_is_rank_one_updates(solver: str, m: int, n: int, B: int, slab: int, seed: int) -> None:
    G = gradients(m, n, B, seed)
    fisher = BlockFisher(n, B, m, 1e-3, solver=solver, dtype=torch.float64)
    for start in range(0, m, slab):
        fisher.add(G[start : start + slab])
    H = fisher.inverse()
    for block in range(n):
        assert relative_error(H[block], fisher_inverse_rank_one(G[:, block], 1e-3)) < 1e-8
    torch.testing.assert_close(H, H.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "m"), [("accumulate", 512), ("woodbury", 512), ("woodbury", 32), ("auto", 32), ("auto", 512)]
)
def test_float32_at_damp_1e_8(solver: str, m: int) -> None:
    G = gradients(m, 2, 64, scale=1e-2)
    fisher = BlockFisher(2, 64, m, 1e-8, solver=solver)
    for slab in G.float().split(16):
        fisher.add(slab)
    H = fisher.inverse()
    for block in range(2):
        assert relative_error(H[block], fisher_inverse_rank_one(G[:, block], 1e-8)) < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
@pytest.mark.parametrize("solver", ["woodbury", "accumulate"])
def test_dead_weights_are_cut_off(solver: str, dtype: torch.dtype, tolerance: float) -> None:
    G = gradients(30, 2, 12)
    dead = torch.zeros(2, 12, dtype=torch.bool)
    dead[0, [1, 5]] = dead[1, 11] = True
    fisher = BlockFisher(2, 12, 30, 1e-2, solver=solver, dead=dead, dtype=dtype)
    fisher.add(G)
    H = fisher.inverse().double()
    for block in range(2):
        gone = dead[block]
        expected = fisher_inverse_rank_one(G[:, block] * ~gone, 1e-2)
        torch.testing.assert_close(H[block][~gone][:, ~gone], expected[~gone][:, ~gone], rtol=tolerance, atol=tolerance)
        assert (H[block][gone][:, ~gone] == 0).all()
        assert torch.equal(H[block][gone][:, gone], torch.eye(int(gone.sum()), dtype=torch.float64))


@pytest.mark.parametrize("damp", [1e-6, 1e-8, 1e-10])
def test_dead_weights_at_damping_that_is_tiny_beside_the_gradients(damp: float) -> None:
    G = gradients(60, 2, 64)
    dead = torch.rand(2, 64) < torch.tensor([[0.8], [0.02]])  # fewer weights than gradients, and more
    fisher = BlockFisher(2, 64, 60, damp, solver="woodbury", dead=dead)
    for slab in G.float().split(7):
        fisher.add(slab)
    H = fisher.inverse()
    for block in range(2):
        gone = dead[block]
        expected = fisher_inverse_rank_one(G[:, block][:, ~gone], damp)
        assert relative_error(H[block][~gone][:, ~gone], expected) < 1e-6
        assert torch.equal(H[block][gone], torch.eye(64)[gone])


def test_relative_damp_scales_with_the_gradients() -> None:
    G = gradients(40, 3, 8)
    inverses = []
    for scale in (1.0, 1e-3):
        fisher = BlockFisher(3, 8, 40, 1e-2, relative_damp=True, dtype=torch.float64)
        fisher.add(G * scale)
        inverses.append(fisher.inverse() * scale**2)
    torch.testing.assert_close(*inverses, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gone", [[], [0, 5, 6]])
def test_relative_damp_is_a_share_of_the_mean_diagonal_of_the_living(gone: list[int]) -> None:
    G = gradients(40, 3, 8) * torch.logspace(0, 1, 8, dtype=torch.float64)
    dead = torch.zeros(3, 8, dtype=torch.bool)
    dead[1, gone] = True
    fisher = BlockFisher(3, 8, 40, 0.1, relative_damp=True, dead=dead if gone else None, dtype=torch.float64)
    fisher.add(G)
    H = fisher.inverse()
    for block in range(3):
        alive = ~dead[block]
        F = G[:, block, alive].T @ G[:, block, alive] / 40
        expected = torch.linalg.inv(F + 0.1 * F.diagonal().mean() * torch.eye(len(F), dtype=torch.float64))
        torch.testing.assert_close(H[block][alive][:, alive], expected)


def true_inverse(G: torch.Tensor, damp: float, relative: bool) -> torch.Tensor:
    F = G.mT @ G / G.shape[1]
    size = F.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] if relative else 1.0
    return torch.linalg.inv(F + damp * size * torch.eye(F.shape[1], dtype=F.dtype))


@pytest.mark.parametrize("scale", [1e-36, 1e-28, 1e-19, 1e-10, 1.0, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("triangular", [False, True])
def test_gradients_of_any_size(scale: float, triangular: bool) -> None:
    G = gradients(64, 3, 8)
    fisher = BlockFisher(3, 8, 64, 1e-2, relative_damp=True, triangular=triangular)
    for slab in (G * scale).float().split(10):
        fisher.add(slab)
    H = fisher.inverse()
    assert torch.isfinite(H).all()
    expected = true_inverse(G.transpose(0, 1), 1e-2, relative=True) / scale**2
    torch.testing.assert_close(H.double() / fisher.units[:, None, None], expected, rtol=1e-4, atol=1e-6 / scale**2)


@pytest.mark.parametrize("solver", ["woodbury", "accumulate"])
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-6, 1.0])
@pytest.mark.parametrize("damp", [1e-4, 1.0])
def test_absolute_damping_and_gradients_of_any_size(solver: str, scale: float, damp: float) -> None:
    """``damp`` times the square of the scale: the same matrices but for a factor."""
    G, damp = gradients(64, 3, 8), damp * scale**2 if scale > 1e-20 else 1e-40
    fisher = BlockFisher(3, 8, 64, damp, solver=solver)
    for slab in (G * scale).float().split(10):
        fisher.add(slab)
    H = fisher.inverse().double() / fisher.units[:, None, None]
    expected = true_inverse(G.transpose(0, 1) * scale, damp, relative=False)
    assert relative_error(H, expected) < 1e-3


@pytest.mark.parametrize("first", [1e-30, 1e-14, 1.0, 1e12])
def test_gradients_that_grow_and_shrink_by_weight(first: float) -> None:
    G = gradients(64, 2, 8) * torch.logspace(-24, 3, 8, dtype=torch.float64)
    G[:20] *= first
    G = G.float().double()
    dead = torch.zeros(2, 8, dtype=torch.bool)
    dead[:, 5:] = True  # what is left has gradients that are tiny beside those of the dead
    fisher, again = (BlockFisher(2, 8, 64, 1e-2, relative_damp=True, dead=dead) for _ in range(2))
    fisher.add(G[:20])
    again.load(fisher.tensors())
    for one in (fisher, again):
        one.add(G[20:])
    H = fisher.inverse().double() / fisher.units[:, None, None]
    assert relative_error(H[:, :5, :5], true_inverse(G.transpose(0, 1)[:, :, :5], 1e-2, relative=True)) < 1e-3
    assert torch.equal(H, again.inverse().double() / again.units[:, None, None])


def test_an_inverse_without_the_matrix_whose_damping_is_too_small() -> None:
    fisher = BlockFisher(1, 8, 4, 1e-12, solver="woodbury")
    fisher.add(torch.ones(4, 1, 8) * 1e10)
    with pytest.raises(NotPositiveDefiniteError, match=r"damp=1e-12 is too small beside squared gradients of up to"):
        fisher.inverse()


def test_the_solver_is_chosen_by_the_number_of_gradients() -> None:
    assert [BlockFisher(1, 8, m, 1e-2).solver for m in (7, 8)] == ["woodbury", "accumulate"]
    assert [BlockFisher(1, 8, m, 1e-2, solver="woodbury").solver for m in (7, 8)] == ["woodbury", "accumulate"]
    assert BlockFisher(1, 8, 7, 1e-2, relative_damp=True).solver == "accumulate"
    assert BlockFisher(1, 8, 7, 1e-2, triangular=True).solver == "accumulate"


@pytest.mark.parametrize("solver", ["woodbury", "accumulate"])
def test_what_was_added_goes_on_elsewhere_to_the_same_bits(solver: str) -> None:
    G = gradients(20, 2, 6).float()
    one, other, fresh = (BlockFisher(2, 6, 20, 1e-2, solver=solver) for _ in range(3))
    other.load(fresh.tensors())  # nothing yet
    for fisher in (one, other):
        fisher.add(G[:12])
    going_on = BlockFisher(2, 6, 20, 1e-2, solver=solver)
    going_on.load(other.tensors())
    for fisher in (one, going_on):
        fisher.add(G[12:])
    assert torch.equal(one.inverse(), going_on.inverse())
    with pytest.raises(ValueError, match="nothing to save"):
        one.tensors()


def test_relative_damp_of_a_block_without_gradients() -> None:
    fisher = BlockFisher(1, 4, 2, 1e-2, relative_damp=True)
    fisher.add(torch.zeros(2, 1, 4))
    assert torch.equal(fisher.inverse()[0], torch.eye(4))
    assert fisher.units.tolist() == [NO_GRADIENT]


def test_tf32_of_the_caller_changes_nothing() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        fisher = BlockFisher(1, 4, 1, 1e-2)
        fisher.add(torch.ones(1, 1, 4))
        fisher.inverse()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damp": 0.0}, "damp must be"),
        ({"damp": float("nan")}, "damp must be"),
        ({"num_grads": 0}, "num_grads must be"),
        ({"solver": "magic"}, "solver must be"),
        ({"solver": "woodbury", "relative_damp": True}, "relative_damp needs"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockFisher(**({"num_blocks": 1, "block_size": 2, "num_grads": 3, "damp": 1e-3} | arguments))


def test_wrong_number_of_gradients() -> None:
    fisher = BlockFisher(1, 2, 3, 1e-3)
    fisher.add(torch.ones(2, 1, 2))
    with pytest.raises(ValueError, match="2 gradients were added, num_grads says 3"):
        fisher.inverse()
    with pytest.raises(ValueError, match="more gradients"):
        fisher.add(torch.ones(2, 1, 2))


@pytest.mark.parametrize(("blocks", "count"), [((1, 2, 2), 4), ((1, 2, 2), -1), ((2, 2, 2), 3), ((1, 3, 3), 3)])
def test_what_is_of_another_matrix_is_not_loaded(blocks: tuple[int, ...], count: int) -> None:
    fisher = BlockFisher(1, 2, 3, 1e-3)
    with pytest.raises(ValueError, match="are not of this Fisher matrix"):
        fisher.load({"blocks": torch.ones(blocks), "peak": torch.ones(blocks[:2]), "count": torch.tensor(count)})
    with pytest.raises(ValueError, match="are not of this Fisher matrix"):
        fisher.load({"blocks": torch.eye(2)[None], "peak": torch.ones(2, 2), "count": torch.tensor(3)})
    fisher.load({"blocks": 3 * torch.eye(2)[None], "peak": torch.ones(1, 2), "count": torch.tensor(3)})
    torch.testing.assert_close(fisher.inverse(), torch.eye(2)[None] / 1.001)


def test_used_up() -> None:
    fisher = BlockFisher(1, 2, 1, 1e-3)
    fisher.add(torch.ones(1, 1, 2))
    fisher.inverse()
    with pytest.raises(ValueError, match="taken before"):
        fisher.inverse()
    with pytest.raises(ValueError, match="inverted already"):
        fisher.add(torch.ones(1, 1, 2))


def test_a_block_that_will_not_factor_says_which_and_what_damping_to_try() -> None:
    fisher = BlockFisher(2, 3, 4, 1e-30, solver="accumulate")
    G = torch.zeros(4, 2, 3)
    G[:, 0] = torch.eye(4)[:, :3] * 5
    G[:, 1] = 7  # rank one: singular without damping
    fisher.add(G)
    with pytest.raises(NotPositiveDefiniteError, match=r"block 1 \(1 in all\).*try damp="):
        fisher.inverse()


@pytest.mark.parametrize("B", [1, 3, 16, 37])
def test_the_upper_triangle_is_enough(B: int) -> None:
    G = torch.randn(40, 2, B)
    whole, half = (BlockFisher(2, B, 40, 1e-2, solver="accumulate", triangular=t) for t in (False, True))
    for slab in G.split(8):
        whole.add(slab)
        half.add(slab)
    torch.testing.assert_close(half.inverse(), whole.inverse(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="triangular means accumulating"):
        BlockFisher(2, B, 40, 1e-2, solver="woodbury", triangular=True)
