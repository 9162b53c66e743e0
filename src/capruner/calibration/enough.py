"""``num_grads="auto"``: draw gradients until the Fisher blocks are known well enough.

A block that is estimated from ``m`` gradients differs from the average of its layer by what is really its own, and by noise. The share of noise in that squared
difference is Ledoit and Wolf's ``α`` (:mod:`capruner.shrinkage`): it is estimated from the gradients' own spread, needs no validation data, is near 1 for few
gradients and falls as ``1/m``. Drawing stops at the first power of two where its mean over a sample of blocks is at most :data:`NOISE`.

Networks differ in how fast it falls: gradients that all look alike tell little by being many, and gradients of many classes need many to cover them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capruner.distributed import Partition
from capruner.layout import BlockLayout
from capruner.products import FullSums
from capruner.shrinkage import noise_share, phases

LEAST, MOST = 64, 4096
"""Gradients after which the noise is first looked at, and those after which drawing stops in any case."""

NOISE = 0.3
"""Share of noise at which drawing stops; see docs/studies/gradients.md."""

EXPECTED = 128
"""Gradients that small networks on CIFAR-10 take, for estimates of time."""

LAYERS, BLOCKS = 16, 4
"""Size of the sample: layers, and blocks of each."""

SAMPLE_BYTES = 64 * 2**20
"""Most memory of the sample: half of the working set that elimination takes later."""


def milestones(num_grads: int) -> list[int]:
    """Powers of two from :data:`LEAST` up to below ``num_grads``, then ``num_grads``.

    Slabs of gradients end there whether or not anything is decided, so that sums are rounded alike.
    """
    counts = []
    count = LEAST
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
    most = SAMPLE_BYTES // (8 * BLOCKS * max(layouts[name].block_size for name in names) ** 2)
    layers = max(1, min(LAYERS, most))
    return {names[i]: usable[names[i]] for i in sorted({k * len(names) // layers for k in range(layers)})}


class NoiseSample:
    """Fisher matrices of a sample of blocks in float64, of those that this process owns.

    Args:
        partition: the layers, and who owns which of their blocks.
        device: where the sums are kept.
    """

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self.partition = partition
        self.sums: dict[str, FullSums] = {}
        self._own: dict[str, Tensor] = {}
        for name, blocks in sample_blocks(partition.layouts).items():
            own, size = partition.own(name), partition.layouts[name].block_size
            here = [block - own.start for block in blocks if own.start <= block < own.stop]
            self._own[name] = torch.tensor(here, dtype=torch.int64, device=device)
            zeros = torch.zeros(len(here), size, size, dtype=torch.float64, device=device)
            self.sums[name] = FullSums(zeros, norms=True)

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Fold in ``{name: (k, own blocks, B)}`` gradients."""
        for name, sums in self.sums.items():
            sums.add(rows[name].index_select(1, self._own[name].to(rows[name].device)).to(sums.blocks), None)

    def noise(self, num_grads: int) -> float:
        """Mean share of noise over the sample after ``num_grads`` gradients, the same on every process; 1 where no two blocks can be compared."""
        total = blocks = 0.0
        for sums in self.sums.values():
            F, fourth = sums.blocks / num_grads, sums.fourth / num_grads
            common = F.sum(dim=0)
            self.partition.processes.all_reduce([common])
            heard = F.diagonal(dim1=1, dim2=2).sum(dim=1) > 0
            if heard.any():
                total += float(noise_share(F[heard], common, fourth[heard], num_grads).sum())
                blocks += int(heard.sum())
        total, blocks = (self.partition.processes.sum(value) for value in (total, blocks))
        return total / blocks if blocks else 1.0

    def state_dict(self) -> dict[str, Tensor]:
        """The sums; not copies."""
        return {f"{name}/{key}": tensor for name, sums in self.sums.items() for key, tensor in sums.tensors().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from a :meth:`state_dict`.

        Raises:
            KeyError, ValueError: it is from a different calibration.
        """
        for name, sums in self.sums.items():
            sums.load({key: tensors[f"{name}/{key}"] for key in sums.tensors()})
