"""Layers whose weights cost more lose more of them: steps compete by loss per cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_case import conv_net, gradients, images, mlp, prune, vectors, weights
from textbook import fisher_blocks

import capruner

NAMES = ["0.weight", "3.weight", "6.weight"]


def test_the_cheapest_per_cost_leave() -> None:
    model, data, costs = mlp(), vectors(), {"0.weight": 16.0, "2.weight": 1.0}
    result = prune(model, data, 0.6, method="obs", num_grads=30, fisher_block_size=16, damp=1e-3, costs=costs)
    scores = []
    for name, G in gradients(model, data).items():
        variance = torch.cat([torch.linalg.inv(block).diagonal() for block in fisher_blocks(G, 16, 1e-3)])
        scores.append(weights(model)[name].flatten() ** 2 / (2 * variance) / costs[name])
    kept = torch.ones(91, dtype=torch.bool)
    kept[torch.cat(scores).argsort()[: round(0.6 * 91)]] = False
    assert torch.equal(torch.cat([m.flatten() for m in result.masks().values()]), kept)


@pytest.mark.parametrize("method", ["cap", "obs"])
def test_equal_costs_are_none(method: str) -> None:
    plain, equal = (prune(conv_net(), method=method, costs=c) for c in (None, dict.fromkeys(NAMES, 7.0)))
    for name, mask in plain.masks().items():
        assert torch.equal(mask, equal.masks()[name])


def test_fewer_multiplications_are_left_and_counts_stay_exact() -> None:
    model = conv_net()
    used = capruner.multiply_adds(model, (3, 6, 6))
    assert used.per_weight(model) == {"0.weight": 16.0, "3.weight": 4.0, "6.weight": 1.0}
    plain, cheap = (prune(model, sparsity=[0.3, 0.6], costs=c) for c in (None, used.per_weight(model)))
    for sparsity in (0.3, 0.6):
        left = []
        for result in (plain, cheap):
            rows = result.layer_report(sparsity)
            assert sum(row["zeros"] for row in rows) == round(sparsity * sum(row["numel"] for row in rows))
            left.append(used.left({row["name"]: row["sparsity"] for row in rows}))
        assert left[1] < left[0]
        assert plain.predicted_loss(sparsity) <= cheap.predicted_loss(sparsity)


def test_dead_weights_stay_dead_however_dear_the_others_are() -> None:
    model = mlp()
    dead = torch.zeros_like(model[2].weight, dtype=torch.bool)
    dead[:, ::2] = True
    result = prune(
        model, vectors(), 0.5, masks={"2.weight": ~dead}, costs={"0.weight": 1e6, "2.weight": 1e-6}, num_grads=30
    )
    assert not result.masks()["2.weight"][dead].any()
    assert result.masks()["2.weight"][~dead].all()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"costs": {"0.weight": 1.0, "3.weight": 2.0}}, r"costs\['6.weight'\] must be a positive number, got None"),
        ({"costs": dict.fromkeys(NAMES, 0)}, "must be a positive number, got 0"),
        ({"costs": dict.fromkeys(NAMES, float("inf"))}, "must be a positive number, got inf"),
        ({"costs": dict.fromkeys(NAMES, "two")}, "must be a positive number, got 'two'"),
        ({"costs": [1.0, 2.0, 3.0]}, "costs must be {parameter name"),
        ({"global_sparsity": False}, "global_sparsity=False"),
        ({"sparsity": {0.5: ["0.weight", "3.weight", "6.weight"]}}, "no sparsities per layer"),
        ({"method": "fast_cap"}, "method='fast_cap'"),
        ({"method": "magnitude"}, "method='magnitude'"),
        ({"mask_type": "2:4", "params": "6.weight", "fisher_block_size": 24}, "mask_type=2:4"),
    ],
)
def test_what_cannot_be_is_refused_before_any_data(more: dict[str, Any], message: str) -> None:
    def never() -> Any:
        pytest.fail("data was drawn")
        yield

    with pytest.raises(ValueError, match=message):
        prune(conv_net(), never(), **({"costs": dict.fromkeys(NAMES, 1.0)} | more))


def test_a_saved_calibration_goes_on_with_its_own_costs_alone(tmp_path: Path) -> None:
    for costs in (dict.fromkeys(NAMES, 1.0), None):
        if costs is None:
            with pytest.raises(capruner.StateError, match="costs"):
                prune(conv_net(), images(), state_dir=tmp_path, costs=costs)
        else:
            prune(conv_net(), images(), state_dir=tmp_path, costs=costs)
