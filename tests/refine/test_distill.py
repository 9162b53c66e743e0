"""Distillation: its loss and steps against the definitions, masks that hold, and that it leaves no other trace."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import run
from torch import Tensor, nn
from untouched import same, snapshot

import capruner
from capruner.calibration.memory_plan import WORKING_SET
from capruner.checkpoint import run as checkpoint_run
from capruner.distributed import processes
from capruner.refine import training
from capruner.refine.distill import collect, inputs_of
from capruner.refine.training import _Training


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def data(count: int = 60, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 12, generator=generator).to(dtype), torch.randint(4, (4,), generator=generator))
        for _ in range(count)
    ]


ARGUMENTS: dict[str, Any] = {"num_grads": 40, "fisher_block_size": 48, "damp": 1e-3, "progress": False}


def prune(
    model: nn.Module, batches: Any, sparsity: Any = 0.7, passes: float = 2.0, **more: Any
) -> capruner.PruningResult:
    return capruner.prune(model, batches, sparsity=sparsity, distill_passes=passes, **(ARGUMENTS | more))


def pruned(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = net(dtype)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[layer.weight.abs() < 0.15] = 0
    return model


def textbook(model: nn.Module, dense: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """KL(dense ‖ model), written out."""
    x = torch.cat([inputs for inputs, _ in batches])
    p, q = dense(x).detach().softmax(1), model(x).softmax(1)
    return (p * (p.log() - q.log())).sum() / len(x)


def test_the_loss_is_the_divergence_and_the_steps_are_those_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float64
    monkeypatch.setattr(training, "STEP", 8)
    dense, model, expected = net(dtype), pruned(dtype), pruned(dtype)
    batches = data(6, dtype)
    keep = {name: p.detach() != 0 for name, p in expected.named_parameters()}
    said = capruner.distill(model, dense, batches, passes=2, lr=1e-2, progress=False)
    assert said.before == pytest.approx(float(textbook(expected, dense, batches).detach()), rel=1e-9)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(6):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(step // 3))[step % 3 * 2 :][:2]
        optimizer.param_groups[0]["lr"] = 1e-2 * min((step + 1) / 0.6, (1 + math.cos(math.pi * step / 6)) / 2)
        optimizer.zero_grad()
        textbook(expected, dense, [batches[i] for i in order]).backward()
        optimizer.step()
        with torch.no_grad():
            for name, p in expected.named_parameters():
                p.mul_(keep[name])
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)
    assert said.steps == 6
    assert said.after == pytest.approx(float(textbook(expected, dense, batches).detach()), rel=1e-9)
    assert said.after < said.before


def test_nothing_but_the_weights_is_touched() -> None:
    model, dense = pruned(), net().eval()
    model[1] = nn.Dropout(0.5)
    model.add_module("norm", nn.BatchNorm1d(4))
    dense.add_module("norm", nn.BatchNorm1d(4))
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, of_dense, random = snapshot(model), snapshot(dense), torch.get_rng_state()
    zeros, frozen = [p == 0 for p in model.parameters()], model[4].weight.clone()
    shuffled = torch.utils.data.DataLoader([(x[0], y[0]) for x, y in data(100)], batch_size=5, shuffle=True)
    capruner.distill(model, dense, shuffled, passes=3, progress=False)
    assert torch.equal(random, torch.get_rng_state())
    assert same(of_dense, snapshot(dense))
    after = snapshot(model)
    assert not same(before[3], after[3])
    assert same(before[:3] + before[4:], after[:3] + after[4:])
    assert torch.equal(model[4].weight, frozen)
    for p, mask in zip(model.parameters(), zeros, strict=True):
        if p.dim() > 1:
            assert torch.equal(p == 0, mask)


CASES: dict[str, dict[str, Any]] = {
    "cap": {},
    "obs": {"method": "obs"},
    "fast_cap": {"method": "fast_cap"},
    "magnitude": {"method": "magnitude"},
    "samples": {"gradients": "sample", "num_grads": 160},
    "recomputations": {"num_recomputations": 3},
    "labels of the model": {"labels": "model"},
    "each layer its own": {"global_sparsity": False},
    "2:4": {"sparsity": 0.5, "mask_type": "2:4"},
    "block4": {"mask_type": "block4"},
    "groups of layers": {"memory_budget": WORKING_SET + 16 * 16 * (48 + 6 + 8) * 4 + 12_000},
    "a part of a pass": {"passes": 0.5},
    "half precision": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_masks_stay_the_divergence_falls_and_apply_gives_the_distilled_network(case: str, tmp_path: Path) -> None:
    more = dict(CASES[case])
    sparsity, dtype = more.pop("sparsity", [0.5, 0.8]), more.pop("dtype", torch.float32)
    model, batches = net(dtype), data(dtype=dtype)
    before = snapshot(model)
    result = prune(model, batches, sparsity, **more)
    assert same(before, snapshot(model))
    plain = prune(model, batches, sparsity, **(more | {"passes": 0}))
    result.save(tmp_path / "r.safetensors")
    loaded = capruner.load_result(tmp_path / "r.safetensors")
    for s, said in zip(result.sparsities, result.settings["distill"], strict=True):
        assert said["after"] < said["before"]
        assert said["sparsity"] == s
        assert set(result.level(s).others) == {"0.bias", "2.bias", "4.bias"}
        assert result.layer_report(s) == plain.layer_report(s)
        assert result.model_sparsity(s) == plain.model_sparsity(s)
        start, end, again = net(dtype), net(dtype), net(dtype)
        plain.apply(start, s)
        result.apply(end, s)
        loaded.apply(again, s)
        assert same(list(end.state_dict().values()), list(again.state_dict().values()))
        for name, mask in plain.masks(s).items():
            assert torch.equal(result.masks(s)[name], mask)
            assert not dict(end.named_parameters())[name][~mask].any()
        for end_, key in ((start, "before"), (end, "after")):
            found = float(
                textbook(end_.float(), net(dtype).float(), batches if dtype == torch.float32 else data()).detach()
            )
            assert found == pytest.approx(said[key], rel=0.1 if dtype == torch.bfloat16 else 1e-3)
    assert result.timings["distill"] > 0
    assert "distill" not in plain.timings


def test_prune_does_what_distill_does() -> None:
    result, model = prune(net(), data()), net()
    capruner.prune(net(), data(), sparsity=0.7, **ARGUMENTS).apply(model)
    said = capruner.distill(model, net(), data(), passes=2, progress=False)
    again = net()
    result.apply(again)
    assert same(list(again.parameters()), list(model.parameters()))
    assert result.settings["distill"] == [{"sparsity": 0.7} | vars(said)]
    assert result.settings["distill_passes"] == 2.0


def test_an_iterator_that_ends_with_the_calibration_is_trained_on_again() -> None:
    a, b = prune(net(), iter(data(40))), prune(net(), data(40))
    assert same(list(a.level().weights.values()), list(b.level().weights.values()))


def test_zeros_of_layers_that_are_not_pruned_now_stay_zero() -> None:
    model = net()
    capruner.prune(model, data(), sparsity=0.6, params="0.weight", **ARGUMENTS).apply(model)
    zeros = model[0].weight == 0
    prune(model, data(), params="2.weight").apply(model)
    assert torch.equal(model[0].weight == 0, zeros)


def test_the_learning_rate_is_the_best_of_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "TRIAL", 10**6)  # trials as long as the training, so they end alike
    said = capruner.distill(pruned(), net(), data(), progress=False)
    tried = {
        lr: capruner.distill(pruned(), net(), data(), lr=lr, progress=False).after for lr in training.LEARNING_RATES
    }
    place = training.LEARNING_RATES.index(said.lr)
    assert said.after == tried[said.lr]
    assert said.after <= min(list(tried.values())[max(place - 1, 0) : place + 2])


def test_where_it_does_harm_the_weights_are_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    model = pruned()
    with caplog.at_level(logging.WARNING):
        said = capruner.distill(model, net(), data(), lr=10.0, progress=False)
    assert said.after == said.before
    assert "distillation did not help" in caplog.text
    assert same(list(model.parameters()), list(pruned().parameters()))


class Named(nn.Module):
    """Outputs and inputs as Hugging Face has them."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.body, self.plain = pruned(), plain

    def forward(self, pixel_values: Tensor) -> Any:
        logits = self.body(pixel_values)
        return {"logits": logits, "loss": None} if self.plain else SimpleNamespace(logits=logits)


