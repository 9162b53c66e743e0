"""Cut a weight tensor into blocks of ``B`` consecutive weights, and back.

Order of the weights
    Row-major for weights stored ``(out, in, *kernel)``. For N:M patterns convolution kernels are permuted to ``(out, kh, kw, in)`` first,
    because sparse tensor cores read groups along the reduction dimension, which for an implicit-GEMM convolution runs over input channels innermost.
    Weights stored ``(in, out, *kernel)`` are always permuted to ``(out, *kernel, in)``, so that a block holds the inputs of one neuron.

Padding
    ``B`` need not divide the tensor: the last block is padded with inert weights (value 0, unit diagonal in the Fisher matrix). No weight is left out
    and no block grows. A tensor smaller than ``B`` becomes one block of its own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PUBLISHED = 192
"""Weights per block in the paper; the default limit for networks of any size."""

LARGEST = 512
"""The default limit for small networks: larger blocks gained nothing."""

AFFORDABLE = 4 * 2**30
"""Bytes of Fisher blocks up to which the default exceeds the published size."""


def largest(weights: int) -> int:
    """The default limit of block sizes for ``weights`` weights in total: what 4 GiB hold, from 192 to 512."""
    return max(PUBLISHED, min(LARGEST, AFFORDABLE // (4 * max(1, weights))))


def fitting(row: int, group: int = 1, limit: int = PUBLISHED) -> int:
    """The largest block size up to ``limit`` that cuts rows of ``row`` weights evenly, or holds whole rows.

    A block that spans parts of two neurons holds fewer of the correlations that matter. If only sizes below half of ``limit`` cut rows evenly, the
    result is ``limit``, rounded down to a multiple of ``group``.
    """
    even = [k for k in range(limit, limit // 2 - 1, -1) if k % group == 0 and (row % k == 0 or k % row == 0)]
    return even[0] if even else limit // group * group


def check_block_size(block_size: Any) -> None:
    """Raise ``ValueError`` unless ``block_size`` is a positive integer or None."""
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1):
        raise ValueError(
            f"fisher_block_size must be a positive integer, got {block_size!r}; None takes what fits the rows, from {PUBLISHED} up to {LARGEST}"
        )


@dataclass(frozen=True)
class BlockLayout:
    """How one weight tensor is cut into blocks.

    Attributes:
        shape: shape of the weight tensor.
        block_size: number of weights per block, ``B``.
        inputs: the dimension that is moved to the end before flattening, or None.
    """

    shape: tuple[int, ...]
    block_size: int
    inputs: int | None = None

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        block_size: int | None = None,
        inputs: int | None = None,
        group: int = 1,
        limit: int = PUBLISHED,
    ) -> BlockLayout:
        """The layout of a tensor of ``shape``; blocks never exceed the tensor.

        Args:
            block_size: None: the size up to ``limit`` that :func:`fitting` finds.
            inputs: the innermost dimension of a block.
            group: a chosen size is a multiple of it.

        Raises:
            ValueError: ``block_size`` is not a positive integer, or the tensor is empty.
        """
        check_block_size(block_size)
        numel = torch.Size(shape).numel()
        if numel == 0:
            raise ValueError(f"cannot prune an empty tensor of shape {tuple(shape)}; leave it out of `params`")
        if block_size is None:
            block_size = fitting(numel // shape[1 if inputs == 0 and len(shape) > 1 else 0], group, limit)
        innermost = inputs is None or inputs >= len(shape) - 1
        return cls(tuple(shape), min(block_size, numel), None if innermost else inputs)

    @property
    def numel(self) -> int:
        """Number of weights, padding not counted."""
        return torch.Size(self.shape).numel()

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the padded one included."""
        return -(-self.numel // self.block_size)

    @property
    def padding(self) -> int:
        """Number of inert weights at the end of the last block."""
        return self.num_blocks * self.block_size - self.numel

    def to_blocks(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(*batch, *shape)`` to ``(*batch, num_blocks, B)`` in ``dtype``, padded with zeros (False). A view if possible."""
        batch = tensor.shape[: tensor.dim() - len(self.shape)]
        if self.inputs is not None:
            tensor = tensor.movedim(len(batch) + self.inputs, -1)
        flat = tensor.reshape(*batch, self.numel).to(dtype)
        if self.padding:
            flat = F.pad(flat, (0, self.padding))
        return flat.view(*batch, self.num_blocks, self.block_size)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """``(num_blocks, B)`` back to ``shape``, padding dropped; contiguous."""
        flat = blocks.reshape(-1)[: self.numel]
        if self.inputs is None:
            return flat.reshape(self.shape)
        others = [size for dim, size in enumerate(self.shape) if dim != self.inputs]
        return flat.reshape(*others, self.shape[self.inputs]).movedim(-1, self.inputs).contiguous()

    def is_padding(self, device: torch.device | None = None) -> Tensor:
        """``(num_blocks, B)`` bool, True for the inert weights."""
        mask = torch.zeros(self.num_blocks, self.block_size, dtype=torch.bool, device=device)
        if self.padding:
            mask[-1, -self.padding :] = True
        return mask
