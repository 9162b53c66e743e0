"""For every test: one thread (the machine is shared, and tiny tensors gain nothing from more) and a seed."""

from __future__ import annotations

import os

# SparseML sends usage events when it is imported.
os.environ["NM_DISABLE_ANALYTICS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Triton kernels then run in Triton's interpreter, which has to be asked for before triton is imported (timm does).
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
