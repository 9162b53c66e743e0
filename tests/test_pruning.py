"""The contract of ``capruner.prune``."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_case import (
    METHODS,
    SAMPLES,
    SMALL,
    WEIGHTS,
    Counted,
    conv_net,
    gradients,
    images,
    mlp,
    prune,
    vectors,
    weights,
    zeros,
)
from textbook import cap_loop, fisher_blocks, quadratic_loss
from torch import Tensor, nn
from torch.nn import functional as F
from untouched import same, snapshot

import capruner

# Against the textbook


@pytest.mark.parametrize("B", [1, 7, 16, 28, 63, 1000])
@pytest.mark.parametrize("solver", ["woodbury", "accumulate"])
def test_cap_is_the_textbook_end_to_end(B: int, solver: str) -> None:
    model, data = mlp(), vectors()
    fishers = {name: fisher_blocks(G, B, 1e-3) for name, G in gradients(model, data).items()}
    sparsities = [0.1, 0.5, 0.8, 0.95]
    result = prune(model, data, sparsities, num_grads=30, fisher_block_size=B, damp=1e-3, solver=solver)
    for s in sparsities:
        masks, expected, loss = cap_loop(weights(model), fishers, round(s * 91))
        for name in masks:
            assert torch.equal(result.masks(s)[name], masks[name])
            torch.testing.assert_close(result.level(s).weights[name], expected[name], rtol=1e-7, atol=1e-9)
        assert result.predicted_loss(s) == pytest.approx(SAMPLES * loss, rel=1e-7)
        measured = {
            n: SAMPLES * quadratic_loss(weights(model)[n], result.level(s).weights[n], fishers[n]) for n in masks
        }
        assert result.level(s).losses == pytest.approx(measured, rel=1e-6)


def test_per_layer_targets_are_the_textbook_layer_by_layer() -> None:
    model, data = mlp(), vectors()
    fishers = {name: fisher_blocks(G, 16, 1e-3) for name, G in gradients(model, data).items()}
    arguments = {"num_grads": 30, "fisher_block_size": 16, "damp": 1e-3}
    uniform = prune(model, data, 0.7, global_sparsity=False, **arguments)
    own = prune(model, data, {0.7: ["0.weight"], 0.3: ["2.weight"]}, **arguments)
    for name, share in (("0.weight", 0.7), ("2.weight", 0.3)):
        original = weights(model)[name]
        for result, s in ((uniform, 0.7), (own, share)):
            masks, expected, loss = cap_loop({name: original}, {name: fishers[name]}, round(s * original.numel()))
            assert torch.equal(result.masks()[name], masks[name])
            torch.testing.assert_close(result.level().weights[name], expected[name], rtol=1e-7, atol=1e-9)
            assert result.level().losses[name] == pytest.approx(SAMPLES * loss, rel=1e-7)


def test_of_two_entries_with_the_same_parameter_the_first_counts() -> None:
    result = prune(conv_net(), sparsity={0.9: ["6.weight"], 0.25: ["__ALL_PRUNABLE__"]})
    assert {row["name"]: row["zeros"] for row in result.layer_report()} == {
        "6.weight": round(0.9 * 48),
        "0.weight": 27,
        "3.weight": 18,
    }


def test_samples_make_the_fisher_matrix_of_samples() -> None:
    model, data = mlp(), vectors(10)
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(3)]
    by_sample = prune(model, data, 0.6, gradients="sample", num_grads=30)
    by_batch = prune(model, singles, 0.6, num_grads=30)
    for name, mask in by_batch.masks().items():
        assert torch.equal(by_sample.masks()[name], mask)
        torch.testing.assert_close(by_sample.level().weights[name], by_batch.level().weights[name])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("s", [0.3, 0.6, 0.9])
def test_cap_costs_less_than_obs_less_than_magnitude(s: float, seed: int) -> None:
    # One block per layer and a target per layer: all remove the same number from each block.
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    mix = torch.randn(12, 12, dtype=torch.float64)
    data = [(torch.randn(SAMPLES, 12, dtype=torch.float64) @ mix, torch.randint(4, (SAMPLES,))) for _ in range(60)]
    fishers = {name: fisher_blocks(G, 1000, 1e-4) for name, G in gradients(model, data).items()}
    arguments = {"num_grads": 60, "fisher_block_size": 1000, "damp": 1e-4}

    def cost(result: capruner.PruningResult) -> float:
        return sum(quadratic_loss(w, result.level().weights[n], fishers[n]) for n, w in weights(model).items())

    results = {m: prune(model, data, s, method=m, global_sparsity=False, **arguments) for m in METHODS}
    costs = {m: cost(result) for m, result in results.items()}
    assert costs["cap"] < costs["obs"] < costs["magnitude"]
    assert results["cap"].predicted_loss() == pytest.approx(SAMPLES * costs["cap"], rel=1e-6)
    assert results["obs"].predicted_loss() == pytest.approx(SAMPLES * costs["obs"], rel=1e-6)
    fitted = capruner.compensate_masks(
        model, data, F.cross_entropy, results["magnitude"].masks(), progress=False, **arguments
    )
    assert costs["cap"] < cost(fitted) < costs["magnitude"]


def test_obs_is_one_scoring_and_one_joint_update() -> None:
    model, data = mlp(), vectors()
    fishers = {name: fisher_blocks(G, 16, 1e-3) for name, G in gradients(model, data).items()}
    result = prune(model, data, 0.6, method="obs", num_grads=30, fisher_block_size=16, damp=1e-3)
    scores = []
    for name, blocks in fishers.items():
        variance = torch.cat([torch.linalg.inv(block).diagonal() for block in blocks])
        scores.append(weights(model)[name].flatten() ** 2 / (2 * variance))
    kept = torch.ones(91, dtype=torch.bool)
    kept[torch.cat(scores).argsort()[: round(0.6 * 91)]] = False
    assert torch.equal(torch.cat([m.flatten() for m in result.masks().values()]), kept)


def test_magnitude_removes_the_smallest_and_needs_no_data() -> None:
    model = mlp()
    result = capruner.prune(model, None, sparsity=[0.3, 0.6], method="magnitude", fisher_block_size=11)
    flat = torch.cat([w.flatten() for w in weights(model).values()])
    for s in (0.3, 0.6):
        expected = torch.zeros(91, dtype=torch.bool)
        expected[flat.abs().argsort()[round(s * 91) :]] = True
        assert torch.equal(torch.cat([m.flatten() for m in result.masks(s).values()]), expected)
        pruned = torch.cat([w.flatten() for w in result.level(s).weights.values()])
        assert torch.equal(pruned, flat * expected)


def test_float32_agrees_with_float64() -> None:
    double = prune(mlp(), vectors(), 0.7, num_grads=30)
    single = prune(mlp(torch.float32), vectors(dtype=torch.float32), 0.7, num_grads=30)
    for name, mask in double.masks().items():
        assert torch.equal(single.masks()[name], mask)
        torch.testing.assert_close(
            single.level().weights[name], double.level().weights[name].float(), rtol=1e-3, atol=1e-5
        )


# Exactness, and a model that stays as it is


@pytest.mark.promise("Numbers", "The number of zeros is exact, and they are where the masks say")
@settings(max_examples=30, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    B=st.integers(1, 300),
    sparsities=st.lists(st.floats(0, 0.999), min_size=1, max_size=3),
    global_sparsity=st.booleans(),
    score=st.sampled_from(["marginal", "cumulative"]),
)
def test_zeros_are_exact_and_where_the_masks_say(
    method: str, B: int, sparsities: list[float], global_sparsity: bool, score: str
) -> None:
    model = conv_net()
    before = snapshot(model)
    result = prune(
        model,
        sparsity=sparsities,
        method=method,
        fisher_block_size=B,
        global_sparsity=global_sparsity,
        score=score,
        gradients="sample",
    )
    assert same(before, snapshot(model))
    for s in sparsities:
        result.apply(model, s)
        for name, weight in weights(model).items():
            assert torch.equal(weight != 0, result.masks(s)[name])
            if not global_sparsity:
                assert int((weight == 0).sum()) == round(s * weight.numel())
        if global_sparsity:
            assert zeros(model) == round(s * WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradients", ["batch", "sample"])
def test_other_precisions(dtype: torch.dtype, method: str, gradients: str) -> None:
    model = conv_net().to(dtype)
    before = snapshot(model)
    result = prune(model, images(dtype=dtype), [0.5, 0.9], method=method, gradients=gradients)
    assert same(before, snapshot(model))
    for s in (0.5, 0.9):
        result.apply(model, s)
        assert zeros(model) == round(s * WEIGHTS)
        assert all(w.dtype == dtype for w in result.level(s).weights.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_untouched(method: str) -> None:
    model = conv_net().train()
    model[1].eval()
    model[6].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    for more in ({}, {"gradients": "sample"}, {"num_recomputations": 2}, {"masks": "zeros"}):
        prune(model, sparsity=[0.5, 0.75], method=method, **more)
        assert same(before, snapshot(model))


@pytest.mark.parametrize("method", ["cap", "fast_cap", "obs"])
def test_one_pass_over_the_data_serves_a_list(method: str) -> None:
    data = Counted(images(20))
    sparsities = [0.9, 0.25, 0.5, 0.99]
    result = prune(conv_net(), data, sparsities, method=method)
    assert (data.drawn, data.passes) == (12, 1)
    assert result.sparsities == sorted(sparsities)
    for s in sparsities:
        alone = prune(conv_net(), images(20), s, method=method)
        for name in alone.masks():
            assert torch.equal(alone.masks()[name], result.masks(s)[name])
            torch.testing.assert_close(alone.level().weights[name], result.level(s).weights[name])


def test_masks_of_a_list_are_nested() -> None:
    result = prune(conv_net(), sparsity=[0.2, 0.5, 0.8, 0.95])
    for low, high in zip(result.sparsities, result.sparsities[1:]):
        for name, mask in result.masks(high).items():
            assert not (mask & ~result.masks(low)[name]).any()


@pytest.mark.promise("Numbers", "The same call gives bit-identical results on a CPU")
def test_the_same_call_gives_the_same_bits() -> None:
    first, second = (prune(conv_net(), sparsity=0.7, blocks_in_parallel=p) for p in (None, 1))
    for name, weight in first.level().weights.items():
        assert torch.equal(weight, second.level().weights[name])


def test_nothing_leaves_at_sparsity_zero() -> None:
    model = conv_net()
    for method in METHODS:
        result = prune(model, sparsity=0, method=method)
        for name, weight in weights(model).items():
            torch.testing.assert_close(result.level(0.0).weights[name], weight, rtol=0, atol=0)
        assert result.predicted_loss() == 0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


@pytest.mark.parametrize("gradients", ["batch", "sample"])
def test_tied_parameters_count_once_and_stay_tied(gradients: str) -> None:
    model = Tied()
    result = prune(model, vectors(dtype=torch.float32), 0.5, gradients=gradients)
    assert [row["name"] for row in result.layer_report()] == ["a.weight", "c.weight"]
    assert result.total_weights == sum(p.numel() for p in model.parameters())
    result.apply(model)
    assert model.b.weight is model.a.weight
    assert int((model.a.weight == 0).sum() + (model.c.weight == 0).sum()) == round(0.5 * (81 + 36))


def test_a_wrapped_model_and_inputs_of_other_kinds() -> None:
    model = conv_net()
    wrapped = prune(nn.DataParallel(model), sparsity=0.5)
    listed = prune(model, [([x], y) for x, y in images()], 0.5)
    plain = prune(model, sparsity=0.5)
    for name, mask in plain.masks().items():
        assert torch.equal(wrapped.masks()[name], mask)
        assert torch.equal(listed.masks()[name], mask)


def test_dataloader_and_default_loss() -> None:
    x, y = (torch.cat(parts) for parts in zip(*images()))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    result = capruner.prune(conv_net(), loader, sparsity=0.5, **SMALL)
    assert torch.equal(result.masks()["0.weight"], prune(conv_net()).masks()["0.weight"])


def test_timings_name_the_stages() -> None:
    timings = prune(conv_net()).timings
    assert {"gradients", "fisher", "eliminate", "allocate", "compensate"} <= set(timings)
    assert all(seconds >= 0 for seconds in timings.values())


# Pruning what is pruned


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masks", [None, "zeros", "given"])
def test_a_second_pruning_keeps_survivors_alive(method: str, masks: str | None) -> None:
    model = conv_net()
    first = prune(model, sparsity=0.4, method=method)
    first.apply(model)
    survivors = {name: w != 0 for name, w in weights(model).items()}
    second = prune(model, sparsity=0.7, method=method, masks=first.masks() if masks == "given" else masks)
    second.apply(model)
    assert zeros(model) == round(0.7 * WEIGHTS)
    for name, weight in weights(model).items():
        assert weight.isfinite().all()
        assert not ((weight != 0) & ~survivors[name]).any(), "a removed weight came back"
        assert (weight != 0).any(), "a layer died"


def test_masked_weights_are_cut_off_from_the_others() -> None:
    # What a mask removed counts as 0, whatever the tensor holds, and has no influence through the Fisher matrix.
    model, data = mlp(), vectors()
    masks = {name: torch.rand(w.shape) > 0.3 for name, w in weights(model).items()}
    dirty = prune(model, data, 0.7, num_grads=30, masks=masks)
    before = snapshot(model)
    assert same(before, snapshot(model))
    blocks, kept = {}, {}
    for name, G in gradients(model, data).items():
        alive = masks[name].flatten()
        blocks[name] = [f[a][:, a] for f, a in zip(fisher_blocks(G, 25, 1e-2), alive.split(25), strict=True) if a.any()]
        kept[name] = alive
    gone = sum(int((~k).sum()) for k in kept.values())
    total = 0.0
    for name, weight in weights(model).items():
        got = dirty.level().weights[name].flatten()
        assert not got[~kept[name]].any()
        living = weight.flatten()[kept[name]]
        after = got[kept[name]]
        position = 0
        for block in blocks[name]:
            part = slice(position, position + len(block))
            total += quadratic_loss(living[part], after[part], [block])
            position += len(block)
    assert dirty.predicted_loss() == pytest.approx(SAMPLES * total, rel=1e-6)
    assert sum(row["zeros"] for row in dirty.layer_report()) == round(0.7 * 91) > gone


def test_obs_scores_the_living_by_themselves() -> None:
    model, data = mlp(), vectors()
    masks = {name: torch.rand(w.shape) > 0.3 for name, w in weights(model).items()}
    result = prune(model, data, 0.7, method="obs", num_grads=30, fisher_block_size=1000, masks=masks)
    scores = {}
    for name, G in gradients(model, data).items():
        alive = masks[name].flatten()
        F_living = fisher_blocks(G, 1000, 1e-2)[0][alive][:, alive]
        score = torch.full(alive.shape, -1.0, dtype=torch.float64)
        score[alive] = weights(model)[name].flatten()[alive] ** 2 / (2 * torch.linalg.inv(F_living).diagonal())
        scores[name] = score
    kept = torch.ones(91, dtype=torch.bool)
    kept[torch.cat(list(scores.values())).argsort()[: round(0.7 * 91)]] = False
    assert torch.equal(torch.cat([m.flatten() for m in result.masks().values()]), kept)


def test_masks_may_be_numbers_and_leave_layers_out() -> None:
    model = conv_net()
    masks = {"0.weight": (torch.rand(4, 3, 3, 3) > 0.2).float()}
    result = prune(model, sparsity=0.5, masks=masks)
    assert not (result.masks()["0.weight"] & (masks["0.weight"] == 0)).any()


def test_zeros_that_no_mask_owns_are_ordinary_weights() -> None:
    model = conv_net()
    with torch.no_grad():
        model[6].weight[0] = 0
    result = prune(model, sparsity=0.05)  # 11 zeros: these 16 are cheapest
    assert int((~result.masks()["6.weight"]).sum()) == round(0.05 * WEIGHTS)


# Recomputation


class Watched(nn.Module):
    """Records how many weights are zero whenever a batch goes through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen or self.seen[-1] != zeros(self.model):
            self.seen.append(zeros(self.model))
        return self.model(x)


