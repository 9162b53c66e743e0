"""The compiled eliminations against the one made of torch's operations."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import capruner
from capruner.core import elimination as obs
from capruner.core.kernels import kernel_for


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    """Each kernel; Triton's runs in its interpreter where there is no GPU (see conftest.py)."""
    pytest.importorskip({"cpu": "numba", "cuda": "triton"}[request.param])
    return importlib.import_module(f"capruner.core.kernels.{request.param}")


def problem(n: int, B: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, B, B, generator=generator, dtype=dtype)
    return torch.randn(n, B, generator=generator, dtype=dtype), A @ A.mT / B + 0.1 * torch.eye(B, dtype=dtype)


def by(
    kernel: ModuleType | None, monkeypatch: pytest.MonkeyPatch, *args: Tensor, **settings: object
) -> obs.Elimination:
    with monkeypatch.context() as patch:
        patch.setattr(obs, "kernel_for", lambda device: kernel)
        return obs.eliminate(*args, **settings)  # type: ignore[arg-type]


def place(kernel: ModuleType, *tensors: Tensor | None) -> list[Tensor | None]:
    on = "cuda" if kernel.__name__.endswith("cuda") and torch.cuda.is_available() else "cpu"
    return [None if t is None else t.to(on) for t in tensors]


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 5),
    B=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    steps=st.one_of(st.none(), st.integers(0, 10)),
    double=st.booleans(),
)
def test_same_order_and_losses_as_torch(
    kernel: ModuleType, n: int, B: int, seed: int, masked: float, steps: int | None, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    w, H = problem(n, B, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(n, B, generator=generator) < masked
    frozen = ~dead & (torch.rand(n, B, generator=generator) < masked / 2)
    with pytest.MonkeyPatch.context() as patch:
        w_, H_, dead_, frozen_ = place(kernel, w, H, dead, frozen)
        ours = by(kernel, patch, w_, H_, dead=dead_, frozen=frozen_, max_steps=steps)
        reference = by(None, patch, w, H, dead=dead, frozen=frozen, max_steps=steps)
    torch.testing.assert_close(ours.order.cpu(), reference.order)
    torch.testing.assert_close(ours.losses.cpu(), reference.losses, rtol=1e-3 if not double else 1e-8, atol=1e-6)


@pytest.mark.parametrize(("stay", "group"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_same_groups_as_torch(kernel: ModuleType, stay: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, H = problem(4, 16, 3, torch.float64)
    dead = torch.zeros(4, 16, dtype=torch.bool)
    dead[0, :group] = True  # a group that is empty already
    dead[1, 1] = True
    w_, H_, dead_ = place(kernel, w, H, dead)
    ours = by(kernel, monkeypatch, w_, H_, dead=dead_, n_m=(stay, group))
    reference = by(None, monkeypatch, w, H, dead=dead, n_m=(stay, group))
    torch.testing.assert_close(ours.order.cpu(), reference.order)
    torch.testing.assert_close(ours.losses.cpu(), reference.losses)


def test_ties_go_to_the_first_though_columns_have_moved(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    w_, H_ = place(kernel, torch.tensor([[3.0, 1, 2, 1, 1, 2]]), torch.eye(6)[None])
    assert by(kernel, monkeypatch, w_, H_).order.tolist() == [[1, 3, 4, 2, 5, 0]]


def test_a_large_block(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    w, H = problem(2, 70, 1, torch.float64)
    w_, H_ = place(kernel, w, H)
    ours, reference = by(kernel, monkeypatch, w_, H_), by(None, monkeypatch, w, H)
    torch.testing.assert_close(ours.order.cpu(), reference.order)
    torch.testing.assert_close(ours.losses.cpu(), reference.losses)


def test_inputs_stay_as_they_are(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    w, H = problem(3, 8, 2, torch.float32)
    w_, H_ = place(kernel, w.clone(), H.clone())
    by(kernel, monkeypatch, w_, H_, max_steps=5)
    assert torch.equal(w_.cpu(), w)
    assert torch.equal(H_.cpu(), H)


def test_cpus_use_the_compiled_one_where_numba_is_installed() -> None:
    pytest.importorskip("numba")
    kernel = kernel_for(torch.device("cpu"))
    assert kernel is not None
    assert kernel.__name__ == "capruner.core.kernels.cpu"


def test_a_device_without_a_kernel_of_its_own_uses_torch() -> None:
    assert kernel_for(torch.device("meta")) is None


NO_CACHE = """
import sys, pathlib
import numba.core.caching as caching
import torch
if sys.argv[1] == "no place":
    caching.CacheImpl._locator_classes = []
else:
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    caching.Cache.save_overload = caching.IndexDataCacheFile.save = full
from capruner.methods import CAP
from capruner.core.elimination import eliminate
found = eliminate(torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3)[None])
print(found.order.tolist(), "capruner.core.kernels.cpu" in sys.modules)
"""


@pytest.mark.promise("Memory", "In a read-only container numba's code is compiled in memory")
@pytest.mark.parametrize("case", ["no place", "full"])
def test_without_a_place_for_compiled_code_it_is_compiled_all_the_same(case: str, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", NO_CACHE, case], capture_output=True, text=True, env=environment)
    assert done.stdout.split("\n")[0] == "[[1, 2, 0]] True", done.stderr


@pytest.mark.promise("Memory", "Code is compiled before the first gradient")
def test_compiled_before_the_first_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("no compiler")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("a gradient was drawn")

    monkeypatch.setattr(obs, "kernel_for", broken)
    data = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(RuntimeError, match="no compiler"):
        capruner.prune(torch.nn.Linear(3, 2), data, loss, 0.5, num_grads=1, progress=False)
