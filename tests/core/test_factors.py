from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capruner.core import factors
from capruner.core.factors import cholesky, inverse
from capruner.core.kernels import inverses_kernel_for

numba = pytest.mark.skipif(inverses_kernel_for(torch.device("cpu")) is None, reason="numba is not installed")


def positive(n: int, B: int) -> Tensor:
    G = torch.randn(n, 2 * B + 1, B, generator=torch.Generator().manual_seed(B), dtype=torch.float64)
    return G.mT @ G / (2 * B + 1) + 0.01 * torch.eye(B, dtype=torch.float64)


@numba
@pytest.mark.parametrize("B", [1, 2, 3, 4, 5, 11, 12, 13, 50, 64, 97])
def test_factors_and_inverses_are_those_of_torch(B: int) -> None:
    A = positive(3, B)
    before = A.clone()
    L, info = cholesky(A)
    assert not info.any()
    assert torch.equal(A, before)
    torch.testing.assert_close(L, torch.linalg.cholesky(A), rtol=1e-11, atol=1e-12)
    H = inverse(L, torch.empty_like(A))
    torch.testing.assert_close(H, torch.linalg.inv(A), rtol=1e-9, atol=1e-10)
    assert torch.equal(H, H.mT)
    single = inverse(L, torch.empty(A.shape))
    assert torch.equal(single, H.float())


@numba
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_matrix_without_a_factor_is_told_and_leaves_the_others_alone(value: float) -> None:
    A = positive(3, 30)
    whole, _ = cholesky(A)
    A[1, 17, 17] = value
    L, info = cholesky(A)
    assert info.tolist() == [0, 18, 0]
    assert torch.equal(L[[0, 2]], whole[[0, 2]])


def test_torch_does_the_same_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "inverses_kernel_for", lambda device: None)
    A = positive(3, 20)
    L, info = cholesky(A)
    assert not info.any()
    torch.testing.assert_close(inverse(L, torch.empty_like(A)), torch.linalg.inv(A), rtol=1e-9, atol=1e-10)
