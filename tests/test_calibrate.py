"""One calibration solves for any sparsity as ``prune`` would, whatever happens to the model in between; and it finds the sparsest within a bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pruning_case import Counted, conv_net, images
from torch import nn
from torch.nn import functional as F
from untouched import same, snapshot

import capruner
from capruner.methods import METHODS

FEW = {"num_grads": 8, "fisher_block_size": 16, "progress": False}


def calibrate(model: nn.Module, **more: Any) -> capruner.CalibratedModel:
    return capruner.calibrate(model, images(), F.cross_entropy, **{**FEW, **more})


def prune(model: nn.Module, sparsity: Any, **more: Any) -> capruner.PruningResult:
    return capruner.prune(model, images(), F.cross_entropy, sparsity, **{**FEW, **more})


def assert_same(a: capruner.PruningResult, b: capruner.PruningResult) -> None:
    assert a.sparsities == b.sparsities
    assert a.settings == b.settings
    for x, y in zip(a.levels, b.levels):
        assert x.losses == y.losses
        assert same([*x.weights.values(), *x.masks.values()], [*y.weights.values(), *y.masks.values()])


@pytest.mark.parametrize("mask_type", ["unstructured", "2:4", "block4"])
@pytest.mark.parametrize("method", METHODS)
def test_solving_later_is_pruning(method: str, mask_type: str) -> None:
    model = conv_net()
    knobs = {"method": method, "mask_type": mask_type, "skip_unsupported": True}
    calibration = calibrate(model, **knobs)
    first = calibration.solve(0.5)
    expected = prune(conv_net(), 0.5, **knobs)
    assert_same(first, expected)
    first.apply(model)
    with torch.no_grad():
        model[3].weight.zero_()
    model.half()
    assert_same(calibration.solve([0.5]), expected)
    if mask_type != "2:4":
        assert_same(calibration.solve([0.75, 0.25]), prune(conv_net(), [0.25, 0.75], **knobs))


def test_data_is_drawn_once() -> None:
    data = Counted(images())
    model = conv_net()
    before = snapshot(model)
    calibration = capruner.calibrate(model, data, F.cross_entropy, **FEW)
    drawn = data.drawn
    for s in (0.1, 0.9, 0.5):
        calibration.solve(s)
    assert data.drawn == drawn
    assert same(before, snapshot(model))


def test_each_layer_its_own_sparsity() -> None:
    own = {0.5: ["0.weight", "3.weight"], 0.75: ["6.weight"]}
    calibration = calibrate(conv_net())
    assert_same(calibration.solve(own), prune(conv_net(), own))
    with pytest.raises(ValueError, match=r"3\.weight, 6\.weight: calibrated, but without a sparsity"):
        calibration.solve({0.5: ["0.weight"]})
    with pytest.raises(ValueError, match=r"6\.weight: not calibrated"):
        calibrate(conv_net(), params=["0", "3"]).solve(own)


def test_after_earlier_pruning() -> None:
    model = conv_net()
    prune(model, 0.5).apply(model)
    calibration = calibrate(model, masks="zeros")
    assert_same(calibration.solve(0.75), prune(model, 0.75, masks="zeros"))
    with pytest.raises(ValueError, match="already are"):
        calibration.solve(0.3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_recomputations": 2}, r"num_recomputations=2 calibrates again .*call prune\(\)"),
        ({"distill_passes": 1}, r"distill_passes=1 trains each sparsity .*call prune\(\)"),
        ({"num_grads": 0}, "num_grads must be"),
        ({"params": ["nothing"]}, "no parameter or module is called 'nothing'"),
    ],
)
def test_what_one_calibration_cannot_hold(knobs: dict[str, Any], message: str) -> None:
    data = Counted(images())
    with pytest.raises(ValueError, match=message):
        capruner.calibrate(conv_net(), data, F.cross_entropy, **{**FEW, **knobs})
    assert data.drawn == 0


def test_a_memory_budget_that_needs_groups() -> None:
    wide = nn.Sequential(nn.Flatten(), nn.Linear(108, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 3))
    with pytest.raises(ValueError, match=r"memory_budget=.* in \d groups, and calibrate\(\) holds all of them"):
        calibrate(wide, memory_budget=2**27 + 1_500_000)


# The sparsest model within a bound


def share_of_zeros(model: nn.Module) -> float:
    weights = [model[0].weight, model[3].weight, model[6].weight]
    assert not model.training
    assert not torch.is_grad_enabled()
    return -100 * sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_the_sparsest_meets_the_bound_and_the_next_does_not() -> None:
    model = conv_net().train()
    calibration = calibrate(model)
    before = snapshot(model)
    best = calibration.sparsest(share_of_zeros, within=60.0, tolerance=0.01)
    assert same(before, snapshot(model))
    assert best.dense == 0
    assert 0.59 <= best.sparsity <= 0.61
    assert best.value == share_within(best) >= -60
    assert best.curve == sorted(best.curve)
    assert min(s for s, value in best.curve if value < -60) - best.sparsity <= 0.01
    assert_same(best.result, prune(conv_net(), best.sparsity))


def share_within(best: capruner.Sparsest) -> float:
    masks = best.result.masks().values()
    return -100 * sum(int((~m).sum()) for m in masks) / sum(m.numel() for m in masks)


def test_bounds_of_the_search() -> None:
    calibration = calibrate(conv_net())
    assert calibration.sparsest(lambda m: 1.0).sparsity == 0.99  # nothing is lost
    assert calibration.sparsest(share_of_zeros, within=0.0).sparsity == 0.0  # anything is lost
    with pytest.raises(ValueError, match=r"even at sparsity 0\.5 .*raise `within` or lower `low`"):
        calibration.sparsest(share_of_zeros, within=1.0, low=0.5)
    with pytest.raises(ValueError, match="high must lie between"):
        calibration.sparsest(share_of_zeros, high=1.0)


def test_a_pruned_model_searches_upwards_only() -> None:
    model = conv_net()
    prune(model, 0.5).apply(model)
    best = calibrate(model, masks="zeros").sparsest(share_of_zeros, within=20.0)
    assert best.dense == pytest.approx(-50, abs=0.5)
    assert best.sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda m: math.nan, "metric must return a finite number, got nan for the dense model"),
        (lambda m: "good", "metric must return a number, got 'good' for the dense model"),
        (lambda m: 1.0 if m[0].weight.all() else math.inf, "a finite number, got inf for sparsity 0.99"),
        ("accuracy", "metric must be a function"),
    ],
)
def test_metrics_that_are_none(metric: Any, message: str) -> None:
    model = conv_net()
    calibration, before = calibrate(model), snapshot(model)
    with pytest.raises(ValueError, match=message):
        calibration.sparsest(metric)
    assert same(before, snapshot(model))


def test_a_mask_type_with_one_sparsity() -> None:
    with pytest.raises(ValueError, match="2:4 has one sparsity only"):
        calibrate(conv_net(), mask_type="2:4", skip_unsupported=True).sparsest(share_of_zeros)
