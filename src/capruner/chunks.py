"""Work on many blocks: as many at a time as suit the caches, on every core."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from capruner.memory import halved

STATE_BYTES = {"cpu": 1 * 2**20, "cuda": 64 * 2**20}
"""Working set of one chunk of blocks: on a CPU a core's share of the cache, on a GPU enough blocks for all of its multiprocessors."""

Part = TypeVar("Part")
Result = TypeVar("Result")


def chunk_size(asked: int | None, block_size: int, element_size: int, device: torch.device) -> int:
    """Blocks that are worked on at once: as asked for, or as many as suit the caches.

    Raises:
        ValueError: not a positive number.
    """
    if asked is None:
        budget = STATE_BYTES.get(device.type, STATE_BYTES["cuda"])
        return max(1, budget // (block_size * block_size * element_size))
    if asked < 1:
        raise ValueError(f"blocks_in_parallel must be at least 1, or None to have it chosen; got {asked}")
    return asked


def on_every_core(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """``work`` of each part, in their order, in as many threads as torch has, each with one core to itself.

    Factoring a small matrix on two cores takes as long as on one, and ten times as long when another process holds one of them, for the cores wait for
    each other several times in each matrix. Two matrices at once are ready in half the time, with the same bits on any number of cores.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(part) for part in parts]

    def enter() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # which is each thread's own

    try:
        with ThreadPoolExecutor(threads, initializer=enter) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # threads that start later take the last number that any thread has set


def in_chunks(total: int, chunk: int, work: Callable[[slice], Result], what: str, device: torch.device) -> list[Result]:
    """``work`` on ``total`` things: on a CPU chunk by chunk on every core; on a GPU one after the other, halved from where its memory is not enough.

    Args:
        work: called with a slice; on a GPU called again with a part of it, so that it must not have changed its inputs when it runs out of memory.
        what: for the log.

    Returns:
        What ``work`` returned for each chunk.

    Raises:
        torch.OutOfMemoryError: not even one fits.
    """
    if device.type == "cpu":
        share = max(1, min(chunk, -(-total // torch.get_num_threads())))
        return on_every_core(work, [slice(start, start + share) for start in range(0, total, share)])
    start, chunk, results = 0, max(1, min(chunk, total)), []
    while start < total:
        try:
            results.append(work(slice(start, start + chunk)))
            start += chunk
            continue
        except torch.OutOfMemoryError as error:
            if chunk == 1:
                raise torch.OutOfMemoryError(
                    f"{what}: not even one at once fits the GPU's memory; give a smaller fisher_block_size, fisher_inv_device='cpu', or a memory_budget "
                    f"({str(error).splitlines()[0] if str(error) else 'no details'})"
                ) from None
        # Outside of the handler: the error holds the frames, and these the tensors, of the attempt.
        chunk = halved(chunk, what)
    return results