@pytest.mark.parametrize("plain", [False, True])
def test_outputs_with_logits(plain: bool) -> None:
    model, dense = Named(plain), Named(plain)
    dense.body = net()
    said = capruner.distill(model, dense, [{"pixel_values": x} for x, _ in data()], progress=False)
    expected = pruned()
    assert vars(said) == vars(capruner.distill(expected, net(), data(), progress=False))
    assert same(list(model.parameters()), list(expected.parameters()))


def scaled(factor: float) -> nn.Sequential:
    model = pruned()
    with torch.no_grad():
        model[4].weight.mul_(factor)
    return model


MODEL = pruned()
MISTAKES: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], dict[str, Any], str]] = {
    "no model": (lambda: (3, net(), data()), {}, "model must be a torch.nn.Module, got 3"),
    "no dense": (lambda: (pruned(), None, data()), {}, "dense must be a torch.nn.Module, got None"),
    "the same": (lambda: (MODEL, MODEL, data()), {}, "share parameters: prune a copy"),
    "other classes": (lambda: (pruned(), net()[:4], data()), {}, r"shape \(4, 4\), those of the dense network \(4, 16\)"),
    "no logits": (lambda: (pruned(), nn.Sequential(net(), nn.Flatten(0)), data()), {}, r"from logits \(batch, classes\).* gave float32 \(16,\)"),
    "no batches": (lambda: (pruned(), net(), []), {}, "nothing to distill from"),
    "no pairs": (lambda: (pruned(), net(), [1]), {}, "batch 0 is int, which is neither"),
    "bad data": (lambda: (pruned(), net(), [(torch.full((4, 12), torch.nan), None)]), {}, "outputs hold NaN or Inf on batch 0"),
    "bad weights": (lambda: (scaled(torch.inf), net(), data()), {}, "divergence .* is nan; look at the pruned weights"),
    "lr": (lambda: (pruned(), net(), data()), {"lr": 0}, "lr must be a positive number, got 0"),
    "passes": (lambda: (pruned(), net(), data()), {"passes": -1}, "passes must be a positive number, got -1"),
    "samples": (lambda: (pruned(), net(), data()), {"samples": 0.5}, "samples must be a whole number, at least 1, got 0.5"),
    "frozen": (lambda: (pruned().requires_grad_(False), net(), data()), {}, "no parameter of the model requires a gradient"),
    "other mask": (lambda: (pruned(), net(), data()), {"masks": {"x": torch.ones(1)}}, "masks: no parameter .* 'x'"),
    "diverges": (lambda: (scaled(1e37), net(), data()), {"lr": 3e37}, r"at step \d+ of .* use a smaller one, capruner.distill\(..., lr=3e\+36\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_and_the_model_is_as_it_was(case: str) -> None:
    make, more, message = MISTAKES[case]
    model, dense, batches = make()
    before = snapshot(model) if isinstance(model, nn.Module) else None
    with pytest.raises(ValueError, match=message):
        capruner.distill(model, dense, batches, **({"progress": False} | more))
    assert before is None or same(before, snapshot(model))


def test_prune_refuses_before_the_calibration() -> None:
    seen = 0

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return outputs.sum()

    model = nn.Sequential(net(), nn.Flatten(0))
    with pytest.raises(ValueError, match="distillation compares class probabilities"):
        prune(model, data(), loss_fn=loss)
    assert seen == 0
    with pytest.raises(ValueError, match="distill_passes=1 needs data: give `batches`"):
        prune(net(), None, passes=1, method="magnitude")


# Several processes, and kills


def in_processes(rank: int, size: int) -> dict[str, Any]:
    mine = data(64)[rank::size]
    model = pruned()
    said = capruner.distill(model, net(), mine, passes=2, lr=3e-3, progress=False)
    result = prune(net(), mine, num_grads=32)
    values = {**result.level().weights, **result.level().others}
    return {
        "distill": dict(model.named_parameters()),
        "prune": values,
        "said": vars(said),
        "notes": result.settings["distill"],
    }


@pytest.mark.promise("Several processes", "Distillation on two processes ends with identical bytes on both")
def test_two_processes_end_with_the_same_bytes(tmp_path: Path) -> None:
    one, other = run(2, tmp_path / "ranks", in_processes)
    assert same(
        [list(one[key].values()) for key in ("distill", "prune")],
        [list(other[key].values()) for key in ("distill", "prune")],
    )
    assert (one["said"], one["notes"]) == (other["said"], other["notes"])
    assert one["said"]["after"] < one["said"]["before"]
    assert one["notes"][0]["after"] < one["notes"][0]["before"]


class Killed(BaseException):
    pass


class Stream:
    """Batches that go on from pass to pass."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(4, 12, generator=self.generator), torch.randint(4, (4,), generator=self.generator)


@pytest.mark.promise("Resume", "A distillation that is killed resumes with bit-identical results")
@pytest.mark.parametrize("source", [Stream, lambda: iter(data(200)), data])
def test_killed_again_and_again_it_ends_with_the_same_bits(
    source: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_run, "SAVE_EVERY", 0.0)
    monkeypatch.setattr("capruner.refine.levels.SAMPLES", 200)
    more = {"sparsity": [0.5, 0.8], "num_recomputations": 2, "passes": 4}
    expected = prune(net(), source(), **more)
    advance, left, kills = _Training.advance, 0, 0

    def killed(self: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        advance(self)

    monkeypatch.setattr(_Training, "advance", killed)
    while True:
        left = 10
        model = net()
        before = snapshot(model)
        try:
            found = prune(model, source(), state_dir=tmp_path / "state", **more)
            break
        except Killed:
            kills += 1
            assert same(before, snapshot(model))
            assert kills < 20
    assert kills >= 2
    for a, b in zip(found.levels, expected.levels, strict=True):
        assert same([*a.weights.values(), *a.others.values()], [*b.weights.values(), *b.others.values()])
    assert found.settings == expected.settings


def test_other_data_is_refused_when_it_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_run, "SAVE_EVERY", 0.0)
    advance = _Training.advance

    def killed(self: Any) -> None:
        if self.step > 5:
            raise Killed
        advance(self)

    monkeypatch.setattr(_Training, "advance", killed)
    other = [(x + 1, y) for x, y in data()]
    with pytest.raises(Killed):
        prune(net(), data(), state_dir=tmp_path)
    with pytest.raises(ValueError, match="batch 0 of the calibration data differs"):
        prune(net(), other, state_dir=tmp_path)


def test_samples_are_counted_over_all_batches() -> None:
    lessons = collect(net(), inputs_of(data(), None), processes(), 10)
    assert [len(lesson.target) for lesson in lessons] == [4, 4, 4]
    bad = copy.deepcopy(data(6))
    bad[1][0][0, 0] = torch.nan
    assert len(collect(net(), inputs_of(bad, None), processes(), 100, skip_bad=True)) == 5
