"""Fisher blocks that will not factor: more damping for those alone, counted, and past a share an error."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from untouched import same, snapshot

import capruner
from capruner.core.fisher import RUNGS, BlockFisher
from capruner.core.numerics import NotPositiveDefiniteError

B = 8


def matrices(bad: int, blocks: int = 40) -> Tensor:
    """Well conditioned blocks, of which some are indefinite by 3e-5: what rounding leaves of large gradients."""
    Q = torch.linalg.qr(torch.randn(blocks, B, B, dtype=torch.float64))[0]
    values = torch.linspace(0.5, 2, B, dtype=torch.float64).repeat(blocks, 1)
    values[:bad, 0] = -3e-5
    return (Q * values[:, None]) @ Q.mT


def inverse(blocks: Tensor, damp: float, rungs: int, dead: Tensor | None = None) -> tuple[Tensor, int]:
    fisher = BlockFisher(len(blocks), blocks.shape[1], 1, damp, solver="accumulate", dead=dead, dtype=torch.float64)
    fisher.load({"blocks": blocks, "peak": torch.ones(blocks.shape[:2]), "count": torch.tensor(1)})
    return fisher.inverse(rungs), fisher.damped


@pytest.mark.promise(
    "Numbers", "A Fisher block that does not factor gets more damping, alone; such blocks are counted and warned of"
)
def test_only_the_bad_blocks_get_more_damping_and_no_more_than_they_need() -> None:
    F = matrices(bad=2)
    H, damped = inverse(F, 1e-6, RUNGS)
    assert damped == 2
    expected = torch.full((40, 1), 1e-6, dtype=torch.float64)
    expected[:2] = 1e-4  # the first rung of 1e-6, 1e-5, 1e-4 that is above 3e-5
    torch.testing.assert_close(H, torch.linalg.inv(F + torch.diag_embed(expected.expand(40, B))), rtol=1e-6, atol=1e-6)


def test_the_last_rung_counts_and_there_is_none_above_it() -> None:
    F = matrices(bad=1)  # 1e-6 needs two rungs
    assert inverse(F, 1e-6, 2)[1] == 1
    with pytest.raises(NotPositiveDefiniteError, match=r"nor at 10\^1 times"):
        inverse(F, 1e-6, 1)


def test_good_blocks_are_the_same_bits_as_without_a_ladder() -> None:
    F = matrices(bad=0)
    (with_, damped), (without, _) = inverse(F, 1e-6, RUNGS), inverse(F, 1e-6, 0)
    assert torch.equal(with_, without)
    assert damped == 0


def test_dead_weights_stay_cut_off_on_the_ladder() -> None:
    whole, dead = matrices(bad=40), torch.zeros(40, B + 1, dtype=torch.bool)
    alive = [i for i in range(B + 1) if i != 3]
    dead[:, 3] = True
    F = torch.full((40, B + 1, B + 1), 9.0, dtype=torch.float64)
    F[:, 3, 3] = -5  # worse than any damping could mend, but dead
    F[:, torch.tensor(alive)[:, None], torch.tensor(alive)] = whole
    H, damped = inverse(F, 1e-6, RUNGS, dead)
    assert damped == 40
    assert torch.equal(H[:, 3], torch.eye(B + 1, dtype=torch.float64)[3].expand(40, -1))
    assert torch.equal(H[:, :, 3], H[:, 3])
    torch.testing.assert_close(H[:, alive][:, :, alive], inverse(whole, 1e-6, RUNGS)[0])


def test_without_being_asked_there_is_no_ladder() -> None:
    fisher = BlockFisher(40, B, 1, 1e-6, solver="accumulate", dtype=torch.float64)
    fisher.load({"blocks": matrices(bad=1), "peak": torch.ones(40, B), "count": torch.tensor(1)})
    with pytest.raises(NotPositiveDefiniteError, match="will not factor at damp 1e-06: its rounding"):
        fisher.inverse()


@pytest.mark.parametrize("spoil", [lambda F: F[0].neg_(), lambda F: F[0].fill_(torch.nan)], ids=["indefinite", "nan"])
def test_past_the_last_rung_it_is_an_error(spoil: Any) -> None:
    F = matrices(bad=0)
    spoil(F)
    with pytest.raises(
        NotPositiveDefiniteError, match=r"block 0 \(1 in all\) will not factor at damp 1e-08, nor at 10\^6 times"
    ):
        inverse(F, 1e-8, RUNGS)


class Blocks(nn.Module):
    """Each block of B weights has its own input, which can be made hopeless for float32: one direction, and very large."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight = nn.Parameter(torch.randn(blocks, B))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum(dim=(1, 2))


def data(hopeless: int, blocks: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(64):
        x = torch.randn(1, blocks, B, generator=generator)
        x[:, :hopeless] = 3e2 * torch.randn(1, 1, 1, generator=generator) * torch.linspace(0.7, 1.3, B)
        found.append((x, torch.zeros(1)))
    return found


def prune(hopeless: int, blocks: int = 40, **more: Any) -> tuple[Blocks, capruner.PruningResult]:
    model = Blocks(blocks)
    arguments = {"num_grads": 64, "fisher_block_size": B, "damp": 1e-5, "progress": False} | more
    result = capruner.prune(
        model, data(hopeless, blocks), lambda out, _: out.sum(), 0.5, params=["weight"], **arguments
    )
    return model, result


def test_they_are_counted_by_layer_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "capruner"):
        model, result = prune(hopeless=2)
    assert result.settings["damped_blocks"] == {"weight": 2}
    assert "weight: 2 of 40 Fisher blocks would not factor at damp=1e-05 and got more" in caplog.text
    result.apply(model)
    assert int((model.weight == 0).sum()) == 160
    assert prune(hopeless=0)[1].settings["damped_blocks"] == {}


@pytest.mark.promise("Numbers", "If more than 5 % of the blocks of a layer need more damping, that is an error")
def test_past_a_share_of_the_layer_they_are_an_error() -> None:
    model = Blocks(40)
    before = snapshot(model)
    with pytest.raises(
        NotPositiveDefiniteError, match="weight: 3 of 40 Fisher blocks will not factor at damp=1e-05: raise it"
    ):
        prune(hopeless=3)
    assert same(snapshot(model), before)
    prune(hopeless=3, damp=1e-1)  # as it says


def test_of_few_blocks_none_may_fail() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="1 of 10 Fisher blocks"):
        prune(hopeless=1, blocks=10)
