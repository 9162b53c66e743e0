"""Powers of two for extreme gradients: a float32 holds 1e-30, but not its square.

The gradients of a weight are divided by a scale that keeps their squares within range, and a block whose inverse is out of range is divided by a unit. Both
are exactly 1 for ordinary gradients, and powers of two otherwise, so that they add no rounding error.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

NO_GRADIENT = 2.0**-800
"""Unit of a block whose gradients are all zero, with relative damping: its weights are pruned first, by magnitude."""

MODERATE_PEAKS = (2.0**-32, 2.0**32)
"""No scale is needed while the largest absolute gradient of every weight lies between these."""

_PEAKS = (2.0**-96, MODERATE_PEAKS[0], MODERATE_PEAKS[1], 2.0**96)
_SCALES = (2.0**-120, 2.0**-64, 1.0, 2.0**64, 2.0**120)
"""The scale of a weight whose largest absolute gradient lies between two of ``_PEAKS``."""

_MODERATE_EXPONENT = 80
"""A block is inverted as it is while the mean of its diagonal lies between 2 to the minus and plus this power."""


def scale_of(peak: float) -> float:
    """The scale of gradients whose largest absolute value is ``peak``; 1 for 0."""
    return _SCALES[bisect_left(_PEAKS, peak)] if peak else 1.0


def scales_of(peaks: Tensor) -> Tensor | None:
    """:func:`scale_of` each element; None where all scales are 1."""
    if _moderate(peaks) or _moderate(peaks := peaks.masked_fill(peaks == 0, 1)):
        return None
    return peaks.new_tensor(_SCALES)[torch.bucketize(peaks, peaks.new_tensor(_PEAKS))]


def _moderate(peaks: Tensor) -> bool:
    if not peaks.numel():
        return True
    least, most = peaks.aminmax()
    return bool(least >= MODERATE_PEAKS[0]) and bool(most <= MODERATE_PEAKS[1])


def largest(gradients: Tensor) -> Tensor:
    """Largest absolute value over dim 0."""
    if len(gradients) > 64:
        return torch.maximum(gradients.amax(dim=0), -gradients.amin(dim=0))
    peaks = gradients[0].abs()  # for few long rows three times as fast as amax()
    for row in gradients[1:]:
        torch.maximum(peaks, row.abs(), out=peaks)
    return peaks


def unit_of(size: Tensor) -> Tensor:
    """A power of two near each element of ``size`` (float64) that is extreme, else 1."""
    mantissa, exponent = torch.frexp(size)
    extreme = (exponent.abs() > _MODERATE_EXPONENT) & (size > 0)
    return torch.where(extreme, size / mantissa, torch.ones_like(size))