@pytest.mark.parametrize(
    ("inter", "shares"),
    [("linear", [0, 0.2, 0.4]), ("cubic", [0, 0.6 * (1 - 8 / 27), 0.6 * (1 - 1 / 27)]), ("geometric", None)],
)
@pytest.mark.parametrize("method", ["cap", "fast_cap", "obs"])
def test_recomputation_climbs(method: str, inter: str, shares: list[float] | None) -> None:
    model, data = Watched(conv_net()), Counted(images())
    before = snapshot(model)
    result = prune(model, data, 0.6, method=method, num_recomputations=3, recomputation_inter_func=inter)
    assert (data.passes, data.drawn) == (3, 36)
    shares = shares or [1 - 0.4 ** (step / 3) for step in range(3)]
    assert model.seen == [round(share * WEIGHTS) for share in shares]
    assert sum(row["zeros"] for row in result.layer_report()) == round(0.6 * WEIGHTS)
    assert same(before, snapshot(model))


def test_recomputation_over_a_list_climbs_from_one_to_the_next() -> None:
    model, data = Watched(conv_net()), Counted(images())
    result = prune(model, data, [0.8, 0.4], num_recomputations=2)
    assert data.passes == 4
    assert model.seen == [round(share * WEIGHTS) for share in (0, 0.2, 0.4, 0.6)]
    for name, mask in result.masks(0.8).items():
        assert not (mask & ~result.masks(0.4)[name]).any()


