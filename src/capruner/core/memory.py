"""Bytes: how many there may be, and what to do when there are too few."""

from __future__ import annotations

import logging
import math
import re

import torch

_LOGGER = logging.getLogger(__name__)

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or a text such as ``"8GiB"`` or ``"500 MB"``; raise ``ValueError`` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in UNITS:
        raise ValueError(f"memory_budget must be bytes or a size such as '8GiB' or '500MB', got {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


def shown(size: int, up: bool = False) -> str:
    """Bytes for people. ``up``: never fewer than there are, so that they can be given back as a budget."""
    unit, digits, name = (2**30, 2, "GiB") if size >= 2**29 else (2**20, 0, "MiB")
    value = size / unit
    if up:
        value = math.ceil(value * 10**digits) / 10**digits
    return f"{value:.{digits}f} {name}"


def halved(chunk: int, what: str) -> int:
    """Half of ``chunk``, with room made and a line in the log."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _LOGGER.warning("%s: %d at once are too many for the GPU's memory; going on with %d", what, chunk, chunk // 2)
    return chunk // 2
