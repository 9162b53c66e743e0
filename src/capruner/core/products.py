"""Sums of outer products, ``Σ g gᵀ`` for each block of ``B`` weights, in ``B²`` numbers a block.

:class:`FullSums` adds whole matrices with torch, on any device. :class:`HalfSums`, for CPUs with numba, keeps the lower triangle alone; the other half of the
memory holds the gradients that are not added yet. Adding many at a time reads and writes the triangle a few times instead of once for each slab,
and the result does not depend on how the gradients were cut into slabs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capruner.core.kernels import matrices_kernel_for
from capruner.core.parallel import in_chunks

SMALLEST = 16
"""Blocks of fewer weights are added by torch: half of their memory holds too few gradients."""

TOGETHER = 64
"""Blocks that one core works on between looking for the next ones."""


def sums_for(blocks: Tensor, triangular: bool, norms: bool) -> FullSums:
    """The fastest sums for this device, in the memory of ``blocks``, ``(n, B, B)`` zeros."""
    half = not triangular and blocks.shape[1] >= SMALLEST and matrices_kernel_for(blocks.device) is not None
    return HalfSums(blocks, norms) if half else FullSums(blocks, norms, triangular)


class FullSums:
    """Sums as whole matrices.

    Args:
        blocks: ``(n, B, B)`` zeros; the memory that is worked in.
        norms: sum ``‖g‖⁴`` too.
        triangular: add on and above the diagonal alone; pays for few blocks that are fed with many rows at a time.

    Attributes:
        fourth: ``(n,)`` float64, sums of ``‖g‖⁴`` after :meth:`settle`.
    """

    def __init__(self, blocks: Tensor, norms: bool, triangular: bool = False) -> None:
        self.blocks = blocks
        self.norms = norms
        self.triangular = triangular
        self.fourth = torch.zeros(len(blocks), dtype=torch.float64, device=blocks.device)

    def add(self, gradients: Tensor, scales: Tensor | None) -> None:
        """Add ``(k, n, B)`` gradients, divided by ``scales``, ``(n, B)``; None: 1."""
        if self.norms:
            for row in gradients:
                self.fourth += torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) ** 4
        slabs = (gradients if scales is None else gradients / scales).transpose(0, 1)
        if not self.triangular:
            self.blocks.baddbmm_(slabs.mT, slabs)
            return
        for F, G in zip(self.blocks, slabs):
            _add_upper(F, G)

    def rescale(self, which: Tensor, ratio: Tensor) -> None:
        """Multiply row and column ``i`` of some blocks by ``ratio[:, i]``."""
        self.blocks[which] = self.blocks[which] * ratio[:, :, None] * ratio[:, None, :]

    def settle(self, scales: Tensor | None) -> None:
        """Add what is left to add; ``scales`` as in :meth:`add`."""

    def doubled(self, part: slice) -> Tensor:
        """Symmetric float64 copies of some blocks; call :meth:`settle` first."""
        A = self.blocks[part].to(torch.float64, copy=True)
        return A.triu() + A.triu(1).mT if self.triangular else A

    def tensors(self) -> dict[str, Tensor]:
        """The state, for :meth:`load`; not copies."""
        return {"blocks": self.blocks} | ({"fourth": self.fourth} if self.norms else {})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what :meth:`tensors` returned; raise ``ValueError`` if it does not fit."""
        if tensors.keys() - {"peak", "count", "scales"} != self.tensors().keys():
            raise ValueError("the sums were saved by a capruner with other kernels: install or remove numba as before")
        for name, tensor in self.tensors().items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(tensors[name])


class HalfSums(FullSums):
    """Lower triangles, row by row in the first half of each block's memory, and in the second half gradients that are not added yet."""

    def __init__(self, blocks: Tensor, norms: bool) -> None:
        super().__init__(blocks, norms)
        B = blocks.shape[1]
        self._flat = blocks.view(len(blocks), B * B)
        self._triangle = B * (B + 1) // 2
        self._room = (B - 1) // 2
        self._waiting = torch.zeros((), dtype=torch.int64)

    def add(self, gradients: Tensor, scales: Tensor | None) -> None:
        while len(gradients):
            waiting = int(self._waiting)
            some, gradients = gradients[: self._room - waiting], gradients[self._room - waiting :]
            B = gradients.shape[2]
            start = self._triangle + waiting * B
            rows = self._flat[:, start : start + len(some) * B].unflatten(1, (len(some), B)).transpose(0, 1)
            if scales is None:
                rows.copy_(some)
            else:
                torch.div(some, scales, out=rows)
            self._waiting += len(some)
            if int(self._waiting) == self._room:
                self.settle(scales)

    def rescale(self, which: Tensor, ratio: Tensor) -> None:
        row, column = torch.tril_indices(*self.blocks.shape[1:])
        triangles = self._flat[which, : self._triangle]
        # One after the other: their product may be infinite, and a sum of nothing is 0 all the same.
        self._flat[which, : self._triangle] = triangles * ratio[:, row] * ratio[:, column]

    def settle(self, scales: Tensor | None) -> None:
        kernel, rows, size = matrices_kernel_for(self.blocks.device), int(self._waiting), self.blocks.shape[1]
        assert kernel is not None

        def work(part: slice) -> None:
            flat = self._flat[part]
            factors = flat.new_ones(len(flat), size) if scales is None else scales[part]
            kernel.add_products(flat, size, rows, factors, self.fourth[part])

        if rows:
            in_chunks(len(self._flat), TOGETHER, work, "adding gradients", self.blocks.device)
            self._waiting.zero_()

    def doubled(self, part: slice) -> Tensor:
        kernel, flat = matrices_kernel_for(self.blocks.device), self._flat[part]
        assert kernel is not None
        matrices = torch.empty(len(flat), *self.blocks.shape[1:], dtype=torch.float64)
        kernel.unpack(flat, matrices)
        return matrices

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"waiting": self._waiting}


def _add_upper(F: Tensor, G: Tensor) -> None:
    """``F += Gᵀ G`` on and above the diagonal, in strips: 10/16 of the products."""
    width = -(-F.shape[0] // 4)
    for i in range(0, F.shape[0], width):
        F[i : i + width, i:].addmm_(G[:, i : i + width].mT, G[:, i:])
