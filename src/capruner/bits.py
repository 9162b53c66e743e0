"""Masks as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """One bit per entry, eight in a byte."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The inverse of :func:`pack`; raise ``TypeError`` for anything but the bytes of ``shape``."""
    count = math.prod(shape)
    size = (count + 7) // 8
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (size,):
        raise TypeError(f"the saved mask of {name} does not have the {size} bytes of shape {tuple(shape)}")
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).reshape(tuple(shape))
