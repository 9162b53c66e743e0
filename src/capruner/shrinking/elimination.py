"""Optimal Brain Surgeon on whole units: in which order they are removed, and what the weights that read them become.

The rows of a layer that reads units all see the same inputs, so one Fisher matrix of its columns serves them all, times a matrix of its rows:

    F ≈ G ⊗ A,    A: mean of g gᵀ over rows and gradients, (columns, columns);    G: (rows, rows), trace = number of rows.

With ``H = A⁻¹``, removing the columns ``S`` of the weights ``W`` costs ``½ tr(Wₛᵀ G Wₛ Hₛₛ⁻¹)`` and the others become

    W ← W − Wₛ Hₛₛ⁻¹ Hₛ,

whatever ``G`` is. The greedy loop removes the cheapest unit, which is a set of columns of each of its readers, brings ``W`` and ``H`` up to date, and repeats.
Biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from capruner.core.fisher import BlockFisher
from capruner.core.numerics import full_precision, working_dtype
from capruner.shrinking.units import Group, columns

COMPACT = 0.25
"""Share of the columns of a layer that may be removed before the matrices are copied without them."""


class ReaderFisher:
    """The Fisher matrices of a layer that reads units, fed with gradients.

    Args:
        layer: linear or a convolution with one group.
        num_grads: gradients that will be added.
        damp: relative to the mean diagonal of ``A``.
    """

    def __init__(self, layer: nn.Module, num_grads: int, damp: float) -> None:
        self.layer = layer
        weight = self.matrix()
        rows, size = weight.shape
        self._columns = BlockFisher(
            1,
            size,
            num_grads * rows,
            damp,
            relative_damp=True,
            triangular=True,
            device=weight.device,
            dtype=weight.dtype,
        )
        self._rows = torch.zeros(rows, rows, dtype=torch.float64, device=weight.device)

    def matrix(self) -> Tensor:
        """The layer's weights as ``(rows, columns)``."""
        weight = self.layer.weight.detach().flatten(1)  # type: ignore[operator]
        return weight.to(working_dtype(weight))

    def add(self, gradients: Tensor) -> None:
        """Fold in ``k`` gradients of the weight."""
        rows = gradients.flatten(2)
        self._columns.add(rows.flatten(0, 1)[:, None])
        for gradient in rows.double():
            self._rows += gradient @ gradient.T

    @property
    def heard(self) -> bool:
        """Whether any gradient was not zero."""
        return self._columns.largest > 0

    def solve(self) -> Reader:
        """Invert; the Fisher matrices are consumed."""
        H = self._columns.inverse()[0].double()
        trace = self._rows.trace()
        G = self._rows * (len(self._rows) / trace) if trace > 0 else torch.eye(len(self._rows)).to(self._rows)
        values, vectors = torch.linalg.eigh(G)
        root = vectors * (values.clamp(min=0) * self._columns.units[0]).sqrt()
        return Reader(self.layer, self.matrix().double(), H, root.T)


@dataclass(frozen=True)
class Reader:
    """A layer that reads units, ready for elimination.

    Attributes:
        layer: the module.
        weight: ``W``, ``(rows, columns)`` float64.
        H: ``A⁻¹``, float64.
        root: ``R`` with ``Rᵀ R = G``, so that losses are squared norms of columns of ``R W``.
    """

    layer: nn.Module
    weight: Tensor
    H: Tensor
    root: Tensor

    @full_precision()
    def refit(self, gone: Tensor) -> Tensor:
        """The weights once the columns ``gone`` (int64) are removed, exactly 0 there."""
        factor = torch.linalg.cholesky(self.H[gone][:, gone])
        weight = self.weight - self.weight[:, gone] @ torch.cholesky_solve(self.H[gone], factor)
        weight[:, gone] = 0
        return weight

    @torch.no_grad()
    def write_to(self, layer: nn.Module, gone: Sequence[int]) -> None:
        """Put the weights into ``layer``, re-fitted to the removal of the input channels ``gone``."""
        positions = torch.tensor(gone, device=self.H.device)[:, None]
        weight = self.refit(columns(self.layer, positions).flatten())
        parameter = layer.weight
        assert isinstance(parameter, Tensor)
        parameter.copy_(weight.view_as(parameter))


class _Share:
    """The columns of one reader during the elimination of a group."""

    def __init__(self, reader: Reader, columns: Tensor) -> None:
        self.columns = columns.to(reader.H.device)  # (units, width), positions in the matrices below
        self.W = reader.root @ reader.weight
        self.H = reader.H.clone()
        self.gone = torch.zeros(len(self.H), dtype=torch.bool, device=self.H.device)

    def losses(self, units: Tensor) -> Tensor:
        """``½ tr(Wₛᵀ G Wₛ Hₛₛ⁻¹)`` of each unit."""
        at = self.columns[units]
        W = self.W[:, at]  # (rows, units, width)
        if at.shape[1] == 1:
            return W[:, :, 0].square().sum(dim=0) / (2 * self.H.diagonal()[at[:, 0]])
        factor = torch.linalg.cholesky(self.H[at[:, :, None], at[:, None, :]])
        return torch.linalg.solve_triangular(factor, W.permute(1, 2, 0), upper=False).square().sum(dim=(1, 2)) / 2

    def remove(self, unit: int) -> None:
        at = self.columns[unit]
        H = self.H[at]
        moved = torch.linalg.solve(H[:, at], H)  # (width, columns)
        self.W.addmm_(self.W[:, at], moved, alpha=-1)
        self.H.addmm_(H.T, moved, alpha=-1)
        self.gone[at] = True
        if self.gone.sum() > COMPACT * len(self.gone):
            self._compact()

    def _compact(self) -> None:
        keep = ~self.gone
        place = keep.cumsum(0) - 1
        self.W, self.H = self.W[:, keep], self.H[keep][:, keep]
        self.columns, self.gone = place[self.columns], self.gone[keep]


@full_precision()
def eliminate_units(group: Group, readers: Mapping[str, Reader]) -> tuple[Tensor, Tensor]:
    """The order in which the units of a group are removed, cheapest first, and the loss of each step; ``(units,)`` int64 and float64."""
    shares = [_Share(readers[cut.layer], columns(readers[cut.layer].layer, cut.positions)) for cut in group.readers]
    left = torch.arange(group.units, device=shares[0].H.device)
    order, losses = [], []
    while len(left):
        loss = torch.stack([share.losses(left) for share in shares]).sum(dim=0)
        best = int(loss.argmin())
        unit = int(left[best])
        order.append(unit)
        losses.append(float(loss[best]))
        left = torch.cat([left[:best], left[best + 1 :]])
        if len(left):
            for share in shares:
                share.remove(unit)
    return torch.tensor(order), torch.tensor(losses, dtype=torch.float64)


def feed(fishers: Mapping[str, ReaderFisher], slabs: Iterable[Mapping[str, Tensor]]) -> None:
    """Fold gradients of the readers' weights into their Fisher matrices."""
    for slab in slabs:
        for name, fisher in fishers.items():
            fisher.add(slab[f"{name}.weight"])


def solve(groups: Sequence[Group], readers: Mapping[str, Reader], progress: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """The elimination of each group, by name."""
    bar = tqdm(groups, desc="eliminating units", unit="group", disable=None if progress else True, leave=False)
    return {group.name: eliminate_units(group, readers) for group in bar}
