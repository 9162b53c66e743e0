"""Guards for GPUs on machines without one: a simulated accelerator, and the Triton kernel compiled ahead of time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HELPERS = Path(__file__).with_name("helpers")
CASES = [
    f"{method} {mask}"
    for method in ("cap", "fast_cap", "obs", "magnitude")
    for mask in ("unstructured", "2:4", "block4")
]
CASES += ["recomputation", "distill", "compensate_masks", "recalibrate_bn", "sparsest", "GradualPruner"]
GPUS = ["sm_80", "sm_90", "sm_100"]


def run(script: str) -> dict[str, object]:
    """The JSON that a helper prints. Each changes torch or triton for its whole process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HELPERS / script)],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def outcomes() -> dict[str, object]:
    return run("on_accelerator.py")


@pytest.fixture(scope="module")
def resources() -> dict[str, object]:
    return run("compile_triton.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no Python backends; they came with 2.10",
)
@pytest.mark.parametrize("case", CASES)
def test_an_accelerator_gives_the_cpus_masks_and_weights(case: str, outcomes: dict[str, object]) -> None:
    assert outcomes[case] == "equal"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("width", [64, 256])
def test_the_kernel_compiles_without_spills(gpu: str, width: int, resources: dict[str, dict[str, int]]) -> None:
    used = resources[f"{gpu} {width}"]
    assert used["spills"] == 0
    assert used["registers"] <= 160
