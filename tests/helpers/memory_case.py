"""Three layers that a memory budget splits into groups."""

from __future__ import annotations

import torch
from torch import nn

from capruner.calibration.memory_plan import WORKING_SET


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 5))


TWO_GROUPS = WORKING_SET + 60 * 60 * (60 + 6 + 8) * 4 + 1000  # the middle layer alone, or the two others together
