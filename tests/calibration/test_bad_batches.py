"""NaN and Inf in data, weights and gradients: the run stops there, or leaves out just what is bad and says how much that was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from interruptions import net
from torch import Tensor, nn
from untouched import same, snapshot

import capruner
from capruner.calibration.finite import BadBatchError

ARGUMENTS: dict[str, Any] = {"sparsity": 0.5, "num_grads": 24, "fisher_block_size": 72, "damp": 1e-3, "progress": False}
loss = nn.functional.cross_entropy


def data(count: int, bad: Sequence[int] = (), row: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = [
        (torch.randn(4, 20, generator=generator), torch.randint(5, (4,), generator=generator)) for _ in range(count)
    ]
    for index in bad:
        found[index][0][row] = torch.nan
    return found


def weights(result: capruner.PruningResult) -> list[Tensor]:
    return list(result.level().weights.values())


@pytest.mark.promise("Numbers", '`on_bad_batch="skip"` leaves bad batches out, counts them and warns')
def test_a_skipped_batch_is_as_if_it_had_never_been(caplog: pytest.LogCaptureFixture) -> None:
    bad = (0, 7, 20)
    with caplog.at_level(logging.WARNING, "capruner"):
        found = capruner.prune(net(), data(27, bad), loss, on_bad_batch="skip", **ARGUMENTS)
    clean = [batch for index, batch in enumerate(data(27)) if index not in bad]
    assert same(weights(found), weights(capruner.prune(net(), clean, loss, **ARGUMENTS)))
    assert found.settings["skipped_batches"] == 3
    assert "skipped 3 of 27 calibration batches for NaN or Inf: 0, 7, 20" in caplog.text


def test_of_samples_only_the_bad_ones_go() -> None:
    found = capruner.prune(
        net(), data(7, (2,), slice(1, 2)), loss, on_bad_batch="skip", gradients="sample", **ARGUMENTS
    )
    x, y = (torch.cat(part) for part in zip(*data(7)))
    stays = torch.arange(28) != 9
    clean = capruner.prune(net(), [(x[stays], y[stays])], loss, gradients="sample", **ARGUMENTS)
    assert found.settings["skipped_batches"] == 1
    for one, other in zip(weights(found), weights(clean)):  # slabs are cut elsewhere, which moves the last bits
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.promise("Numbers", "If most batches are bad, that is an error")
def test_too_many_bad_batches_are_an_error_at_once() -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(
        BadBatchError, match=r"1\d of the first 1\d batches are bad, too many to skip; the last one: the loss"
    ):
        capruner.prune(model, data(100, range(1, 100)), loss, on_bad_batch="skip", **ARGUMENTS)
    assert same(snapshot(model), before)


def test_a_loader_that_ends_says_how_many_were_skipped() -> None:
    with pytest.raises(ValueError, match=r"ended after 21 batches \(3 bad batches were skipped\) and cannot be"):
        capruner.prune(net(), iter(data(24, (1, 2, 3))), loss, on_bad_batch="skip", **ARGUMENTS)


@pytest.mark.promise(
    "Numbers", "NaN or Inf in data, loss or gradients stops the run and names batch and layer; the model is unchanged"
)
def test_by_default_the_first_bad_batch_ends_the_run() -> None:
    with pytest.raises(BadBatchError, match="the loss of batch 5 is nan: its inputs hold NaN or Inf"):
        capruner.prune(net(), data(30, (5,)), loss, **ARGUMENTS)
    with pytest.raises(ValueError, match=r"on_bad_batch must be one of \['raise', 'skip'\], got 'ignore'"):
        capruner.prune(net(), data(30), loss, on_bad_batch="ignore", **ARGUMENTS)  # type: ignore[arg-type]


@pytest.mark.promise("Numbers", "NaN or Inf in weights or buffers is refused before any work")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["cap", "fast_cap", "obs", "magnitude"])
def test_a_broken_model_is_refused_before_the_work(value: float, method: str) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[3, 5] = value
    with pytest.raises(ValueError, match=r"2\.weight holds NaN or Inf in 1 of 744 places: the model is broken"):
        capruner.prune(model, data(24), loss, method=method, **ARGUMENTS)


@pytest.mark.promise("Numbers", "NaN or Inf in weights or buffers is refused before any work")
def test_a_broken_buffer_is_refused_too() -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    model[1].running_var[0] = torch.nan
    with pytest.raises(ValueError, match=r"1\.running_var holds NaN or Inf"):
        capruner.prune(model, data(24), loss, **ARGUMENTS)


def test_a_bad_gradient_behind_a_finite_loss_is_skipped() -> None:
    def root(outputs: Tensor, targets: Tensor) -> Tensor:  # the slope of a root at 0 is infinite
        zero = (outputs - outputs.detach()).abs().sum() if targets[0] == 0 else outputs.new_ones(())
        return loss(outputs, targets) + zero.sqrt()

    found = data(60)
    spoiled = [index for index, (_, y) in enumerate(found) if y[0] == 0]
    with pytest.raises(BadBatchError, match=rf"the gradient of .* holds NaN or Inf in batch {spoiled[0]}:"):
        capruner.prune(net(), found, root, **ARGUMENTS)
    result = capruner.prune(net(), found, root, on_bad_batch="skip", **ARGUMENTS)
    good = [batch for batch in found if batch[1][0] != 0]
    assert same(weights(result), weights(capruner.prune(net(), good, root, **ARGUMENTS)))
    assert result.settings["skipped_batches"] > 0
