"""Precision of the second-order algebra, and the error it raises when precision is not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class NotPositiveDefiniteError(ValueError):
    """A Fisher block, or its inverse, is not positive definite to working precision. The message says where and what damping to try."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed in for a parameter or gradient: float64 stays, everything else is float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no autograd inside, whatever the training script has set.

    An inverse Fisher block starts at ``1/damp`` (1e8 and more): with the 10-bit mantissa of TF32 its small eigenvalues drown and diagonals go negative.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
