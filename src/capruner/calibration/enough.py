"""``num_grads="auto"``: draw gradients until the Fisher blocks predict gradients that they have not seen.

The first half of the gradients so far makes a block ``A``, shrunk and damped as by default, the second half ``B``. Elimination prefers directions in which
``A⁻¹`` is large, those in which the first half saw little. So the mean of ``gᵀ A⁻¹ g / size`` over the second half's gradients, ``tr(A⁻¹ B) / size``, tells how
far the losses that ``A`` predicts can be trusted. It is near 1 for many gradients and larger for few. Drawing stops at the first power of two where its mean
over a sample of blocks is at most :data:`ENOUGH`.

Networks differ in how fast it falls, see docs/studies/gradients.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capruner.core.blocks import BlockLayout
from capruner.core.products import FullSums
from capruner.core.shrinkage import phases, shrink
from capruner.distributed import Partition

LEAST, MOST = 64, 4096
"""Gradients after which drawing can stop, and those after which it stops in any case."""

ENOUGH = 1.65
"""Error on unseen gradients at which drawing stops."""

DAMP = 0.01
"""On the diagonal of sampled blocks, relative to its mean."""

EXPECTED = 512
"""The most that small networks on CIFAR-10 take, for estimates of time."""

LAYERS, BLOCKS = 16, 4
"""Size of the sample: layers, and blocks of each."""

WEIGHTS = 128
"""Weights of each sampled block, the first ones. The error of whole blocks grows with their size, their accuracy hardly."""


def milestones(num_grads: int) -> list[int]:
    """Powers of two from half of :data:`LEAST` up to below ``num_grads``, then ``num_grads``.

    Slabs of gradients end there whether or not anything is decided, so that sums are rounded alike.
    """
    counts = []
    count = LEAST // 2
    while count < num_grads:
        counts.append(count)
        count *= 2
    return [*counts, num_grads]


def sample_blocks(layouts: Mapping[str, BlockLayout]) -> dict[str, list[int]]:
    """Blocks of evenly spaced layers and neurons that hold the same part of a neuron's inputs, so that they can be compared; padded ones are left out."""
    usable = {}
    for name, layout in layouts.items():
        whole = layout.num_blocks - bool(layout.padding)
        alike = list(range(0, whole, phases(layout)))
        if len(alike) > 1:
            count = min(BLOCKS, len(alike))
            usable[name] = [alike[i * (len(alike) - 1) // (count - 1)] for i in range(count)]
    names = list(usable)
    if not names:
        return {}
    return {names[i]: usable[names[i]] for i in sorted({k * len(names) // LAYERS for k in range(LAYERS)})}


def sampled_size(layout: BlockLayout) -> int:
    """Weights of each sampled block."""
    return min(layout.block_size, WEIGHTS)


class Sample:
    """Fisher matrices of a sample of blocks in float64, of those that this process owns.

    Args:
        partition: the layers, and who owns which of their blocks.
        device: where the sums are kept.
    """

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self.partition = partition
        self.sums: dict[str, FullSums] = {}
        self._own: dict[str, Tensor] = {}
        self._half: dict[str, Tensor] = {}  # the sums at the last call of error()
        self._half_fourth: dict[str, Tensor] = {}
        for name, blocks in sample_blocks(partition.layouts).items():
            own, size = partition.own(name), sampled_size(partition.layouts[name])
            here = [block - own.start for block in blocks if own.start <= block < own.stop]
            self._own[name] = torch.tensor(here, dtype=torch.int64, device=device)
            zeros = torch.zeros(len(here), size, size, dtype=torch.float64, device=device)
            self.sums[name] = FullSums(zeros, norms=True)
            self._half[name], self._half_fourth[name] = (
                torch.zeros_like(zeros),
                torch.zeros_like(self.sums[name].fourth),
            )

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Fold in ``{name: (k, own blocks, B)}`` gradients."""
        for name, sums in self.sums.items():
            sampled = rows[name].index_select(1, self._own[name].to(rows[name].device))
            sums.add(sampled[..., : sums.blocks.shape[1]].to(sums.blocks), None)

    def error(self, num_grads: int) -> float:
        """Mean error of the first half of ``num_grads`` gradients on the second half, the same on every process; infinite where it is not known.

        It is known if the last call was made after that first half.
        """
        total = blocks = 0.0
        for name, sums in self.sums.items():
            half, fourth = self._half[name], self._half_fourth[name]
            A, B = half * (2 / num_grads), (sums.blocks - half) * (2 / num_grads)
            common = A.sum(dim=0)
            self.partition.processes.all_reduce([common])
            heard = A.diagonal(dim1=1, dim2=2).sum(dim=1) > 0
            if heard.any():
                errors = held_out_error(A[heard], B[heard], common, fourth[heard] * (2 / num_grads), num_grads // 2)
                total, blocks = total + float(errors.sum()), blocks + len(errors)
            half.copy_(sums.blocks)
            fourth.copy_(sums.fourth)
        total, blocks = (self.partition.processes.sum(value) for value in (total, blocks))
        return total / blocks if blocks else float("inf")

    def state_dict(self) -> dict[str, Tensor]:
        """The sums; not copies."""
        found: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            half = {"half": self._half[name], "half_fourth": self._half_fourth[name]}
            found |= {f"{name}/{key}": tensor for key, tensor in (sums.tensors() | half).items()}
        return found

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`; raise ``KeyError`` or ``RuntimeError`` if it is from a different calibration."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name])


def held_out_error(A: Tensor, B: Tensor, common: Tensor, fourth: Tensor, num_grads: int) -> Tensor:
    """``tr(A⁻¹ B) / size`` for ``(n, size, size)`` float64 blocks, both damped and ``A`` shrunk; ``(n,)``.

    Args:
        A, B: means of ``g gᵀ`` over different gradients; no ``A`` is 0.
        common: ``(size, size)``, what the blocks are shrunk towards, of any scale.
        fourth: ``(n,)`` mean of ``‖g‖⁴`` over the gradients of ``A``.
        num_grads: number of gradients of ``A``.
    """
    trace = A.diagonal(dim1=1, dim2=2).sum(dim=1)
    damp = DAMP * trace[:, None] / A.shape[1]
    A, B = A.clone(), B.clone()
    shrink(
        A, common[None], torch.zeros(len(A), dtype=torch.int64, device=A.device), None, None, fourth, trace, num_grads
    )
    A.diagonal(dim1=1, dim2=2).add_(damp)
    B.diagonal(dim1=1, dim2=2).add_(damp)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
    return (inverse * B).sum(dim=(1, 2)) / A.shape[1]
