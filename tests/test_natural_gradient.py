"""Natural-gradient steps: against a float64 run by hand, that they never make things worse, and that they are refused where they cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook import fisher_blocks
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import same, snapshot

import capruner
from capruner import natural_gradient
from capruner.calibration import WORKING_SET
from capruner.distributed import Shards
from capruner.natural_gradient import Divergence, FirstSamples, search


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def data(count: int = 60, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 12, generator=generator).to(dtype), torch.randint(4, (4,), generator=generator))
        for _ in range(count)
    ]


ARGUMENTS: dict[str, Any] = {"num_grads": 60, "fisher_block_size": 48, "damp": 1e-3, "progress": False}
WEIGHTS = ("0.weight", "2.weight")


def prune(model: nn.Module, batches: Any, sparsity: Any, steps: int = 2, **more: Any) -> capruner.PruningResult:
    return capruner.prune(model, batches, sparsity=sparsity, natural_gradient_steps=steps, **(ARGUMENTS | more))


def said(result: capruner.PruningResult, sparsity: float | None = None) -> list[dict[str, float]]:
    return [x["step"] for x in result.settings["natural_gradient"] if sparsity in (None, x["sparsity"])]


def divergence(pruned: nn.Module, dense: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """KL(dense ‖ pruned), written out."""
    x = torch.cat([inputs for inputs, _ in batches])
    p, q = dense(x).detach().softmax(1), pruned(x).softmax(1)
    return (p * (p.log() - q.log())).sum() / len(x)


# The length


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-4, 1e4), st.floats(1e-3, 1.0), st.floats(1e-3, 2.0))
def test_on_a_parabola_the_best_length_is_found(before: float, slope: float, won: float, share: float) -> None:
    bend = slope**2 / (2 * won * before)  # the minimum wins `won` of the start
    seen: list[float] = []

    def value(length: float) -> float:
        seen.append(before - slope * length + bend * length**2 / 2)
        return seen[-1]

    step = search(value, slope, share)
    assert step.before == before
    assert step.after == min(seen)
    assert step.after <= before
    assert len(seen) <= 1 + natural_gradient.TRIES
    close = natural_gradient.CLOSE / (1 - natural_gradient.CLOSE) + 0.01
    if won / share < 2**4 and share / won < 8**4:  # within reach of the tries
        assert step.length == pytest.approx(slope / bend, rel=close)
        assert step.share == pytest.approx(2 * won, rel=close)


def test_lengths_that_ruin_the_network_are_left_again() -> None:
    limit = 1e-3
    step = search(lambda length: math.nan if length > limit else 2.0 - length, 1.0, 0.3)
    assert 0 < step.length <= limit


@pytest.mark.parametrize("slope", [0.0, -1.0, math.inf, math.nan])
def test_without_a_way_down_there_is_no_step(slope: float) -> None:
    assert search(lambda length: 1.0 + length, slope, 0.3).length == 0


def test_where_every_length_is_worse_none_is_taken_and_the_next_search_begins_shorter() -> None:
    step = search(lambda length: 1.0 + length, 1.0, 0.3)
    assert (step.length, step.before, step.after) == (0.0, 1.0, 1.0)
    assert 0 < step.share < natural_gradient.FIRST_SHARE


# Its parts


@pytest.mark.parametrize("samples", [1, 4, 5, 8, 1000])
def test_the_first_samples_are_held_anew_in_each_pass(samples: int) -> None:
    batches = data(6)
    first = FirstSamples(batches, samples)
    for _ in range(2):
        assert [x is y for (x, _), (y, _) in zip(first, batches, strict=True)] == [True] * 6
        assert len(first.held) == min(6, -(-samples // 4))
        assert all(x is y for x, (y, _) in zip(first.held, batches, strict=False))


def test_the_divergence_and_its_gradient_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned, batches = net(torch.float64), net(torch.float64), data(5, torch.float64)
    batches[3] = (batches[3][0][:1], batches[3][1][:1])  # a sample counts the same wherever it is
    with torch.no_grad():
        pruned[0].weight[pruned[0].weight.abs() < 0.15] = 0
    expected = divergence(pruned, dense, batches)
    gradients = torch.autograd.grad(expected, [pruned[0].weight, pruned[2].weight])
    saved = {name: p.detach() for name, p in dense.named_parameters()}
    measured = Divergence(pruned, saved, [x for x, _ in batches], Shards({}))
    assert measured.value() == pytest.approx(float(expected.detach()), rel=1e-9)
    found = measured.gradient({name: dict(pruned.named_parameters())[name] for name in WEIGHTS})
    for name, gradient in zip(WEIGHTS, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient)
    monkeypatch.setattr(natural_gradient, "SEARCHED", 8)  # two batches for the value, still all for the gradient
    assert measured.value() == pytest.approx(float(divergence(pruned, dense, batches[:2]).detach()), rel=1e-9)
    assert torch.equal(measured.gradient({"0.weight": pruned[0].weight})["0.weight"], found["0.weight"])
    at_home = Divergence(dense, saved, [x for x, _ in batches], Shards({}))
    assert abs(at_home.value()) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in at_home.gradient(dict(dense.named_parameters())).values())


# As a whole


@pytest.mark.parametrize("block_size", [48, 50])  # 50: blocks that straddle rows, and padding
def test_three_steps_by_hand(block_size: int) -> None:
    """From the result without steps, in float64: gradient of the divergence, Fisher matrix of the weights that stay, Polak-Ribière, and the length that the
    run reports."""
    batches = data(dtype=torch.float64)
    more = {"fisher_block_size": block_size}
    plain = prune(net(torch.float64), batches, 0.7, steps=0, **more)
    result = prune(net(torch.float64), batches, 0.7, steps=3, **more)
    steps = said(result)
    assert len(steps) == 3
    dense, model = net(torch.float64), net(torch.float64)
    parameters = {name: dict(model.named_parameters())[name] for name in WEIGHTS}
    rows: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for x, y in batches:
        for name, g in zip(
            WEIGHTS, torch.autograd.grad(F.cross_entropy(model(x), y), list(parameters.values())), strict=True
        ):
            rows[name].append(g.flatten())
    blocks = {name: fisher_blocks(torch.stack(rows[name]), block_size, 1e-3) for name in WEIGHTS}
    plain.apply(model)
    last: tuple[Tensor, Tensor, Tensor] | None = None
    turns = 0
    for step in steps:
        loss = divergence(model, dense, batches)
        assert step["before"] == pytest.approx(float(loss.detach()), rel=1e-9)
        gradients = dict(zip(WEIGHTS, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        newtons = []
        for name in WEIGHTS:
            keep = plain.masks()[name].flatten().split(block_size)
            parts = []
            for F_block, g, k in zip(blocks[name], gradients[name].flatten().split(block_size), keep, strict=True):
                part = torch.zeros_like(g)
                part[k] = torch.linalg.solve(F_block[k][:, k], g[k])
                parts.append(part)
            newtons.append(torch.cat(parts))
        keeps = torch.cat([plain.masks()[name].flatten() for name in WEIGHTS])
        gradient = torch.cat([gradients[name].flatten() for name in WEIGHTS]) * keeps
        newton = way = torch.cat(newtons)
        if last is not None:
            gradient_before, newton_before, way_before = last
            beta = newton @ (gradient - gradient_before) / (newton_before @ gradient_before)
            if beta > 0 and (newton + beta * way_before) @ gradient > 0:
                way, turns = newton + beta * way_before, turns + 1
        last = gradient, newton, way
        assert step["slope"] == pytest.approx(float(way @ gradient), rel=1e-6)
        with torch.no_grad():
            for p, part in zip(parameters.values(), way.split([p.numel() for p in parameters.values()]), strict=True):
                p -= step["length"] * part.view_as(p)
        assert step["after"] == pytest.approx(float(divergence(model, dense, batches).detach()), rel=1e-6)
        assert step["after"] < step["before"]
    assert turns
    for name, p in parameters.items():
        assert torch.equal(result.masks()[name], plain.masks()[name])
        torch.testing.assert_close(result.level().weights[name], p.detach(), rtol=1e-6, atol=1e-9)
    assert result.predicted_loss() == plain.predicted_loss()


CASES: dict[str, dict[str, Any]] = {
    "cap": {},
    "obs": {"method": "obs"},
    "samples": {"gradients": "sample", "num_grads": 240},
    "recomputations": {"num_recomputations": 3},
    "labels of the model": {"labels": "model"},
    "each layer its own": {"global_sparsity": False},
    "2:4": {"sparsity": 0.5, "mask_type": "2:4"},
    "block4": {"mask_type": "block4"},
    "inverse blocks on the CPU": {"fisher_inv_device": "cpu"},
    "a budget that suffices, recomputed": {"memory_budget": "1GiB", "num_recomputations": 2},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_masks_stay_and_the_divergence_falls(case: str) -> None:
    more = CASES[case] | {}
    sparsity, dtype = more.pop("sparsity", [0.5, 0.8]), more.pop("dtype", torch.float32)
    model, batches = net(dtype), data(dtype=dtype)
    before = snapshot(model)
    result = prune(model, batches, sparsity, **more)
    assert same(before, snapshot(model))
    climbed = more.get("num_recomputations", 1) > 1
    plain = prune(model, batches, sparsity, steps=0, **more)
    for s in result.sparsities:
        found, steps = result.level(s), said(result, s)
        assert len(steps) == 2 * more.get("num_recomputations", 1)
        assert all(step["after"] < step["before"] for step in steps)
        for name, mask in found.masks.items():
            assert found.weights[name].dtype == dtype
            assert not found.weights[name][~mask].any()
            assert climbed or torch.equal(mask, plain.level(s).masks[name])
        assert sum(row["zeros"] for row in result.layer_report(s)) == sum(row["zeros"] for row in plain.layer_report(s))
        pruned = net(dtype)
        result.apply(pruned, s)
        measured = float(divergence(pruned.float(), net(dtype).float(), data()).detach())
        assert measured == pytest.approx(steps[-1]["after"], rel=0.05 if dtype == torch.bfloat16 else 1e-3)
    assert result.timings["natural gradient"] > 0


def test_dense_is_what_the_network_was_at_first() -> None:
    """Also with recomputations within a budget, where each calibration is set up anew, and where weights had been pruned before."""
    model = net()
    prune(model, data(), 0.3, steps=0).apply(model)
    start = net()
    start.load_state_dict(model.state_dict())
    result = prune(model, data(), 0.8, masks="zeros", num_recomputations=2, memory_budget="1GiB")
    result.apply(model)
    assert said(result)[-1]["after"] == pytest.approx(float(divergence(model, start, data()).detach()), rel=1e-3)


def test_where_nothing_was_removed_there_is_nothing_to_win() -> None:
    result = prune(net(), data(), 0.0)
    assert all(step["before"] < 1e-6 for step in said(result))
    torch.testing.assert_close(
        dict(result.level().weights), {n: p for n, p in net().named_parameters() if n in WEIGHTS}
    )


def test_an_iterator_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capruner.calibration.SAMPLES", 40)
    stream = iter(data(120))
    result = prune(net(), stream, 0.6, num_recomputations=2)
    assert next(stream, None) is None
    assert len(said(result)) == 4


def test_bad_batches_are_no_part_of_it() -> None:
    batches = data(64)
    for index in (1, 7, 20, 33):
        batches[index] = (batches[index][0].index_fill(0, torch.tensor([2]), torch.nan), batches[index][1])
    good = [batch for batch in batches if batch[0].isfinite().all()]
    expected = prune(net(), good, 0.7)
    found = prune(net(), batches, 0.7, on_bad_batch="skip")
    assert said(found) == said(expected)
    assert all(torch.equal(found.level().weights[n], w) for n, w in expected.level().weights.items())


class Pairs(nn.Module):
    """Outputs that are no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.body(x)
        return outputs, outputs


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (net, {"method": "fast_cap"}, "need the Fisher blocks of method cap or obs, got method='fast_cap'"),
        (net, {"method": "magnitude"}, "got method='magnitude'"),
        *((net, {"steps": steps}, "must be a whole number, at least 0, got") for steps in (-1, 1.0, True, "two")),
        (
            net,
            {"memory_budget": WORKING_SET + 16 * 12 * (48 + 6 + 8) * 4 + 1000},
            "makes 2 groups of layers.*natural-gradient steps move all layers together: give 129 MiB",
        ),
        (
            Pairs,
            {"loss_fn": lambda outputs, y: F.cross_entropy(outputs[0], y)},
            r"from logits \(batch, classes\), and the model gave tuple; use natural_gradient_steps=0",
        ),
    ],
)
def test_what_cannot_be_is_refused(model: Callable[[], nn.Module], more: dict[str, Any], message: str) -> None:
    broken = model()
    before = snapshot(broken)
    with pytest.raises(ValueError, match=message):
        prune(broken, data(), 0.5, **more)
    assert same(before, snapshot(broken))


def test_the_model_is_restored_when_a_step_fails() -> None:
    model, calls = net().train(), 0

    def forward(module: nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 60 + 60 + 60 + 90:  # gradients, dense outputs, gradient of the divergence; in the midst of a search
            raise KeyboardInterrupt

    before = snapshot(model)
    handle = model.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        prune(model, data(), 0.5)
    handle.remove()
    assert same(before, snapshot(model))
