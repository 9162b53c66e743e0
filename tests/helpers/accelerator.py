"""A simulated accelerator: tensors on device ``sim`` hold CPU memory, and refuse to mix with CPU tensors as those of a GPU do.

It finds tensors that code creates on the CPU, or forgets to move, without a GPU. Registering a device changes torch for the rest of the process: import this
in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "sim"


class _Module:
    """What torch expects in ``torch.sim``; random numbers come from the CPU's generator."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = manual_seed_all = staticmethod(lambda *args: None)
    get_rng_state = staticmethod(lambda device=0: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=0: torch.set_rng_state(state))


_setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())

_aten = torch.ops.aten
_CROSSING = {_aten.copy_.default, _aten._to_copy.default, _aten._copy_from.default, _aten._copy_from_and_resize.default}
"""Operators that move data between devices."""


class SimTensor(Tensor):
    """A tensor on ``sim``; ``held`` is the CPU tensor that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE, 0),
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operator, args, kwargs or {})

    def __repr__(self) -> str:
        return f"SimTensor({self.held})"


def _run(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU tensors inside; results are on ``sim`` unless it copies to the CPU."""
    wrappers: dict[int, SimTensor] = {}

    def enter(value: Any) -> Any:
        if isinstance(value, SimTensor):
            wrappers[id(value.held)] = value
            return value.held
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, Tensor) and value.dim() and operator not in _CROSSING:
            raise RuntimeError(
                f"{operator}: expected all tensors on {DEVICE}, got one of shape {tuple(value.shape)} on cpu"
            )
        return value

    device = kwargs.get("device")
    to_cpu = device is not None and torch.device(device).type == "cpu"
    if operator in _CROSSING and args and not isinstance(args[0], SimTensor):
        to_cpu = to_cpu or device is None
    args, kwargs = pytree.tree_map(enter, (args, kwargs))

    def leave(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = wrappers.get(id(value))
        return known if known is not None else value if to_cpu else SimTensor(value)

    return pytree.tree_map(leave, operator(*args, **kwargs))


def _factory(operator: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operator, args, kwargs)


# torch.tensor(..., device="sim") copies below Python's dispatch, where the fallback is not looked up.
_copies = torch.library.Library("aten", "IMPL")
_copies.impl("copy_", lambda *args, **kwargs: _run(_aten.copy_.default, args, kwargs), "PrivateUse1")
_library = torch.library.Library("_", "IMPL")
_library.fallback(_factory, "PrivateUse1")
