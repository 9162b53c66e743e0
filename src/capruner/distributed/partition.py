"""The blocks of all layers, shared out over processes, so that each holds and inverts ``1/world_size`` of the Fisher blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capruner.core.blocks import BlockLayout
from capruner.distributed.collectives import processes


class Partition:
    """Contiguous ranges of blocks, balanced by the ``B²`` numbers that the Fisher matrix of each block takes.

    Args:
        layouts: all layers; the same on every process.
        whole_layers: never split a layer (for methods with one Fisher matrix per layer).
    """

    def __init__(self, layouts: Mapping[str, BlockLayout], whole_layers: bool = False) -> None:
        self.layouts = dict(layouts)
        self.processes = processes()
        size = self.processes.world_size
        self._bounds: dict[str, list[int]] = {}
        total = sum(layout.num_blocks * layout.block_size**2 for layout in layouts.values())
        before = 0
        for name, layout in layouts.items():
            cost, n = layout.block_size**2, layout.num_blocks
            if whole_layers:
                middle = (before + n * cost / 2) * size / total
                self._bounds[name] = [0 if rank <= int(middle) else n for rank in range(size)] + [n]
            else:
                cuts = [round((rank * total / size - before) / cost) for rank in range(size + 1)]
                self._bounds[name] = [min(max(cut, 0), n) for cut in cuts]
            before += n * cost

    def own(self, name: str, rank: int | None = None) -> slice:
        """The blocks of a layer that ``rank`` owns; None: this one."""
        bounds, rank = self._bounds[name], self.processes.rank if rank is None else rank
        return slice(bounds[rank], bounds[rank + 1])

    def count(self, name: str, rank: int | None = None) -> int:
        """Number of blocks of a layer that ``rank`` owns; None: this one."""
        own = self.own(name, rank)
        return own.stop - own.start

    def width(self, name: str, rank: int) -> int:
        """Weights, padding included, in the blocks of a layer that ``rank`` owns."""
        return self.count(name, rank) * self.layouts[name].block_size

    def exchange(
        self, rows: Mapping[str, Tensor] | None, dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor] | None:
        """Send gradients to the owners of their blocks.

        Args:
            rows: ``{name: (k, num_blocks, B)}`` of this process; None if it has no more.
            dtypes: of each layer's gradients, also on a process without rows.

        Returns:
            ``{name: (K, own blocks, B)}``, the gradients of all processes for the blocks owned here, interleaved; None when no process has any.

        Raises:
            PeerError: another process reported a failure.
        """
        return self.processes.exchange(rows, self, dtypes)

    def gather(self, name: str, local: Tensor, dim: int = 0) -> Tensor:
        """All blocks of a layer along ``dim``, from those that each process owns."""
        sizes = [self.count(name, rank) for rank in range(self.processes.world_size)]
        return self.processes.all_gather_blocks(local, sizes, dim)