def test_recomputation_goes_on_with_an_iterator() -> None:
    stream = iter(images(24))
    prune(conv_net(), stream, 0.5, num_recomputations=2)
    assert next(stream, None) is None
    with pytest.raises(ValueError, match=r"calibration data is empty"):
        prune(conv_net(), iter(images(12)), 0.5, num_recomputations=2)


def test_recomputation_helps() -> None:
    # The loss that is measured, not the predicted one: the quadratic model is only right nearby.
    model, data = mlp(), vectors(60)

    def loss(result: capruner.PruningResult) -> float:
        pruned = mlp()
        result.apply(pruned)
        with torch.no_grad():
            return sum(float(F.cross_entropy(pruned(x), y)) for x, y in data) / len(data)

    arguments = {"num_grads": 60, "damp": 1e-4, "fisher_block_size": 1000}
    assert loss(prune(model, data, 0.6, num_recomputations=6, **arguments)) < loss(prune(model, data, 0.6, **arguments))


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.999), st.integers(1, 4), st.sampled_from(["linear", "cubic", "geometric"]), st.integers(0, 91))
def test_the_last_recomputation_ends_exactly(s: float, steps: int, inter: str, gone: int) -> None:
    model = mlp()
    masks = {"0.weight": (torch.arange(63) >= gone).view(7, 9), "2.weight": (torch.arange(28) >= gone - 63).view(4, 7)}
    s = min(max(s, (gone + 0.5) / 91), 0.999)  # on the edge of rounding
    result = prune(
        model, None, s, method="magnitude", masks=masks, num_recomputations=steps, recomputation_inter_func=inter
    )
    assert sum(row["zeros"] for row in result.layer_report()) == round(s * 91)


