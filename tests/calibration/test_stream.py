"""The stream of calibration batches: drawn again from where it was, and let go of without the garbage collector."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch

from capruner.batches import Batches
from capruner.calibration.stream import CalibrationStream

CPU = torch.device("cpu")
DATA = [(torch.full((2, 3), float(i)), torch.tensor([i, i])) for i in range(4)]


class Loader:
    """A loader whose last iterator can be watched."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        iterator = (batch for batch in DATA)
        self.iterator = weakref.ref(iterator)
        return iterator


def test_a_loaders_iterator_is_freed_with_the_stream() -> None:
    """Else its worker processes live on, and those of the next loader inherit it."""
    loader = Loader()
    gc.disable()
    try:
        stream = CalibrationStream(Batches(loader, None), CPU)
        next(stream)
        assert loader.iterator() is not None
        del stream
        assert loader.iterator() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("used", [0, 1])
def test_a_restored_stream_draws_what_follows(used: int) -> None:
    first = CalibrationStream(Batches(DATA, None), CPU)
    next(first), next(first)
    first.used = used
    second = CalibrationStream(Batches(DATA, None), CPU)
    second.load_state_dict(first.state_dict() | {"digests": ["", ""]})
    numbers = [index for index, _, _ in itertools.islice(second, 2)]
    assert numbers == ([1, 2] if used else [2, 3])  # an unfinished batch comes again


def test_data_that_have_become_shorter_are_refused() -> None:
    for draw in (CalibrationStream.__next__, CalibrationStream.skip):
        stream = CalibrationStream(Batches(iter(DATA[:1]), None), CPU)  # an iterator cannot be started again
        stream.drawn = 3
        with pytest.raises(ValueError, match="ended after 1 batches, but 3 were drawn before"):
            draw(stream)
