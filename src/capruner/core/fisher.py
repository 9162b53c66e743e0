"""Blockwise empirical Fisher matrix, ``F = (1/m) Σ g gᵀ + λ I`` per block of ``B`` weights, and its inverse ``H``.

Two ways lead to ``H``:

``woodbury``
    The gradients themselves are kept, ``m`` rows ``G`` where a block has room for ``B``; then ``H = (I − Gᵀ (m λ I + G Gᵀ)⁻¹ G) / λ`` in float64, or, of
    a block with no more than ``m`` weights alive, the inverse of ``Gᵀ G / m + λ I``. Exact in the directions no gradient has seen, whatever the size of
    ``λ``.
``accumulate``
    ``F += Gᵀ G`` (see :mod:`capruner.core.products`) with slabs of gradients, so that a block is read and written once per slab and not once per
    gradient; then one Cholesky inverse of ``F / m`` in float64. Directions no gradient has seen are known to the rounding of ``F``. Extreme gradients are
    scaled, see :mod:`capruner.core.scaling`.

A block that will not factor climbs a ladder of damping, alone: tenfold at each rung, counted, and past the last rung an error.

``auto`` takes ``woodbury`` while there are fewer gradients than weights in a block (the Fisher matrix is then singular but for ``λ``), else ``accumulate``;
so does ``woodbury``, which is refused where ``F`` has to be known first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from capruner.core.factors import cholesky, invert
from capruner.core.numerics import NotPositiveDefiniteError, full_precision
from capruner.core.parallel import chunk_size, in_chunks
from capruner.core.products import FullSums, sums_for
from capruner.core.scaling import NO_GRADIENT, largest, scales_of, unit_of
from capruner.core.shrinkage import shrink

Solver = Literal["auto", "woodbury", "accumulate"]

RUNGS = 6
"""Times that the damping of a block may grow tenfold."""


class BlockFisher:
    """The Fisher blocks of one weight tensor, fed with gradients, then inverted once.

    Holds ``num_blocks · B²`` numbers, in which the inverse replaces the matrix.

    Args:
        num_blocks: ``n``.
        block_size: ``B``.
        num_grads: number of gradients ``m`` that will be added, which ``woodbury`` needs; None: as many as are added.
        damp: ``λ > 0``, absolute, in units of a squared gradient.
        relative_damp: ``λ`` is instead this fraction of the mean diagonal of each block (needs the ``accumulate`` solver).
        solver: see the module's docstring.
        shrinkage: share of the layer's common Fisher matrix in each block, in [0, 1]; None: estimated for each block. Needs the ``accumulate``
            solver and :meth:`set_common`; see :mod:`capruner.core.shrinkage`.
        triangular: accumulate the upper triangle alone; pays for few blocks that are fed with many rows at a time.
        dead: ``(num_blocks, B)`` bool; padding, or weights removed earlier. They are cut off from the others, as if their gradients had been zero, and
            get a unit diagonal.
        dtype: float32, or float64 for reference computations.

    Attributes:
        damped: blocks that needed more than ``damp``, after :meth:`inverse`.
        drowned: blocks whose absolute ``damp`` is less than the rounding error of the matrix that it was added to, after :meth:`inverse`.
        shares: ``(num_blocks,)`` float64, the share of the common Fisher matrix in each block, after :meth:`inverse`.
        units: ``(num_blocks,)`` float64, after :meth:`inverse`: what it returns is the inverse of ``F / units``, and losses from it are to be multiplied
            by them. Powers of two; 1 unless the gradients of a block are extremely small or large.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_grads: int | None,
        damp: float,
        *,
        relative_damp: bool = False,
        solver: Solver = "auto",
        shrinkage: float | None = 0.0,
        triangular: bool = False,
        dead: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not damp > 0 or damp == float("inf"):
            raise ValueError(f"damp must be a positive number, got {damp}; 1e-8 to 1e-4 are usual")
        if num_grads is not None and num_grads < 1:
            raise ValueError(f"num_grads must be at least 1, got {num_grads}")
        solver = _choose_solver(solver, block_size, num_grads, relative_damp, shrinkage, triangular)
        self.solver = solver
        self.triangular = triangular
        self.num_grads = num_grads
        self.damp = damp
        self.dead = dead
        self.relative_damp = relative_damp
        self.count = 0
        self.damped = 0
        self.drowned = 0
        self.shrinkage = shrinkage
        self.shares = torch.zeros(num_blocks, dtype=torch.float64, device=device)
        self._common: tuple[Tensor, Tensor] | None = None  # and the phase of each block
        self.units = torch.ones(num_blocks, dtype=torch.float64, device=device)
        blocks = torch.zeros(num_blocks, block_size, block_size, device=device, dtype=dtype)
        self._blocks: Tensor | None = blocks
        self._sums: FullSums | None = None if solver == "woodbury" else sums_for(blocks, triangular, shrinkage is None)
        # The largest absolute gradient of each weight so far, and the scale of each weight's gradients; None: 1.
        self._peak = torch.zeros(num_blocks, block_size, device=device, dtype=dtype)
        self._scales = None if self._sums is None else self._scales_of(self._peak)

    @full_precision()
    def add(self, gradients: Tensor) -> None:
        """Fold in ``(k, num_blocks, B)`` gradients.

        Raises:
            ValueError: more than ``num_grads`` in all, or already inverted.
        """
        if self._blocks is None:
            raise ValueError("the Fisher matrix is inverted already; make a new BlockFisher for new gradients")
        self.count += len(gradients)
        if self.num_grads is not None and self.count > self.num_grads:
            raise ValueError(f"more gradients ({self.count}) than num_grads ({self.num_grads})")
        gradients = gradients.to(self._blocks)
        self._peak = torch.maximum(self._peak, largest(gradients))
        if self._sums is None:
            self._blocks[:, self.count - len(gradients) : self.count] = gradients.transpose(0, 1)
        else:
            self._rescale(self._sums)
            self._sums.add(gradients, self._scales)

    def _scales_of(self, peak: Tensor) -> Tensor | None:
        """What to divide each weight's gradients by. Absolute damping counts as a gradient, so that neither drowns."""
        return scales_of(peak if self.relative_damp else peak.clamp(min=self.damp**0.5))

    def _rescale(self, sums: FullSums) -> None:
        """Bring what was added to the scales that suit the gradients to come."""
        before, self._scales = self._scales, self._scales_of(self._peak)
        if before is None and self._scales is None:
            return
        ones = torch.ones_like(self._peak)
        ratio = (ones if before is None else before) / (ones if self._scales is None else self._scales)
        changed = (ratio != 1).any(dim=1).nonzero()[:, 0]
        sums.settle(before)
        sums.rescale(changed, ratio[changed])

    @property
    def largest(self) -> float:
        """The largest absolute gradient so far."""
        return float(self._peak.max()) if self._peak.numel() else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """What was added so far, for :meth:`load`; the blocks themselves, not a copy."""
        if self._blocks is None:
            raise ValueError("the Fisher matrix is inverted already; there is nothing to save")
        sums = {"blocks": self._blocks} if self._sums is None else self._sums.tensors()
        return sums | {"peak": self._peak, "count": torch.tensor(self.count)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what :meth:`tensors` returned; raise ``ValueError`` if it is from another matrix."""
        blocks, peak, count = tensors["blocks"], tensors["peak"], int(tensors["count"])
        same = self._blocks is not None and blocks.shape == self._blocks.shape and peak.shape == self._peak.shape
        if not same or not 0 <= count <= (count if self.num_grads is None else self.num_grads):
            raise ValueError(
                f"{count} gradients in blocks of shape {tuple(blocks.shape)} are not of this Fisher matrix"
            )
        assert self._blocks is not None
        self._peak.copy_(peak)
        if self._sums is None:
            self._blocks.copy_(blocks)
        else:
            self._sums.load(tensors)
            self._scales = self._scales_of(self._peak)
        self.count = count

    @full_precision()
    def sums(self, phase_of: Tensor, phases: int, whole: int) -> Tensor:
        """Sum of the blocks of each phase, ``(phases, B, B)`` float64; see :func:`capruner.core.shrinkage.phases`.

        Args:
            phase_of: ``(num_blocks,)`` int64.
            whole: the first ``whole`` blocks count; those after them are padded.
        """
        assert self._blocks is not None
        assert self._sums is not None
        self._sums.settle(self._scales)
        size = self._blocks.shape[1]
        total = self.shares.new_zeros(phases, size, size)
        chunk = max(1, 2**18 // size**2)
        for start in range(0, whole, chunk):
            part = slice(start, min(start + chunk, whole))
            total.index_add_(0, phase_of[part], self._doubled(part))
        return total

    def set_common(self, common: Tensor, phase_of: Tensor) -> None:
        """Set what :meth:`inverse` shrinks the blocks towards: ``(phases, B, B)`` of any scale, and the phase of each block."""
        self._common = common, phase_of

    def _doubled(self, part: slice) -> Tensor:
        """``m F`` of some blocks in float64, their gradients' scales undone."""
        assert self._sums is not None
        A = self._sums.doubled(part)
        if self._scales is not None:
            scales = self._scales[part].double()
            A.mul_(scales[:, :, None]).mul_(scales[:, None, :])
        return A

    @full_precision()
    def inverse(self, rungs: int = 0) -> Tensor:
        """``H``, ``(num_blocks, B, B)``, symmetric, in :attr:`units`. The Fisher matrix is consumed.

        Args:
            rungs: times that the damping of a block that will not factor may grow tenfold (``accumulate``).

        Raises:
            ValueError: fewer gradients than ``num_grads`` were added, or the inverse was taken before.
            NotPositiveDefiniteError: a block will not factor.
        """
        if self._blocks is None:
            raise ValueError("the inverse was taken before")
        if self.count != (self.num_grads or max(self.count, 1)):
            raise ValueError(f"{self.count} gradients were added, num_grads says {self.num_grads}")
        blocks, self._blocks = self._blocks, None
        if self._sums is not None:
            self._sums.settle(self._scales)
        chunk = chunk_size(None, blocks.shape[1], 8, blocks.device)

        def work(part: slice) -> tuple[int, int]:
            gone = None if self.dead is None or not self.dead[part].any() else self.dead[part]
            if self.solver == "accumulate":
                return self._invert(blocks[part], gone, part.start, rungs)
            self._invert_gradients(blocks[part], gone, part.start)
            return 0, 0

        found = in_chunks(len(blocks), chunk, work, "inverting Fisher blocks", blocks.device)
        self.damped, self.drowned = (sum(counts) for counts in zip(*found)) if found else (0, 0)
        return blocks

    def _invert(self, F: Tensor, gone: Tensor | None, first_block: int, rungs: int) -> tuple[int, int]:
        """Replace ``F`` by its inverse; how many blocks needed more damping, and in how many ``damp`` drowned in rounding."""
        part = slice(first_block, first_block + len(F))
        A = self._doubled(part).div_(self.count)
        diagonal = A.diagonal(dim1=1, dim2=2)
        trace = diagonal.sum(dim=1)
        if gone is not None:
            A.masked_fill_(gone[:, :, None] | gone[:, None, :], 0)
        if self._common is not None:
            common, phase_of = self._common
            assert self._sums is not None
            fourth = self._sums.fourth[part] / self.count
            self.shares[part] = shrink(A, common, phase_of[part], gone, self.shrinkage, fourth, trace, self.count)
        damp, size = torch.full_like(diagonal[:, 0], self.damp), _mean_diagonal(A, gone)
        if self.relative_damp:
            damp = damp * size
        drowned = int((damp < torch.finfo(F.dtype).eps * diagonal.sum(dim=1)).sum())
        # A block without any gradient has no scale of its own; the loss does not feel its weights.
        none = damp == 0
        damp = damp.masked_fill(none, 1)
        diagonal.add_(damp[:, None])
        units = unit_of(_mean_diagonal(A, gone))
        if (units != 1).any():
            A /= units[:, None, None]
            damp /= units
        self.units[part] = units.masked_fill(none, NO_GRADIENT)
        if gone is not None:
            diagonal.masked_fill_(gone, 1)
        bad, damped = invert(A, F).nonzero()[:, 0], 0
        for rung in range(1, rungs + 1):
            if not len(bad):
                break
            lifted = A[bad]
            more = ((10**rung - 1) * damp[bad])[:, None]
            lifted.diagonal(dim1=1, dim2=2).add_(more if gone is None else more * ~gone[bad])
            found = torch.empty_like(lifted, dtype=F.dtype)
            good = invert(lifted, found) == 0
            F[bad[good]] = found[good]
            damped += int(good.sum())
            bad = bad[~good]
        if len(bad):
            scale = float(size.mean())
            what = (
                "damp is relative to the mean squared gradient"
                if self.relative_damp
                else f"The mean squared gradient is {scale:.2g}"
            )
            least = 1e-3 if self.relative_damp else max(scale, 1e-12) * 1e-3
            raise NotPositiveDefiniteError(
                f"Fisher block {first_block + int(bad[0])} ({len(bad)} in all) will not factor at damp {self.damp:g}"
                f"{f', nor at 10^{rungs} times that' if rungs else ''}: its rounding error is larger. {what}; "
                f"try damp={least:.1g} or more"
            )
        return damped, drowned

    def _invert_gradients(self, blocks: Tensor, gone: Tensor | None, first_block: int) -> None:
        """Replace the gradients in the first rows of each block by the inverse."""
        G, part = blocks[:, : self.count].double(), slice(first_block, first_block + len(blocks))
        if gone is not None:
            G.masked_fill_(gone[:, None], 0)
        alive = (~(torch.zeros_like(blocks[:, 0], dtype=torch.bool) if gone is None else gone)).sum(dim=1)
        H = torch.empty_like(blocks, dtype=torch.float64)
        for which, solve in ((alive <= self.count, _inverse), (alive > self.count, _woodbury)):
            if not which.any():
                continue
            found = solve(G[which], self.damp)
            if found is None:
                raise NotPositiveDefiniteError(
                    f"damp={self.damp:g} is too small beside squared gradients of up to {self.largest**2:.2g}: raise it, or use "
                    "relative_damp=True"
                )
            H[which] = found
        units = 1 / unit_of(_mean_diagonal(H, gone))
        H *= units[:, None, None]
        if gone is not None:
            H.diagonal(dim1=1, dim2=2).masked_fill_(gone, 1)
        self.units[part] = units
        blocks.copy_(H)


def _inverse(G: Tensor, damp: float) -> Tensor | None:
    """``(Gᵀ G / m + λ I)⁻¹`` of ``(n, m, B)`` gradients; None where it has no factor."""
    F = G.mT @ G / G.shape[1]
    F.diagonal(dim1=1, dim2=2).add_(damp)
    H = torch.empty_like(F)
    return None if invert(F, H).any() else H


def _woodbury(G: Tensor, damp: float) -> Tensor | None:
    """The same from a factor of ``m`` rows."""
    inner = G @ G.mT
    inner.diagonal(dim1=1, dim2=2).add_(G.shape[1] * damp)
    factor, info = cholesky(inner)
    if info.any():
        return None
    half = torch.linalg.solve_triangular(factor, G, upper=False)
    H = -(half.mT @ half)
    H.diagonal(dim1=1, dim2=2).add_(1)
    return H / damp


def _choose_solver(
    solver: Solver,
    block_size: int,
    num_grads: int | None,
    relative_damp: bool,
    shrinkage: float | None,
    triangular: bool,
) -> Solver:
    """The solver to use; raise ``ValueError`` for one that cannot do what is asked for."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
    if triangular and solver == "auto":
        solver = "accumulate"
    if triangular and solver == "woodbury":
        raise ValueError("triangular means accumulating: use solver='accumulate'")
    if relative_damp and solver == "woodbury":
        raise ValueError("relative_damp needs the mean diagonal before the inverse: use solver='accumulate'")
    if shrinkage != 0 and solver == "woodbury":
        raise ValueError("shrinkage needs the Fisher matrix before the inverse: use solver='accumulate'")
    if num_grads is None and solver == "woodbury":
        raise ValueError("woodbury needs to know num_grads: use solver='accumulate'")
    exact = solver != "accumulate" and not relative_damp and shrinkage == 0
    return "woodbury" if exact and num_grads is not None and num_grads < block_size else "accumulate"


def _mean_diagonal(A: Tensor, gone: Tensor | None) -> Tensor:
    """``(n,)``, of the weights that are not gone."""
    diagonal = A.diagonal(dim1=1, dim2=2)
    if gone is None:
        return diagonal.mean(dim=1)
    return diagonal.masked_fill(gone, 0).sum(dim=1) / (~gone).sum(dim=1).clamp_(min=1)
