from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import capruner


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 6)).double()


def data(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    mix = torch.randn(24, 24, dtype=torch.float64)
    return [(torch.randn(2, 24, dtype=torch.float64) @ mix, torch.randint(6, (2,))) for _ in range(count)]


def shared_fisher(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], name: str, B: int, damp: float
) -> tuple[Tensor, Tensor]:
    """The layer's Fisher block ``(B, B)``, and each block's share of it ``(n,)``."""
    parameter = dict(model.named_parameters())[name]
    total = torch.zeros(B, B, dtype=torch.float64)
    squares = torch.zeros(parameter.numel() // B, dtype=torch.float64)
    for x, y in batches:
        g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameter)[0].reshape(-1, B)
        total += g.mT @ g / len(g)
        squares += g.square().sum(dim=1)
    F = total / len(batches)
    scales = (squares / squares.mean() + damp) / (1 + damp)
    return F + damp * F.diagonal().mean() * torch.eye(B, dtype=torch.float64), scales


def run(model: nn.Module, s: float | list[float] | dict = 0.6, **more: object) -> capruner.PruningResult:
    arguments = {
        "method": "fast_cap",
        "num_grads": 64,
        "fisher_block_size": 24,
        "damp": 1e-2,
        "global_sparsity": False,
        "progress": False,
    }
    return capruner.prune(model, data(), nn.functional.cross_entropy, s, **(arguments | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [1, 5, 24])
def test_the_sweep_is_the_textbook_column_by_column(block_size: int) -> None:
    model = net()
    weight = run(model, block_size=block_size).level().weights["0.weight"].view(-1, 24)
    mask = run(model, block_size=block_size).masks()["0.weight"].view(-1, 24)
    F, _ = shared_fisher(model, data(), "0.weight", 24, 1e-2)
    W = model[0].weight.detach().reshape(-1, 24).clone()
    # Left to right: remove the column's weights that the mask removes, re-fit the columns to the right by the inverse Fisher matrix of those left.
    for i in range(24):
        H = torch.linalg.inv(F[i:, i:])
        gone = ~mask[:, i]
        W[gone, i:] -= (W[gone, i] / H[0, 0])[:, None] * H[0]
        W[gone, i] = 0
    torch.testing.assert_close(weight, W, rtol=1e-7, atol=1e-10)


def best(F: Tensor, w: Tensor, gone: Tensor) -> Tensor:
    """The weights of one block with the least quadratic loss among those that are 0 where ``gone``."""
    W = torch.zeros_like(w)
    W[~gone] = torch.linalg.solve(F[~gone][:, ~gone], F[~gone] @ w)
    return W


@pytest.mark.parametrize("mask_type", ["unstructured", "2:4"])
def test_the_weights_that_remain_are_almost_the_best_for_their_mask(mask_type: str) -> None:
    model = net()
    result = run(model, 0.5, mask_type=mask_type)
    F, scales = shared_fisher(model, data(), "0.weight", 24, 1e-2)
    dense = model[0].weight.detach().reshape(-1, 24)
    least = torch.stack([best(F, w, ~keep) for w, keep in zip(dense, result.masks()["0.weight"].view(-1, 24))])
    deltas = least - dense, result.level().weights["0.weight"].view(-1, 24) - dense
    bound, loss = (float(0.5 * (scales * ((delta @ F) * delta).sum(dim=1)).sum()) for delta in deltas)
    assert bound <= loss <= 1.05 * bound
    assert result.level().losses["0.weight"] == pytest.approx(2 * loss, rel=1e-6)


@pytest.mark.parametrize("block_size", [None, 5])
def test_the_last_block_of_a_layer_is_shorter_and_knows_it(block_size: int | None) -> None:
    """32 · 24 weights in blocks of 100 leave 68 to the last one, which the columns beyond have no part in."""
    model, real, damp = net(), 32 * 24 % 100, 0.1
    result = run(model, 0.5, fisher_block_size=100, block_size=block_size, damp=damp)
    weight = model[0].weight.detach().flatten()
    total, squares = torch.zeros(100, 100, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for x, y in data():
        g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model[0].weight)[0].flatten()
        g = torch.cat([g, torch.zeros(100 - real, dtype=torch.float64)]).view(8, 100)
        total += g.mT @ g / 8 / 64
        squares += g.square().sum(dim=1)
    F = (total + damp * total.diagonal().mean() * torch.eye(100, dtype=torch.float64))[:real, :real]
    W = weight[-real:].clone()
    gone = ~result.masks()["0.weight"].flatten()[-real:]
    assert 0 < int(gone.sum()) < real
    found = result.level().weights["0.weight"].flatten()[-real:]
    if block_size is None:
        bound, loss = (float((d - weight[-real:]) @ F @ (d - weight[-real:])) for d in (best(F, W, gone), found))
        assert bound * (1 - 1e-9) <= loss <= 1.1 * bound
        return
    for i in range(real):
        H = torch.linalg.inv(F[i:, i:])
        if gone[i]:
            W[i:] -= W[i] / H[0, 0] * H[0]
    torch.testing.assert_close(found, W, rtol=1e-7, atol=1e-10)


def test_it_is_not_magnitude_pruning_and_its_quadratic_loss_is_lower_in_every_layer() -> None:
    model = net()
    fast, magnitude = run(model), run(model, method="magnitude")
    for name in ("0.weight", "2.weight"):
        F, scales = shared_fisher(model, data(), name, 24, 1e-2)
        start = dict(model.named_parameters())[name].detach().reshape(-1, 24)
        loss = {}
        for result in (fast, magnitude):
            delta = result.level().weights[name].reshape(-1, 24) - start
            loss[result.method] = float(0.5 * (scales * ((delta @ F) * delta).sum(dim=1)).sum())
        assert loss["fast_cap"] < loss["magnitude"]
        # The Fisher matrix of single samples: that of means over two is half of it.
        assert fast.level().losses[name] == pytest.approx(2 * loss["fast_cap"], rel=1e-6)
        kept = fast.masks()[name]
        assert not torch.equal(fast.level().weights[name][kept], dict(model.named_parameters())[name].detach()[kept])


def test_layers_meet_their_own_targets_exactly() -> None:
    result = run(net(), {0.3: ["0.weight"], 0.81: ["2.weight"]})
    assert [row["zeros"] for row in result.layer_report()] == [round(0.3 * 768), round(0.81 * 192)]


@pytest.mark.parametrize("block_size", [None, 7])
def test_dead_weights_anywhere_are_counted_and_stay_dead(block_size: int | None) -> None:
    model = net()
    masks = {"0.weight": torch.ones(32, 24, dtype=torch.bool)}
    masks["0.weight"][:, [3, 17, 20, 21, 22, 23]] = False
    result = run(model, 0.5, masks=masks, block_size=block_size)
    mask = result.masks()["0.weight"]
    assert not (mask & ~masks["0.weight"]).any()
    assert int((~mask).sum()) == 384
    with pytest.raises(ValueError, match="already are by an earlier mask"):
        run(model, 0.1, masks=masks)


def test_one_calibration_serves_a_list() -> None:
    batches = data()
    drawn = 0

    def counted() -> object:
        nonlocal drawn
        for item in batches:
            drawn += 1
            yield item

    result = capruner.prune(
        net(),
        counted(),
        sparsity=[0.5, 0.75, 0.9],
        method="fast_cap",
        num_grads=64,
        damp=1e-2,
        fisher_block_size=24,
        progress=False,
    )  # type: ignore[arg-type]
    assert drawn == 64
    assert result.sparsities == [0.5, 0.75, 0.9]
    single = run(net(), 0.75, global_sparsity=True)
    assert torch.equal(single.masks()["0.weight"], result.masks(0.75)["0.weight"])


def test_padding() -> None:
    result = run(net(), 0.5, fisher_block_size=50)  # neither 768 nor 192 is a multiple of 50
    assert [row["zeros"] for row in result.layer_report()] == [384, 96]


def test_damping_that_is_too_small_is_told_as_a_share() -> None:
    layer = torch.nn.Linear(64, 30)
    data = [(torch.randn(4, 64), torch.randint(0, 30, (4,))) for _ in range(8)]
    arguments = {"num_grads": 8, "fisher_block_size": 192, "damp": 1e-8, "progress": False}
    loss = torch.nn.functional.cross_entropy
    with pytest.raises(ValueError, match=r"damp is relative to the mean squared gradient; try damp=0\.001 or more"):
        capruner.prune(layer, data, loss, 0.5, method="fast_cap", **arguments)
    capruner.prune(layer, data, loss, 0.5, method="fast_cap", **(arguments | {"damp": 1e-3}))


@pytest.fixture(scope="module", params=[0.05, 0.2])
def correlated(request: pytest.FixtureRequest) -> Callable[..., capruner.PruningResult]:
    """Two layers at 75 %; the inputs of the first are almost copies of each other: one weight is made up for by the rest, most of them together are not."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)).double()
    mix = torch.randn(2, 24, dtype=torch.float64)
    inputs = [torch.randn(2, 2, dtype=torch.float64) @ mix for _ in range(64)]
    batches = [(x + request.param * torch.randn(2, 24, dtype=torch.float64), torch.randint(6, (2,))) for x in inputs]

    def pruned(target: float | dict, **more: object) -> capruner.PruningResult:
        return capruner.prune(
            model,
            batches,
            nn.functional.cross_entropy,
            target,
            method="fast_cap",
            params=["0.weight", "2.weight"],
            num_grads=64,
            damp=1e-2,
            fisher_block_size=24,
            progress=False,
            **more,
        )  # type: ignore[arg-type]

    return pruned


def test_choosing_in_steps_loses_less_than_in_one_sweep(correlated: Callable[..., capruner.PruningResult]) -> None:
    steps, sweep = (correlated(0.75, global_sparsity=False, block_size=size) for size in (None, 24))
    assert steps.predicted_loss() < 0.6 * sweep.predicted_loss()


def test_one_target_is_shared_out_about_as_well_as_in_the_best_of_many_splits(
    correlated: Callable[..., capruner.PruningResult],
) -> None:
    zeros = 2 * 432
    splits = [{k / 576: ["0.weight"], (zeros - k) / 576: ["2.weight"]} for k in range(336, 576, 48) if 2 * k != zeros]
    best = min(correlated(split, global_sparsity=False).predicted_loss() for split in splits)
    result = correlated(0.75)
    assert sum(row["zeros"] for row in result.layer_report()) == zeros
    assert result.predicted_loss() < 1.2 * best
