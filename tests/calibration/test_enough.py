from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capruner.calibration.enough import (
    BLOCKS,
    DAMP,
    LAYERS,
    LEAST,
    MOST,
    Sample,
    held_out_error,
    milestones,
    sample_blocks,
)
from capruner.core.blocks import BlockLayout
from capruner.core.shrinkage import estimated_share
from capruner.distributed import Partition

ROWS, B = 40, 24


def rows(m: int, directions: int, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of 40 neurons, each in some random directions of its own; more directions need more gradients."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(ROWS, directions, B, generator=g, dtype=torch.float64)
    return {"layer": torch.einsum("mnd,ndb->mnb", torch.randn(m, ROWS, directions, generator=g).double(), basis)}


def sample() -> Sample:
    return Sample(Partition({"layer": BlockLayout((ROWS, B), B)}), torch.device("cpu"))


def error(m: int, directions: int) -> float:
    one, gradients = sample(), rows(m, directions)["layer"]
    one.add({"layer": gradients[: m // 2]})
    one.error(m // 2)
    one.add({"layer": gradients[m // 2 :]})
    return one.error(m)


def test_the_error_falls_towards_one() -> None:
    few, more, many = (error(m, 20) for m in (16, 64, 2048))
    assert few > more > many
    assert many == pytest.approx(1, abs=0.1)


def test_gradients_in_more_directions_need_more_of_them() -> None:
    assert error(64, 2) < error(64, 20)


def test_it_is_the_mean_of_the_quadratic_form_over_unseen_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    seen, unseen = (torch.randn(30, 2, 6, generator=g, dtype=torch.float64) for _ in range(2))
    A, other = (torch.einsum("mni,mnj->nij", x, x) / 30 for x in (seen, unseen))
    alike = A.mean(dim=0)
    fourth = (seen.square().sum(dim=2) ** 2).mean(dim=0)
    found = held_out_error(A, other, alike, fourth, 30)
    for block in range(2):
        trace = A[block].trace()
        target = alike * trace / alike.trace()
        share = estimated_share(A[block][None], target[None], fourth[block][None], 30)
        damp = DAMP * trace / 6 * torch.eye(6, dtype=torch.float64)
        H = torch.linalg.inv((1 - share) * A[block] + share * target + damp)
        form = sum(float(x[block] @ H @ x[block]) for x in unseen) / 30 + float((H @ damp).trace())
        assert float(found[block]) == pytest.approx(form / 6)


def test_blocks_without_gradients_do_not_count() -> None:
    gradients = rows(64, 20)["layer"]
    first = sample_blocks({"layer": BlockLayout((ROWS, B), B)})["layer"][0]
    gradients[:, first] = 0
    one, nothing = sample(), sample()
    for part in (gradients[:32], gradients[32:]):
        one.add({"layer": part})
        nothing.add({"layer": torch.zeros_like(part)})
        found = one.error(64), nothing.error(64)
    assert 0 < found[0] < float("inf") == found[1]


def test_resumed() -> None:
    gradients = rows(64, 4)["layer"]
    whole, first, second = sample(), sample(), sample()
    for one in (whole, first):
        one.add({"layer": gradients[:32]})
        one.error(32)
        one.add({"layer": gradients[32:40]})
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    for one in (whole, second):
        one.add({"layer": gradients[40:]})
    assert second.error(64) == whole.error(64)


def test_milestones() -> None:
    assert milestones(20) == [20]
    assert milestones(LEAST) == [LEAST // 2, LEAST]
    assert milestones(300) == [32, 64, 128, 256, 300]
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
    assert sample_blocks({"padded": layouts["padded"]}) == {"padded": [0, 1, 2, 3]}