@pytest.mark.parametrize("fails_at", [1, 5, 17, 35])
def test_the_model_is_restored_when_a_recomputation_fails(fails_at: int) -> None:
    model = conv_net().train()
    before = snapshot(model)
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    with pytest.raises(KeyboardInterrupt):
        capruner.prune(model, images(), loss, 0.6, num_recomputations=3, **SMALL)
    assert same(before, snapshot(model))


# Options


def test_relative_damp_does_not_care_for_the_scale_of_the_loss() -> None:
    small, large = (
        capruner.prune(
            mlp(),
            vectors(),
            lambda o, t, scale=scale: scale * F.cross_entropy(o, t),
            0.6,
            **(SMALL | {"num_grads": 30, "relative_damp": True}),
        )
        for scale in (1, 1000)
    )
    for name, mask in small.masks().items():
        assert torch.equal(large.masks()[name], mask)
        torch.testing.assert_close(large.level().weights[name], small.level().weights[name])


def test_cumulative_score_spreads_the_zeros() -> None:
    results = {score: prune(mlp(), vectors(), 0.5, num_grads=30, score=score) for score in ("marginal", "cumulative")}
    assert not all(torch.equal(m, results["cumulative"].masks()[n]) for n, m in results["marginal"].masks().items())
    assert results["marginal"].predicted_loss() < results["cumulative"].predicted_loss()


