"""Processes that were called with different arguments or models say so before any work; one that cannot begin tells the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ARGUMENTS, batches, net, run
from torch import nn

import capruner


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 5))


def moved() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] += 1
    return model


def holes(every: int) -> dict[str, torch.Tensor]:
    return {"0.weight": (torch.arange(31 * 20) % every != 0).view(31, 20)}


# What rank 1 does otherwise, and what every rank says.
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "damp": ({"damp": 0.01}, "damp is 0.0001 on rank 0, 0.01 on rank 1"),
    "block size": ({"fisher_block_size": 48}, "fisher_block_size is 96 on rank 0, 48 on rank 1"),
    "sparsity": ({"sparsity": 0.6}, "sparsity is [0.5] on rank 0, [0.6] on rank 1"),
    "sparsities": ({"sparsity": [0.5, 0.6]}, "sparsity is [0.5] on rank 0, [0.5, 0.6] on rank 1"),
    "num_grads": ({"num_grads": 40}, "num_grads is 48 on rank 0, 40 on rank 1"),
    "method": ({"method": "obs"}, "method is cap on rank 0, obs on rank 1"),
    "scope": ({"global_sparsity": False}, "global_sparsity is True on rank 0, False on rank 1"),
    "selection": ({"params": ["0.weight"]}, "params is ['0.weight', '2.weight'] on rank 0, ['0.weight'] on rank 1"),
    "masks": ({"masks": holes(3)}, "masks is different on rank 1 from rank 0"),
    "state": ({"state_dir": "state"}, "state_dir is False on rank 0, True on rank 1"),
    "shapes": ({"model": wide}, "parameter 0.weight (and 3 more) is float32 (31, 20) on rank 0, float32 (33, 20) on rank 1"),
    "dtype": ({"model": lambda: net().double()}, "parameter 0.weight (and 3 more) is float32 (31, 20) on rank 0, float64 (31, 20) on rank 1"),
    "weights": ({"model": moved}, "parameter 2.weight has other values on rank 1 than on rank 0"),
    "an invalid argument": ({"num_grads": 0}, "rank 1 cannot start, so no process does: num_grads must be"),
    "a layer that is not there": ({"params": ["9.weight"]}, "rank 1 cannot start, so no process does: params: no parameter"),
}  # fmt: skip


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def disagree(rank: int, size: int) -> dict[str, str]:
    found = {}
    for case, (other, _) in DIFFERENT.items():
        arguments = ARGUMENTS | {"sparsity": 0.5} | (other if rank == 1 else {})
        model = arguments.pop("model", net)()
        found[case] = said(
            lambda model=model, arguments=arguments: capruner.prune(model, batches(rank, size), **arguments)
        )
    capruner.prune(net(), batches(rank, size), sparsity=0.5, **ARGUMENTS)  # and afterwards all work together
    masks = holes(3 + rank)
    found["given masks"] = said(
        lambda: capruner.compensate_masks(net(), batches(rank, size), nn.functional.cross_entropy, masks, **ARGUMENTS)
    )
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run(2, tmp_path_factory.mktemp("ranks") / "two", disagree)


@pytest.mark.promise(
    "Several processes",
    "Different arguments or weights are an error on every process, before the first gradient, with the name of the argument or parameter",
)
@pytest.mark.parametrize("case", [*DIFFERENT, "given masks"])
def test_a_disagreement_is_named_on_every_rank(case: str, both: list[dict[str, str]]) -> None:
    expected = DIFFERENT[case][1] if case in DIFFERENT else "masks is different on rank 1 from rank 0"
    own = expected.partition("so no process does: ")[2]
    assert expected in both[0][case]
    assert (own or expected) in both[1][case]


def test_one_process_agrees_with_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^num_grads must"):
        capruner.prune(net(), batches(0, 1), sparsity=0.5, **ARGUMENTS | {"num_grads": 0})
