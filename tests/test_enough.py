from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capruner.calibration.enough import (
    BLOCKS,
    LAYERS,
    LEAST,
    MOST,
    NOISE,
    SAMPLE_BYTES,
    NoiseSample,
    milestones,
    sample_blocks,
)
from capruner.distributed import Partition
from capruner.layout import BlockLayout

ROWS, B = 40, 24


def rows(m: int, directions: int, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of 40 neurons, each in some random directions of its own; more directions need more gradients."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(ROWS, directions, B, generator=g, dtype=torch.float64)
    return {"layer": torch.einsum("mnd,ndb->mnb", torch.randn(m, ROWS, directions, generator=g).double(), basis)}


def sample() -> NoiseSample:
    return NoiseSample(Partition({"layer": BlockLayout((ROWS, B), B)}), torch.device("cpu"))


def noise(m: int, directions: int) -> float:
    one = sample()
    for part in rows(m, directions)["layer"].split(16):
        one.add({"layer": part})
    return one.noise(m)


def test_noise_falls_as_gradients_come_in() -> None:
    few, more, many = (noise(m, 4) for m in (16, 64, 1024))
    assert 1 >= few > more > many > 0
    assert few / more == pytest.approx(4, rel=0.5)


def test_gradients_in_more_directions_need_more_of_them() -> None:
    assert noise(64, 2) < NOISE < noise(64, 20)
    assert noise(2048, 20) < NOISE


def test_the_share_is_the_expected_squared_error_over_the_squared_distance() -> None:
    """Against the mean over fresh draws of the squared error of the blocks themselves."""
    m, draws = 128, 40
    blocks = sample_blocks({"layer": BlockLayout((ROWS, B), B)})["layer"]
    basis = torch.randn(BLOCKS, 3, B, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact = basis.mT @ basis
    errors, distances, shares = [], [], []
    for draw in range(draws):
        coefficients = torch.randn(m, BLOCKS, 3, generator=torch.Generator().manual_seed(draw)).double()
        full = torch.zeros(m, ROWS, B, dtype=torch.float64)
        full[:, blocks] = torch.einsum("mnd,ndb->mnb", coefficients, basis)
        one = sample()
        one.add({"layer": full})
        F = one.sums["layer"].blocks / m
        common = F.sum(dim=0)
        target = common * (F.diagonal(dim1=1, dim2=2).sum(dim=1) / common.trace())[:, None, None]
        errors.append((F - exact).square().sum())
        distances.append((F - target).square().sum())
        shares.append(one.noise(m))
    expected = float(torch.stack(errors).mean() / torch.stack(distances).mean())
    assert sum(shares) / draws == pytest.approx(expected, rel=0.2)


def test_blocks_without_gradients_do_not_count() -> None:
    one, other = sample(), sample()
    gradients = rows(64, 4)["layer"]
    one.add({"layer": gradients})
    silent = gradients.clone()
    first = sample_blocks({"layer": BlockLayout((ROWS, B), B)})["layer"][0]
    silent[:, first] = 0
    other.add({"layer": silent})
    assert 0 < other.noise(64) < 1
    nothing = sample()
    nothing.add({"layer": torch.zeros(8, ROWS, B)})
    assert nothing.noise(8) == 1


def test_resumed() -> None:
    gradients = rows(40, 4)["layer"]
    whole, first, second = sample(), sample(), sample()
    for part in (gradients[:24], gradients[24:]):
        whole.add({"layer": part})
    first.add({"layer": gradients[:24]})
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    second.add({"layer": gradients[24:]})
    assert second.noise(40) == whole.noise(40)


def test_milestones() -> None:
    assert milestones(10) == [10]
    assert milestones(LEAST) == [LEAST]
    assert milestones(300) == [64, 128, 256, 300]
    assert milestones(MOST)[-2:] == [2048, 4096]


def test_the_sample_is_small_whole_and_of_one_phase() -> None:
    layouts = {f"layer{i}": BlockLayout((50, 60), 20) for i in range(40)}
    layouts["padded"] = BlockLayout((7, 7), 10)
    layouts["alone"] = BlockLayout((1, 5), 5)
    layouts["pair"] = BlockLayout((2, 5), 5)
    chosen = sample_blocks(layouts)
    assert len(chosen) == LAYERS
    for name, blocks in chosen.items():
        assert len(set(blocks)) == min(BLOCKS, layouts[name].num_blocks)
        assert {block % 3 for block in blocks} == {0}
        assert max(blocks) < layouts[name].numel // layouts[name].block_size
    assert sample_blocks({"alone": layouts["alone"], "pair": layouts["pair"]}) == {"pair": [0, 1]}
    large = {f"layer{i}": BlockLayout((4, 1024), 1024) for i in range(16)}
    assert len(sample_blocks(large)) == SAMPLE_BYTES // (4 * 1024**2 * 8) == 2
    assert sample_blocks({"padded": layouts["padded"]}) == {"padded": [0, 1, 2, 3]}
