from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capruner.core.fisher import BlockFisher
from capruner.core.kernels import matrices_kernel_for
from capruner.core.products import FullSums, HalfSums, sums_for

numba = pytest.mark.skipif(matrices_kernel_for(torch.device("cpu")) is None, reason="numba is not installed")


def gradients(m: int, n: int, B: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n, B, generator=torch.Generator().manual_seed(B), dtype=torch.float64).to(dtype)


def half(n: int, B: int, dtype: torch.dtype = torch.float32) -> HalfSums:
    return HalfSums(torch.zeros(n, B, B, dtype=dtype), norms=True)


def results(sums: FullSums) -> tuple[Tensor, Tensor]:
    sums.settle(None)
    return sums.doubled(slice(0, len(sums.blocks))), sums.fourth


@numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("B", [16, 23, 24, 50, 97])
def test_triangles_are_the_sums_of_outer_products(B: int, dtype: torch.dtype) -> None:
    G = gradients(75, 3, B, dtype)
    sums = half(3, B, dtype)
    for slab in G.split(8):
        sums.add(slab, None)
    F, fourth = results(sums)
    G = G.double()
    exact = torch.einsum("kni,knj->nij", G, G)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(F, exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fourth, (G**2).sum(dim=2).square().sum(dim=0))
    assert torch.equal(F, F.mT)


@numba
def test_bit_identical_however_the_gradients_are_cut_and_on_any_number_of_threads() -> None:
    G, outcomes = gradients(100, 70, 40), []
    for slab, threads in ((1, 1), (7, 1), (100, 1), (7, 2)):
        torch.set_num_threads(threads)
        try:
            sums = half(70, 40)
            for rows in G.split(slab):
                sums.add(rows, None)
            outcomes.append(results(sums))
        finally:
            torch.set_num_threads(1)
    for F, fourth in outcomes[1:]:
        assert torch.equal(F, outcomes[0][0])
        assert torch.equal(fourth, outcomes[0][1])


@numba
def test_resumed_while_gradients_are_waiting() -> None:
    G = gradients(60, 2, 32)
    whole, first, second = (half(2, 32) for _ in range(3))
    whole.add(G, None)
    first.add(G[:25], None)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()})
    second.add(G[25:], None)
    for one, other in zip(results(whole), results(second), strict=True):
        assert torch.equal(one, other)


@numba
def test_sums_of_another_kind_are_not_loaded() -> None:
    full = FullSums(torch.zeros(1, 16, 16), norms=True)
    with pytest.raises(ValueError, match="install or remove numba"):
        full.load(half(1, 16).tensors())
    with pytest.raises(ValueError, match="install or remove numba"):
        half(1, 16).load(full.tensors())


@numba
@pytest.mark.parametrize("first", [1e-30, 1e12])
def test_scales_that_change_while_gradients_are_waiting(first: float) -> None:
    G = gradients(60, 2, 32)
    G[:9] *= first
    fisher = BlockFisher(2, 32, 60, 1e-2, relative_damp=True, shrinkage=0.0)
    for slab in G.split(9):
        fisher.add(slab)
    H = fisher.inverse().double() / fisher.units[:, None, None]
    F = torch.einsum("kni,knj->nij", G.double(), G.double()) / 60
    damp = 1e-2 * F.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] * torch.eye(32, dtype=torch.float64)
    torch.testing.assert_close(H @ (F + damp), torch.eye(32, dtype=torch.float64).repeat(2, 1, 1), rtol=0, atol=1e-2)


def test_torch_adds_whole_matrices_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capruner.core.products.matrices_kernel_for", lambda device: None)
    sums = sums_for(torch.zeros(2, 20, 20), triangular=False, norms=True)
    assert type(sums) is FullSums
    G = gradients(30, 2, 20)
    sums.add(G, None)
    F, fourth = results(sums)
    torch.testing.assert_close(F, torch.einsum("kni,knj->nij", G.double(), G.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fourth, (G.double() ** 2).sum(dim=2).square().sum(dim=0))
