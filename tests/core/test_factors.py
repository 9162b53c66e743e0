from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from capruner.core import factors
from capruner.core.factors import cholesky, invert
from capruner.core.kernels import matrices_kernel_for

numba = pytest.mark.skipif(matrices_kernel_for(torch.device("cpu")) is None, reason="numba is not installed")


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
    H, single = torch.empty_like(A), torch.empty(A.shape)
    assert not invert(A, H).any()
    assert not invert(A, single).any()
    assert torch.equal(A, before)
    torch.testing.assert_close(H, torch.linalg.inv(A), rtol=1e-9, atol=1e-10)
    assert torch.equal(H, H.mT)
    assert torch.equal(single, H.float())


@numba
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_matrix_without_a_factor_is_told_and_leaves_the_others_alone(value: float) -> None:
    A, H, one = positive(3, 30), *torch.empty(2, 3, 30, 30, dtype=torch.float64)
    whole, _ = cholesky(A)
    invert(A, H)
    A[1, 17, 17] = value
    L, info = cholesky(A)
    assert info.tolist() == [0, 18, 0]
    assert torch.equal(L[[0, 2]], whole[[0, 2]])
    assert invert(A, one).tolist() == [0, 18, 0]
    assert torch.equal(one[[0, 2]], H[[0, 2]])


def test_torch_does_the_same_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "matrices_kernel_for", lambda device: None)
    A = positive(3, 20)
    H = torch.empty_like(A)
    assert not invert(A, H).any()
    torch.testing.assert_close(H, torch.linalg.inv(A), rtol=1e-9, atol=1e-10)
    whole = H.clone()
    A[1] = 0
    assert invert(A, H).tolist() == [0, 1, 0]
    assert torch.equal(H[[0, 2]], whole[[0, 2]])


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=numba), False])
def test_factors_in_another_order(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(factors, "matrices_kernel_for", lambda device: None)
    H = positive(2, 37).float()
    order = torch.stack([torch.randperm(37), torch.arange(37)])
    expected = torch.stack([A[p][:, p] for A, p in zip(H.double(), order)])
    assert torch.equal(factors.permuted(H, order), expected)
    for same in (H, H.mT):
        L, info = cholesky(same, order)
        assert not info.any()
        torch.testing.assert_close(L, torch.linalg.cholesky(expected), rtol=1e-11, atol=1e-12)


MADE_BY_TILES = """
import sys, torch
from capruner.core.factors import cholesky, invert
from capruner.core.kernels import matrices
from capruner.core.products import HalfSums

made = [torch.tensor(matrices.ROWS)]
for dtype in (torch.float32, torch.float64):
    sums = HalfSums(torch.zeros(3, 97, 97, dtype=dtype), norms=True)
    sums.add(torch.randn(150, 3, 97, generator=torch.Generator().manual_seed(0), dtype=dtype), None)
    sums.settle(None)
    F = sums.doubled(slice(0, 3))
    H = torch.empty(F.shape, dtype=dtype)
    invert(F, H)
    made += [F, cholesky(F.to(dtype))[0], H]
torch.save(made, sys.argv[1])
"""


@numba
def test_bit_identical_with_the_tiles_of_older_processors(tmp_path: Path) -> None:
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}
    made = []
    for name, environment in (("wide", {}), ("narrow", older)):
        file = tmp_path / name
        subprocess.run([sys.executable, "-c", MADE_BY_TILES, file], check=True, env=os.environ | environment)
        made.append(torch.load(file))
    if made[0][0] == made[1][0]:
        pytest.skip("this processor has no AVX-512")
    for wide, narrow in zip(made[0][1:], made[1][1:], strict=True):
        assert torch.equal(wide, narrow)
