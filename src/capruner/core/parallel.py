"""Process many blocks in chunks that suit the caches, on every core."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from capruner.core.memory import halved

STATE_BYTES = {"cpu": 2 * 2**20, "cuda": 64 * 2**20}
"""Working set of one chunk of blocks: on a CPU a core's share of the cache, on a GPU enough blocks for all of its multiprocessors."""

Part = TypeVar("Part")
Result = TypeVar("Result")


def chunk_size(asked: int | None, block_size: int, element_size: int, device: torch.device) -> int:
    """Number of blocks per chunk: ``asked`` (raise ``ValueError`` unless positive), or as many as suit the caches."""
    if asked is None:
        budget = STATE_BYTES.get(device.type, STATE_BYTES["cuda"])
        return max(1, budget // (block_size * block_size * element_size))
    if asked < 1:
        raise ValueError(f"blocks_in_parallel must be at least 1, or None to have it chosen; got {asked}")
    return asked


def on_every_core(work: Callable[[Part], Result], parts: Iterable[Part]) -> list[Result]:
    """Apply ``work`` to each part in as many threads as torch has, one core each; results are in the order of the parts.

    Factoring one small matrix on two cores is no faster than on one, and ten times slower when another process uses one of them, because the cores wait
    for each other several times per matrix. Two matrices at once take half the time, and results are bit-identical for any number of cores.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(part) for part in parts]

    def enter() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)  # this setting is per thread

    try:
        with ThreadPoolExecutor(threads, initializer=enter) as pool:
            return list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # later threads would inherit the last number set by any thread


def in_chunks(total: int, chunk: int, work: Callable[[slice], Result], what: str, device: torch.device) -> list[Result]:
    """Apply ``work`` to slices of ``range(total)``: on a CPU on every core; on a GPU one after the other, halving chunks after out-of-memory.

    Args:
        work: called with a slice, and on a GPU called again with a part of it after out-of-memory; it must not change its inputs.
        what: for the log.

    Returns:
        The results of the chunks.

    Raises:
        torch.OutOfMemoryError: a chunk of one does not fit.
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
        # Outside the handler: the error keeps the frames of the attempt alive, and with them its tensors.
        chunk = halved(chunk, what)
    return results
