"""Cholesky factors of many float64 matrices, also in another order, and the inverses that belong to them: compiled on CPUs with numba, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from capruner.core.kernels import matrices_kernel_for

LARGEST = 768
"""Rows above which LAPACK is as fast or faster."""


def permuted(H: Tensor, order: Tensor) -> Tensor:
    """Symmetric ``(n, B, B)`` matrices in float64, rows and columns in the given order, ``(n, B)`` int64."""
    kernel = matrices_kernel_for(H.device)
    if kernel is None:
        return H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None].expand_as(H)).double()
    out = torch.empty(H.shape, dtype=torch.float64)
    kernel.permute(H, order, out)
    return out


def cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """The factors ``L`` of symmetric ``(n, B, B)`` float64 matrices, and ``(n,)``: not 0 for a matrix without one, as ``torch.linalg.cholesky_ex``."""
    kernel = matrices_kernel_for(A.device)
    if kernel is None or A.shape[1] > LARGEST:
        return torch.linalg.cholesky_ex(A)
    upper, info = torch.empty(A.shape, dtype=A.dtype), torch.empty(len(A), dtype=torch.int32)
    kernel.factor(A.contiguous(), upper, info)
    return upper.mT, info


def inverse(L: Tensor, out: Tensor) -> Tensor:
    """Write the inverses of ``L Lᵀ`` into ``out``, in its dtype; ``L`` is what :func:`cholesky` returned."""
    kernel = matrices_kernel_for(L.device)
    if kernel is None or L.shape[1] > LARGEST or not out.is_contiguous():
        return out.copy_(torch.cholesky_inverse(L))
    kernel.invert(L.mT.contiguous(), out)
    return out
