"""Shrunk Fisher blocks against a float64 textbook version, and what they are good for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import capruner
from capruner.core.blocks import BlockLayout
from capruner.core.fisher import BlockFisher
from capruner.core.shrinkage import phases, shrink


def gradients(m: int, n: int, B: int, seed: int = 0) -> Tensor:
    """``(m, n, B)`` float64, the blocks alike up to a scale: neurons that see the same inputs."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(B, B, generator=g, dtype=torch.float64)
    scale = torch.logspace(-1, 1, n, dtype=torch.float64)[:, None]
    return torch.randn(m, n, B, generator=g, dtype=torch.float64) @ mixing * scale


def textbook(G: Tensor, common: Tensor, share: float | None) -> tuple[Tensor, float]:
    """One block, ``(m, B)`` gradients, by loops over the definition."""
    m = len(G)
    outer = [g[:, None] * g[None, :] for g in G]
    F = sum(outer, torch.zeros_like(common)) / m
    target = common * F.trace() / common.trace()
    if share is None:
        variance = sum(float(((o - F) ** 2).sum()) for o in outer) / m / (m - 1)
        share = 0.5 * min(1.0, variance / float(((F - target) ** 2).sum()))
    return (1 - share) * F + share * target, share


def inverse(G: Tensor, damp: float, share: float | None, repeat: int = 1) -> tuple[Tensor, Tensor]:
    m, n, B = G.shape
    fisher = BlockFisher(n, B, m, damp, relative_damp=True, shrinkage=share, dtype=torch.float64)
    for slab in G.split(5):
        fisher.add(slab)
    phase_of = torch.arange(n) % repeat
    fisher.set_common(fisher.sums(phase_of, repeat, n), phase_of)
    H = fisher.inverse()
    return H / fisher.units[:, None, None], fisher.shares


@pytest.mark.parametrize("share", [None, 0.3, 1.0])
@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-15])
def test_against_the_definition(share: float | None, repeat: int, scale: float) -> None:
    G = gradients(12, 6, 8) * scale
    H, shares = inverse(G, 1e-2, share, repeat)
    for b in range(6):
        alike = [G[:, other].T @ G[:, other] for other in range(b % repeat, 6, repeat)]
        F, expected = textbook(G[:, b], sum(alike, torch.zeros_like(alike[0])), share)
        F += 1e-2 * F.diagonal().mean() * torch.eye(8, dtype=torch.float64)
        assert float(shares[b]) == pytest.approx(expected, rel=1e-6)
        assert torch.allclose(H[b] @ F, torch.eye(8, dtype=torch.float64), atol=1e-6)


def test_the_share_falls_with_the_number_of_gradients_and_the_estimate_is_better() -> None:
    B, n, phase = 8, 40, torch.zeros(40, dtype=torch.int64)
    mixing = torch.randn(B, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = mixing.T @ mixing
    # What the blocks are shrunk towards has a fault, so that its share has to vanish.
    common = (truth + 0.3 * truth.diagonal().mean() * torch.ones(B, B, dtype=torch.float64))[None]
    shares = []
    for m in (8, 128, 2048):
        G = torch.randn(m, n, B, generator=torch.Generator().manual_seed(m), dtype=torch.float64) @ mixing
        raw = torch.einsum("mni,mnj->nij", G, G) / m
        shrunk, trace = raw.clone(), raw.diagonal(dim1=1, dim2=2).sum(dim=1)
        fourth = (G.square().sum(dim=2) ** 2).mean(dim=0)
        shares.append(float(shrink(shrunk, common, phase, None, None, fourth, trace, m).mean()))
        ratio = float((shrunk - truth).square().sum() / (raw - truth).square().sum())
        assert ratio < (0.6 if m == 8 else 1.05)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.05 < 0.25 < shares[0]


def test_weights_that_are_gone_take_no_part() -> None:
    G = gradients(10, 3, 6)
    F = torch.einsum("mni,mnj->nij", G, G) / 10
    gone = torch.zeros(3, 6, dtype=torch.bool)
    gone[:, 4:] = True
    F.masked_fill_(gone[:, :, None] | gone[:, None, :], 0)
    trace = F.diagonal(dim1=1, dim2=2).sum(dim=1)
    fourth, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    shrink(F, torch.eye(6, dtype=torch.float64)[None], zero, gone, 0.5, fourth, trace * 2, 10)
    assert not F[:, 4:].any()
    assert not F[:, :, 4:].any()
    assert torch.allclose(F.diagonal(dim1=1, dim2=2).sum(dim=1), trace)


def test_a_block_without_gradients_stays_zero_and_one_gradient_says_nothing_of_its_block_alone() -> None:
    G = gradients(1, 3, 4)
    G[:, 1] = 0
    F = torch.einsum("mni,mnj->nij", G, G)
    trace = F.diagonal(dim1=1, dim2=2).sum(dim=1)
    zero = torch.zeros(3, dtype=torch.int64)
    shares = shrink(F, torch.eye(4, dtype=torch.float64)[None], zero, None, None, trace**2, trace, 1)
    assert shares.tolist() == [0.5, 0, 0.5]
    assert not F[1].any()


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [((10, 96), 96, 1), ((10, 96), 32, 3), ((10, 96), 64, 1), ((10, 8), 32, 1), ((4, 16, 3, 3), 48, 3)],
)
def test_phases(shape: tuple[int, ...], size: int, expected: int) -> None:
    assert phases(BlockLayout.of(shape, size)) == expected


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 30))
    return model, [(torch.randn(4, 24), torch.randint(30, (4,))) for _ in range(12)]


def test_on_by_default_off_where_damping_is_given_and_reported() -> None:
    model, data = small()
    arguments = {"sparsity": 0.8, "num_grads": 12, "progress": False}
    shares = capruner.prune(model, data, **arguments).settings["shrinkage_by_layer"]
    assert set(shares) == {"0.weight", "2.weight"}
    assert all(0 < share <= 1 for share in shares.values())
    for plain in ({"damp": 1e-3}, {"method": "obs"}, {"shrinkage": 0.0}):
        assert capruner.prune(model, data, **arguments, **plain).settings["shrinkage_by_layer"] == {}
    given = capruner.prune(model, data, **arguments, damp=1e-3, shrinkage=0.25).settings
    assert given["shrinkage_by_layer"] == {"0.weight": 0.25, "2.weight": 0.25}


def test_masks_from_elsewhere_get_weights_from_shrunk_blocks() -> None:
    model, data = small()
    masks = {"0.weight": torch.rand(60, 24) > 0.5}
    one, other = (
        capruner.compensate_masks(model, data, nn.functional.cross_entropy, masks, num_grads=12, progress=False, **more)
        for more in ({}, {"shrinkage": 0.0})
    )
    assert one.settings["shrinkage_by_layer"]["0.weight"] > 0
    assert not torch.equal(one.level().weights["0.weight"], other.level().weights["0.weight"])


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "much", float("nan")])
def test_shares_that_are_refused(share: object) -> None:
    model, data = small()
    with pytest.raises(ValueError, match="shrinkage must be a number from 0 to 1"):
        capruner.prune(model, data, num_grads=12, shrinkage=share, progress=False)  # type: ignore[arg-type]


def test_where_it_is_not_supported() -> None:
    model, data = small()
    with pytest.raises(ValueError, match="shrinkage is for the Fisher blocks of method cap or obs"):
        capruner.prune(model, None, method="magnitude", shrinkage=0.5)
    with pytest.raises(ValueError, match="use solver='accumulate'"):
        capruner.prune(model, data, num_grads=12, damp=1e-3, shrinkage=0.5, solver="woodbury", progress=False)
