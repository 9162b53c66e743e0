"""A GPU whose memory ends: chunks are halved until they fit, the result is the same, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interruptions import Data, net
from torch import Tensor

import capruner
from capruner.core import elimination as obs
from capruner.core import fisher, patterns
from capruner.core import parallel as chunks
from capruner.core.parallel import in_chunks

GPU = torch.device("cuda")


def small_gpu(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, room: int) -> list[int]:
    """Let a function run out of memory where its first tensor has more than ``room`` blocks; the sizes asked for."""
    asked: list[int] = []
    original: Callable[..., Any] = getattr(place, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        asked.append(len(first))
        if len(first) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, limited)
    return asked


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fisher, obs, patterns):
        monkeypatch.setattr(module, "in_chunks", lambda *args: chunks.in_chunks(*args[:-1], GPU))


def weights(**more: Any) -> list[Tensor]:
    data = Data()
    arguments: dict[str, Any] = {"num_grads": 40, "fisher_block_size": 24, "damp": 1e-3, "progress": False} | more
    result = capruner.prune(net(), data, data.loss, 0.5, **arguments)
    return list(result.level().weights.values())


CASES: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "elimination": (obs, "_eliminate_chunk", {}, "eliminating blocks"),
    "groups": (patterns, "_eliminate_groups_chunk", {"mask_type": "block4", "params": ["0.weight", "4.weight"]}, "eliminating groups"),
    "solve": (obs, "_factor", {}, "solving blocks"),
    "inverse": (fisher.BlockFisher, "_invert", {}, "inverting Fisher blocks"),
    "woodbury": (fisher.BlockFisher, "_invert_gradients", {"num_grads": 16}, "inverting Fisher blocks"),
}  # fmt: skip


@pytest.mark.promise("Memory", "Out of GPU memory, chunks of blocks are halved and repeated, with the same result")
@pytest.mark.parametrize("case", CASES)
def test_chunks_are_halved_and_the_result_is_the_same(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place, name, more, what = CASES[case]
    monkeypatch.setattr(obs, "kernel_for", lambda device: None)  # the chunks of torch's operations
    on_a_gpu(monkeypatch)
    expected = weights(**more)
    asked = small_gpu(monkeypatch, place, name, room=7)
    with caplog.at_level(logging.WARNING, "capruner"):
        found = weights(**more)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert max(asked) > 7
    assert (
        f"{what}: {max(asked)} at once are too many for the GPU's memory; going on with {max(asked) // 2}"
        in caplog.text
    )


@pytest.mark.promise("Memory", "Out of GPU memory even for a single block, the error says what to lower")
def test_where_not_even_one_fits_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    small_gpu(monkeypatch, obs, "_factor", room=0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"solving blocks: not even one .* smaller fisher_block_size.*2.00 GiB"
    ):
        weights()


@pytest.mark.promise("Memory", "Out of GPU memory, fewer per-sample gradients are computed at once")
def test_per_sample_gradients_take_fewer_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"gradients": "sample", "fisher_block_size": 96}  # slabs of 8 samples
    data = Data(sizes=(16,))
    arguments: dict[str, Any] = {"num_grads": 40, "damp": 1e-3, "progress": False} | more
    expected = capruner.prune(net(), data, data.loss, 0.5, **arguments).level()
    tried: list[int] = []
    vmap = torch.func.vmap

    def limited(function: Any, **options: Any) -> Any:
        original = vmap(function, **options)

        def call(parameters: Any, rows: list[Tensor]) -> Any:
            tried.append(len(rows[0]))
            if tried[-1] > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(parameters, rows)

        return call

    monkeypatch.setattr(torch.func, "vmap", limited)
    data = Data(sizes=(16,))
    with caplog.at_level(logging.WARNING, "capruner"):
        found = capruner.prune(net(), data, data.loss, 0.5, **arguments).level()
    assert tried[:3] == [8, 4, 2]
    assert max(tried[2:]) == 2
    assert "gradients of samples: 8 at once are too many" in caplog.text
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_every_part_is_worked_on_once_and_other_errors_pass() -> None:
    done: list[int] = []

    def work(part: slice) -> None:
        items = list(range(10))[part]
        if len(items) > 2:
            raise torch.OutOfMemoryError
        done.extend(items)

    in_chunks(10, 100, work, "counting", GPU)
    assert done == list(range(10))
    in_chunks(0, 4, lambda part: pytest.fail("there is nothing"), "counting", GPU)
    with pytest.raises(ZeroDivisionError):
        in_chunks(1, 1, lambda part: 1 // 0, "counting", GPU)