def test_inverse_blocks_on_another_device_change_nothing() -> None:
    here, there = prune(conv_net()), prune(conv_net(), fisher_inv_device="cpu")
    assert torch.equal(here.masks()["0.weight"], there.masks()["0.weight"])


def test_params_are_all_that_changes() -> None:
    result = prune(conv_net(), sparsity=0.5, params=["6"])
    assert set(result.masks()) == {"6.weight"}
    model = conv_net()
    first = model[0].weight.clone()
    result.apply(model)
    assert torch.equal(model[0].weight, first)


# What cannot be


def empty() -> list:
    return []


def stream() -> Iterator[tuple[Tensor, Tensor]]:
    return iter(images())


def with_nan() -> list[tuple[Tensor, Tensor]]:
    data = images()
    data[7][0][0, 0, 0, 0] = math.nan
    return data


BAD: list[tuple[dict[str, Any], str]] = [
    ({"params": ["6.wieght"]}, r"'6\.wieght'; the nearest names are 6\.weight"),
    ({"params": "re:blocks.*"}, "no parameter name matches 're:blocks"),
    ({"params": "re:(0|3|8).weight"}, r"the alternative '8' of .* matches no parameter"),
    ({"params": []}, "params is empty"),
    ({"sparsity": 1.0}, r"sparsity must lie in \[0, 1\), got 1"),
    ({"sparsity": -0.1}, r"sparsity must lie in \[0, 1\), got -0\.1"),
    ({"sparsity": 90}, r"sparsity must lie in \[0, 1\), got 90: write 0\.9 for 90 %"),
    ({"sparsity": [0.5, 1.5]}, r"sparsity must lie in \[0, 1\), got 1\.5"),
    ({"sparsity": math.nan}, r"sparsity must lie in \[0, 1\), got nan"),
    ({"sparsity": []}, "list of sparsities is empty"),
    ({"sparsity": {}}, "dict of sparsities is empty"),
    ({"sparsity": {1.5: ["0"]}}, r"sparsity must lie in \[0, 1\), got 1\.5"),
    ({"sparsity": {0.5: ["nothing"]}}, "no parameter or module is called 'nothing'"),
    ({"method": "cab"}, "method must be one of .*'cap'.*got 'cab'"),
    ({"mask_type": "3by4"}, "mask_type must be .*got '3by4'"),
    ({"fisher_block_size": 0}, "fisher_block_size must be a positive integer, got 0"),
    ({"num_grads": 0}, "num_grads must be .*at least 1, got 0"),
    ({"num_grads": 2.5}, "num_grads must be a whole number.*got 2.5"),
    ({"num_grads": 13, "batches": stream}, "ended after 12 batches and cannot be started again, but num_grads is 13"),
    (
        {"num_grads": 49, "batches": stream, "gradients": "sample"},
        "ended after 48 samples and cannot be started again, but num_grads is 49",
    ),
    ({"gradients": "token"}, "gradients must be one of"),
    ({"damp": 0}, "damp must be a positive number, got 0"),
    ({"damp": "tiny"}, "tiny"),
    ({"score": "mean"}, "score must be one of"),
    ({"solver": "magic"}, "solver must be one of"),
    ({"blocks_in_parallel": 0}, "blocks_in_parallel must be .*got 0"),
    ({"blocks_in_parallel": -1}, "blocks_in_parallel must be .*got -1"),
    ({"block_size": 0, "method": "fast_cap"}, "block_size must be .*got 0"),
    ({"num_recomputations": 0}, "num_recomputations must be a whole number, at least 1, got 0"),
    ({"recomputation_inter_func": "square"}, "recomputation_inter_func must be one of .*got 'square'"),
    ({"masks": "ones"}, "masks must be a dict of bool tensors, 'zeros' or None, got 'ones'"),
    ({"masks": {"1.weight": torch.ones(4)}}, r"masks holds 1\.weight, which is not among the selected"),
    ({"masks": {"6.weight": torch.ones(4)}}, r"the mask of 6\.weight has shape \(4,\), the parameter \(3, 16\)"),
    ({"batches": empty}, "calibration data is empty"),
    ({"batches": with_nan}, "the loss of batch 7 is nan"),
    ({"batches": lambda: [x for x, _ in images()]}, "the batch has no targets: pass labels='model'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
def test_bad_input_is_named_and_leaves_the_model_alone(arguments: dict[str, Any], message: str) -> None:
    model = conv_net().train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    arguments = dict(arguments)
    batches = arguments.pop("batches", images)()
    with pytest.raises(ValueError, match=message):
        prune(model, batches, **arguments)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_less_than_is_pruned_already_is_refused_before_any_data_is_drawn(method: str, steps: int) -> None:
    model = conv_net()
    prune(model, sparsity=0.5).apply(model)
    before, data = snapshot(model), Counted(images())
    with pytest.raises(ValueError, match=r"68 weights .*but 114 already are .*ask for a higher sparsity"):
        prune(model, data, 0.3, masks="zeros", method=method, num_recomputations=steps)
    assert data.drawn == 0
    with pytest.raises(ValueError, match=r"already are by an earlier mask"):
        prune(model, data, 0.3, masks="zeros", method=method, global_sparsity=False, num_recomputations=steps)
    assert same(before, snapshot(model))


def test_frozen_parameters() -> None:
    model = conv_net().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen .*0\.weight.*requires_grad_\(True\)"):
        prune(model)


def test_calibration_without_data() -> None:
    with pytest.raises(ValueError, match="method 'cap' needs calibration data: give `batches`"):
        capruner.prune(conv_net(), None)


def test_a_model_without_anything_to_prune() -> None:
    with pytest.raises(ValueError, match="holds no Linear, convolution"):
        prune(nn.Sequential(nn.BatchNorm2d(3)))


@pytest.mark.parametrize("method", ["cap", "obs"])
def test_a_fisher_block_that_will_not_factor_names_the_layer_and_a_damping(method: str) -> None:
    model = nn.Linear(40, 5)
    data = [(torch.randn(1, 40), None)] * 8  # one direction: float32 cannot see a damping of 1e-20 beside it
    before = snapshot(model)
    with pytest.raises(capruner.NotPositiveDefiniteError, match=r"weight: Fisher block \d+ .*damp 1e-20.*try damp="):
        capruner.prune(
            model,
            data,
            lambda outputs, _: outputs.sum(),
            method=method,
            solver="accumulate",
            **(SMALL | {"num_grads": 8, "damp": 1e-20, "fisher_block_size": 100}),
        )
    assert same(before, snapshot(model))


def test_weights_that_half_precision_cannot_hold_are_refused() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.float16)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[6e4, 6e4]]))
    # Both gradients are alike: what one weight gives up the other takes, and 1.2e5 is beyond float16.
    data = [(torch.full((1, 2), 1e-3, dtype=torch.float16), torch.zeros(1))] * 4
    with pytest.raises(ValueError, match=r"the pruned weights of weight are not finite in torch\.float16"):
        capruner.prune(model, data, lambda o, t: o.float().sum(), 0.5, **(SMALL | {"num_grads": 4, "damp": 1e-12}))


