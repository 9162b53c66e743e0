"""``core/refit.py`` against the best weights of every block by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capruner.core import refit as module
from capruner.core.refit import refit


def problem(size: int, blocks: int, share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fisher matrix, dense weights and what is gone ``(size, blocks)``, scales."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(2 * size, size, dtype=torch.float64, generator=generator)
    G += torch.randn(2 * size, 1, dtype=torch.float64, generator=generator)
    F = G.T @ G / len(G) + 0.01 * torch.eye(size, dtype=torch.float64)
    dense = torch.randn(size, blocks, dtype=torch.float64, generator=generator)
    gone = torch.rand(size, blocks, generator=generator) < share
    return F, dense, gone, torch.rand(blocks, dtype=torch.float64, generator=generator) + 0.1


def best(F: Tensor, dense: Tensor, gone: Tensor) -> Tensor:
    """Block by block: ``F_KK w_K = F_KK d_K + F_KG d_G`` for those that are kept."""
    W = torch.zeros_like(dense)
    for block in range(dense.shape[1]):
        K = ~gone[:, block]
        W[K, block] = torch.linalg.solve(F[K][:, K], F[K] @ dense[:, block])
    return W


def quadratic(F: Tensor, dense: Tensor, W: Tensor, scales: Tensor) -> float:
    change = W - dense
    return float((scales * (change * (F @ change)).sum(dim=0)).sum()) / 2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_it_comes_close_to_the_best_weights_of_each_block(size: int, blocks: int, share: float, seed: int) -> None:
    F, dense, gone, scales = problem(size, blocks, share, seed)
    W, loss = refit(dense, dense, gone, lambda x: F @ x, F.diagonal()[:, None], scales)
    assert not W[gone].any()
    assert loss == pytest.approx(quadratic(F, dense, W, scales), rel=1e-9, abs=1e-12)
    least = quadratic(F, dense, best(F, dense, gone), scales)
    assert least * (1 - 1e-9) - 1e-12 <= loss <= 1.1 * least + 1e-12


def test_with_more_iterations_it_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATIONS", 100)
    F, dense, gone, scales = problem(16, 7, 0.6, 0)
    W, _ = refit(dense, dense, gone, lambda x: F @ x, F.diagonal()[:, None], scales)
    torch.testing.assert_close(W, best(F, dense, gone), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_and_everything_gone(share: float) -> None:
    F, dense, gone, scales = problem(8, 3, share, 1)
    W, loss = refit(dense, dense, gone, lambda x: F @ x, F.diagonal()[:, None], scales)
    assert torch.equal(W, dense * (1 - share))
    assert loss == pytest.approx(share * quadratic(F, dense, torch.zeros_like(dense), scales))


def test_a_start_that_is_the_answer_stays() -> None:
    F, dense, gone, scales = problem(16, 7, 0.6, 2)
    answer = best(F, dense, gone)
    W, loss = refit(dense, answer, gone, lambda x: F @ x, F.diagonal()[:, None], scales)
    torch.testing.assert_close(W, answer, rtol=1e-8, atol=1e-8)
    assert loss == pytest.approx(quadratic(F, dense, answer, scales))
