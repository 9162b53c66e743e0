"""Cholesky factors and inverses of many matrices in float64: compiled on CPUs with numba, else by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from capruner.core.kernels import matrices_kernel_for

LARGEST = 768
"""Rows above which LAPACK is as fast or faster."""


def permuted(H: Tensor, order: Tensor) -> Tensor:
    """Symmetric ``(n, B, B)`` matrices in float64, rows and columns in the given order, ``(n, B)`` int64."""
    return H.gather(1, order[:, :, None].expand_as(H)).gather(2, order[:, None].expand_as(H)).double()


def cholesky(H: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The float64 factors ``L`` of symmetric matrices, or of :func:`permuted` ones.

    Returns:
        ``L`` and ``(n,)``, not 0 for a matrix that is not positive definite, whose factor is then of no use.
    """
    kernel = matrices_kernel_for(H.device)
    if kernel is None or H.shape[1] > LARGEST:
        return torch.linalg.cholesky_ex(H.double() if order is None else permuted(H, order))
    if order is None:
        order = torch.arange(H.shape[1]).expand(H.shape[:2])
    upper, info = torch.empty(H.shape, dtype=torch.float64), torch.empty(len(H), dtype=torch.int32)
    kernel.factor(H.contiguous(), order.contiguous(), upper, info)
    return upper.mT, info


def invert(A: Tensor, out: Tensor) -> Tensor:
    """Write the inverses of symmetric positive definite ``(n, B, B)`` float64 matrices into ``out``, in its dtype.

    Returns:
        ``(n,)``, not 0 for a matrix that is not positive definite, whose inverse is then of no use.
    """
    kernel = matrices_kernel_for(A.device)
    if kernel is None or A.shape[1] > LARGEST or not out.is_contiguous():
        L, info = torch.linalg.cholesky_ex(A)
        L.diagonal(dim1=1, dim2=2).masked_fill_((info != 0)[:, None], 1)  # a zero there would be an error
        out.copy_(torch.cholesky_inverse(L))
        return info
    info = torch.empty(len(A), dtype=torch.int32)
    kernel.invert(A.contiguous(), out, info)
    return info
