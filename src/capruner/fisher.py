"""Blockwise empirical Fisher matrix, ``F = (1/m) Σ g gᵀ + λ I`` per block of ``B`` weights, and its inverse ``H``.

Two ways lead to ``H``; both take slabs of ``k`` gradients at a time, so that a block is read and written once per slab and not once per gradient:

``woodbury``
    ``H ← H − H Gᵀ (m I + G H Gᵀ)⁻¹ G H`` from ``H = I/λ``. Exact in the directions no gradient has seen, whatever the size of ``λ``.
``accumulate``
    ``F += Gᵀ G / m`` (half the flops), then one Cholesky inverse in float64. Directions no gradient has seen are known to the rounding of ``F``.

A block that will not factor climbs a ladder of damping, alone: tenfold at each rung, counted, and past the last rung an error.

``auto`` takes ``woodbury`` while there are fewer gradients than weights in a block (the Fisher matrix is then singular but for ``λ``), else ``accumulate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from capruner.chunks import chunk_size, in_chunks
from capruner.numerics import NotPositiveDefiniteError, full_precision

Solver = Literal["auto", "woodbury", "accumulate"]

RUNGS = 6
"""Times that the damping of a block may grow tenfold."""


NO_GRADIENT = 1e-24
"""Diagonal of a block whose gradients are all zero, where damping is relative: below any that has some; its inverse still is a float32."""


class BlockFisher:
    """The Fisher blocks of one weight tensor, fed with gradients, then inverted once.

    Holds ``num_blocks · B²`` numbers, in which the inverse replaces the matrix.

    Args:
        num_blocks: ``n``.
        block_size: ``B``.
        num_grads: number of gradients ``m`` that will be added; known beforehand because Woodbury needs it.
        damp: ``λ > 0``, absolute, in units of a squared gradient.
        relative_damp: ``λ`` is instead this fraction of the mean diagonal of each block (needs the ``accumulate`` solver).
        solver: see the module's docstring.
        triangular: accumulate the upper triangle alone; pays for few blocks that are fed with many rows at a time.
        dtype: float32, or float64 for reference computations.

    Attributes:
        damped: blocks that needed more than ``damp``, after :meth:`inverse`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_grads: int,
        damp: float,
        *,
        relative_damp: bool = False,
        solver: Solver = "auto",
        triangular: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not damp > 0 or damp == float("inf"):
            raise ValueError(f"damp must be a positive number, got {damp}; 1e-8 to 1e-4 are usual")
        if num_grads < 1:
            raise ValueError(f"num_grads must be at least 1, got {num_grads}")
        if solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
        if triangular and solver == "auto":
            solver = "accumulate"
        if triangular and solver == "woodbury":
            raise ValueError("triangular means accumulating: use solver='accumulate'")
        if relative_damp and solver == "woodbury":
            raise ValueError("relative_damp needs the mean diagonal before the inverse: use solver='accumulate'")
        if solver == "auto":
            solver = "woodbury" if num_grads < block_size and not relative_damp else "accumulate"
        self.solver = solver
        self.triangular = triangular
        self.num_grads = num_grads
        self.damp = damp
        self.relative_damp = relative_damp
        self.count = 0
        self.damped = 0
        self._blocks: Tensor | None = torch.zeros(num_blocks, block_size, block_size, device=device, dtype=dtype)
        if solver == "woodbury":
            self._blocks.diagonal(dim1=1, dim2=2).fill_(1 / damp)

    @full_precision()
    def add(self, gradients: Tensor) -> None:
        """Fold in ``(k, num_blocks, B)`` gradients.

        Raises:
            ValueError: more than ``num_grads`` in all, or already inverted.
        """
        if self._blocks is None:
            raise ValueError("the Fisher matrix is inverted already; make a new BlockFisher for new gradients")
        self.count += len(gradients)
        if self.count > self.num_grads:
            raise ValueError(f"more gradients ({self.count}) than num_grads ({self.num_grads})")
        slabs = gradients.to(self._blocks).transpose(0, 1)  # (n, k, B)
        if self.triangular:
            for F, G in zip(self._blocks, slabs):
                _add_upper(F, G, 1 / self.num_grads)
            return
        if self.solver == "accumulate":
            self._blocks.baddbmm_(slabs.mT, slabs, alpha=1 / self.num_grads)
            return
        chunk = chunk_size(None, slabs.shape[2], self._blocks.element_size(), self._blocks.device)

        def work(part: slice) -> None:
            assert self._blocks is not None
            H, G = self._blocks[part], slabs[part]
            GH = G @ H
            inner = GH @ G.mT
            inner.diagonal(dim1=1, dim2=2).add_(self.num_grads)
            # inner is well conditioned (its smallest eigenvalue is m), so this factor always exists for finite gradients.
            half = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), GH, upper=False)
            H.baddbmm_(half.mT, half, alpha=-1)

        in_chunks(len(slabs), chunk, work, "adding gradients", self._blocks.device)

    def tensors(self) -> dict[str, Tensor]:
        """What was added so far, for :meth:`load`; the blocks themselves, not a copy."""
        if self._blocks is None:
            raise ValueError("the Fisher matrix is inverted already; there is nothing to save")
        return {"blocks": self._blocks, "count": torch.tensor(self.count)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`tensors` gave.

        Raises:
            ValueError: it is of another matrix.
        """
        blocks, count = tensors["blocks"], int(tensors["count"])
        if self._blocks is None or blocks.shape != self._blocks.shape or not 0 <= count <= self.num_grads:
            raise ValueError(
                f"{count} gradients in blocks of shape {tuple(blocks.shape)} are not of this Fisher matrix"
            )
        self._blocks.copy_(blocks)
        self.count = count

    @full_precision()
    def inverse(self, dead: Tensor | None = None, rungs: int = 0) -> Tensor:
        """``H``, ``(num_blocks, B, B)``, symmetric. The Fisher matrix is consumed.

        Args:
            dead: ``(num_blocks, B)`` bool; padding, or weights removed earlier. They are cut off from the others (as if their gradients had been
                zero) and get a unit diagonal.
            rungs: times that the damping of a block that will not factor may grow tenfold (``accumulate``).

        Raises:
            ValueError: fewer gradients than ``num_grads`` were added, or the inverse was taken before.
            NotPositiveDefiniteError: a block will not factor.
        """
        if self._blocks is None:
            raise ValueError("the inverse was taken before")
        if self.count != self.num_grads:
            raise ValueError(f"{self.count} gradients were added, num_grads says {self.num_grads}")
        blocks, self._blocks = self._blocks, None
        if self.triangular:
            blocks.copy_(blocks.triu() + blocks.triu(1).mT)
        chunk = chunk_size(None, blocks.shape[1], 8, blocks.device)

        def work(part: slice) -> int:
            gone = None if dead is None else dead[part]
            if self.solver == "accumulate":
                return self._invert(blocks[part], gone, part.start, rungs)
            if gone is not None and gone.any():
                self._decouple_inverse(blocks[part], gone)
            return 0

        self.damped = sum(in_chunks(len(blocks), chunk, work, "inverting Fisher blocks", blocks.device))
        return blocks

    def _invert(self, F: Tensor, gone: Tensor | None, first_block: int, rungs: int) -> int:
        """Replace ``F`` by its inverse; how many blocks needed more damping."""
        A = F.double()
        diagonal = A.diagonal(dim1=1, dim2=2)
        if gone is not None:
            A.masked_fill_(gone[:, :, None] | gone[:, None, :], 0)
        damp = torch.full_like(diagonal[:, 0], self.damp)
        if self.relative_damp:
            alive = F.shape[1] if gone is None else (~gone).sum(dim=1).clamp_(min=1)
            damp = damp * diagonal.sum(dim=1) / alive
            # A block without any gradient has no scale of its own. The loss does not feel its weights: they are the first to leave, by magnitude.
            damp = torch.where(damp > 0, damp, torch.full_like(damp, NO_GRADIENT))
        diagonal.add_(damp[:, None])
        if gone is not None:
            diagonal.masked_fill_(gone, 1)
        factor, info = torch.linalg.cholesky_ex(A)
        bad, damped = info.nonzero()[:, 0], 0
        for rung in range(1, rungs + 1):
            if not len(bad):
                break
            lifted = A[bad]
            more = ((10**rung - 1) * damp[bad])[:, None]
            lifted.diagonal(dim1=1, dim2=2).add_(more if gone is None else more * ~gone[bad])
            found, info = torch.linalg.cholesky_ex(lifted)
            good = info == 0
            factor[bad[good]] = found[good]
            damped += int(good.sum())
            bad = bad[~good]
        if len(bad):
            scale = float(F.diagonal(dim1=1, dim2=2).mean())
            raise NotPositiveDefiniteError(
                f"Fisher block {first_block + int(bad[0])} ({len(bad)} in all) will not factor at damp {self.damp:g}"
                f"{f', nor at 10^{rungs} times that' if rungs else ''}: its rounding error is larger. The mean squared gradient is {scale:.2g}; "
                f"try damp={max(scale, 1e-12) * 1e-3:.1g} or more"
            )
        F.copy_(torch.cholesky_inverse(factor))
        return damped

    @staticmethod
    def _decouple_inverse(H: Tensor, gone: Tensor) -> None:
        # Eliminating the dead from H (a Schur complement) gives the inverse of the Fisher matrix of the living.
        A = H.double()
        system = A * (gone[:, :, None] & gone[:, None, :])
        system.diagonal(dim1=1, dim2=2).add_((~gone).double())
        factor, info = torch.linalg.cholesky_ex(system)
        if info.any():
            raise NotPositiveDefiniteError(
                f"{int((info > 0).sum())} inverse Fisher blocks are not positive definite to working precision; raise `damp` tenfold, or use "
                "solver='accumulate'"
            )
        half = torch.linalg.solve_triangular(factor, A * gone[:, :, None], upper=False)
        A.baddbmm_(half.mT, half, alpha=-1)
        A.masked_fill_(gone[:, :, None] | gone[:, None, :], 0)
        A.diagonal(dim1=1, dim2=2).add_(gone.double())
        H.copy_(A)


def _add_upper(F: Tensor, G: Tensor, scale: float) -> None:
    """``F += scale · Gᵀ G`` on and above the diagonal, in strips: 10/16 of the products."""
    width = -(-F.shape[0] // 4)
    for i in range(0, F.shape[0], width):
        F[i : i + width, i:].addmm_(G[:, i : i + width].mT, G[:, i:], alpha=scale)