@pytest.mark.parametrize("method", ["cap", "obs", "fast_cap"])
def test_weights_that_the_loss_does_not_feel_leave_first(method: str) -> None:
    """Without an absolute damp nothing else gives blocks of zero gradient a scale: they must be the cheapest, not the dearest."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.felt, self.idle, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            nn.init.constant_(self.idle.weight, 2.0)  # large: by magnitude they would be the last

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.felt(x)) + 0 * self.idle(x))

    model = Net()
    data = [(torch.randn(4, 16), torch.randint(3, (4,))) for _ in range(40)]
    result = capruner.prune(
        model,
        data,
        nn.functional.cross_entropy,
        0.5,
        method=method,
        params=["felt.weight", "idle.weight"],
        num_grads=40,
        fisher_block_size=16,
        progress=False,
    )
    assert not result.masks(0.5)["idle.weight"].any()
    assert result.masks(0.5)["felt.weight"].all()


def test_the_predicted_loss_of_recomputations_is_the_sum_over_their_steps() -> None:
    model, data = mlp(), vectors()
    arguments = {"num_grads": 30, "num_recomputations": 2, "recomputation_inter_func": "linear"}
    both = prune(model, data, 0.8, **arguments)
    first = prune(model, data, 0.4, num_grads=30)
    halfway = copy.deepcopy(model)
    first.apply(halfway)
    second = prune(halfway, data, 0.8, num_grads=30, masks=first.masks())
    assert same_weights(both, second)
    for name, loss in both.level().losses.items():
        assert loss == pytest.approx(first.level().losses[name] + second.level().losses[name])


def same_weights(one: capruner.PruningResult, other: capruner.PruningResult) -> bool:
    return all(torch.equal(weight, other.level().weights[name]) for name, weight in one.level().weights.items())


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_predicted_loss_does_not_depend_on_how_samples_are_batched(size: int) -> None:
    """Of gradients that are independent of each other, as those to labels from the model are."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    x = torch.randn(4096, 6, dtype=torch.float64)
    batches = [(part, None) for part in x.split(size)]
    arguments = {"labels": "model", "damp": 1e-6, "fisher_block_size": 24, "num_grads": 4096 // size}
    predicted = prune(model, batches, 0.5, **arguments).predicted_loss()
    single = prune(model, [(part, None) for part in x.split(1)], 0.5, **(arguments | {"num_grads": 4096}))
    assert predicted == pytest.approx(single.predicted_loss(), rel=0.15)


@pytest.mark.promise("Numbers", "Absolute damping below the float32 rounding error of a Fisher block is warned of")
def test_absolute_damping_below_the_rounding_of_the_fisher_matrix_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = [(torch.randn(3, 4), torch.randint(3, (3,))) for _ in range(64)]
    prune(model, data, num_grads=64, fisher_block_size=4, damp=1e-3)
    assert "rounding" not in caplog.text
    prune(model, data, num_grads=64, fisher_block_size=4, damp=1e-12)
    assert "weight: damp=1e-12 is below the float32 rounding error of 3 of 3 Fisher blocks" in caplog.text


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("cap", ["gradients", "inverting, eliminating", "re-fitting weights"]),
        ("fast_cap", ["gradients", "inverting", "choosing weights", "re-fitting weights"]),
    ],
)
def test_every_stage_that_can_take_long_has_a_bar(
    method: str, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capruner.methods.base.PATIENCE", 0)
    for progress in (True, False):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        capruner.prune(
            mlp(), vectors(), F.cross_entropy, 0.5, method=method, num_grads=8, global_sparsity=True, progress=progress
        )
        seen = re.findall(r"([a-z][a-z, -]*):  ", terminal.getvalue())
        assert list(dict.fromkeys(seen)) == (stages if progress else [])
