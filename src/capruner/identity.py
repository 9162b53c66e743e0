"""Digests of the code of a loss, of a model and of batches, so that a resumed run notices that one of them was changed.

Compared are compiled code, default arguments, values closed over, and functions and constants of the same module. Not compared are functions of other modules
(but for their names), lists and dicts, variables that the code itself changes, and whole numbers that are closed over, global, or
held by an object that is called as the loss: they may be counters.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capruner.files import digest

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)
_ELSEWHERE = ("torch", "builtins")
"""Packages whose code is known by their version."""
_STORED: dict[type, set[str]] = {}
DEEPEST = 10
"""Objects within objects of a batch; some refer to each other in circles."""


def loss_digest(loss_fn: Callable[..., Any]) -> str:
    """Digest of the code that computes the loss."""
    return digest(_callable(loss_fn, set()))


def model_digest(model: nn.Module) -> str:
    """Digest of a model's modules: names, classes and their code, and attributes that ``__init__`` alone sets. Weights and buffers apart."""
    seen: set[int] = set()
    return digest(part for name, module in model.named_modules() for part in (name, *_module(module, seen)))


def batch_digest(batch: Any) -> str:
    """Digest of all values of a batch, short enough that one for each batch can be kept."""
    return digest(_values(batch))[:16]


def _values(value: Any, depth: int = 0) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}"
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield from _values(torch.from_numpy(np.ascontiguousarray(value)), depth + 1)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key)
            yield from _values(item, depth + 1)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} values"
        for item in value:
            yield from _values(item, depth + 1)
    elif isinstance(value, _PLAIN):
        yield repr(value)
    else:
        yield type(value).__qualname__
        if depth < DEEPEST:
            yield from _values(getattr(value, "__dict__", None), depth + 1)


def _callable(value: Any, seen: set[int]) -> Iterator[Any]:
    """The parts of anything that can be called."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, functools.partial):
        yield from _callable(value.func, seen)
        for key, item in (*enumerate(value.args), *sorted(value.keywords.items())):
            yield str(key)
            yield from _constant(item, seen)
    elif isinstance(value, types.MethodType):
        yield from _callable(value.__func__, seen)
        yield from _callables_of(value.__self__, seen)
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, type):
        yield from _class(value, seen)
    elif isinstance(value, nn.Module):
        for name, module in value.named_modules():
            yield name
            yield from _module(module, seen)
        for name, tensor in value.state_dict().items():
            yield name
            yield from _values(tensor)
    elif isinstance(value, types.BuiltinFunctionType) or _is_elsewhere(value):
        yield f"{_module_of(value)}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    else:
        yield from _class(type(value), seen)
        yield from _callables_of(value, seen)


def _callables_of(owner: Any, seen: set[int]) -> Iterator[Any]:
    """What an object holds that decides what it computes: functions, and numbers other than whole ones, which may be counters."""
    if isinstance(owner, nn.Module):
        yield from _callable(owner, seen)
        return
    changed = _stored_by_methods(type(owner))
    kinds = (float, str, Tensor, types.FunctionType, types.BuiltinFunctionType, functools.partial, nn.Module)
    for name, item in sorted(getattr(owner, "__dict__", {}).items()):
        if name not in changed and isinstance(item, kinds):
            yield name
            yield from _constant(item, seen)


def _function(function: types.FunctionType, seen: set[int]) -> Iterator[Any]:
    if _is_elsewhere(function):
        yield f"{function.__module__}.{function.__qualname__}"
        return
    yield from _code(function.__code__)
    for item in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield from _constant(item, seen)
    changed = _stored(function.__code__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        if name not in changed and not _is_empty(cell):
            yield name
            yield from _constant("a number" if type(cell.cell_contents) is int else cell.cell_contents, seen)
    for name in _names(function.__code__):
        item = function.__globals__.get(name)
        own = isinstance(item, types.FunctionType | type) and item.__module__ == function.__module__
        if name not in changed and (own or isinstance(item, bool | float | str)):
            yield name
            yield from _constant(item, seen)


def _constant(value: Any, seen: set[int]) -> Iterator[Any]:
    """A value that code refers to: itself where it cannot change, else its type."""
    if isinstance(value, tuple | frozenset):
        for item in sorted(value, key=repr) if isinstance(value, frozenset) else value:
            yield from _constant(item, seen)
    elif isinstance(value, (Tensor, *_PLAIN)):
        yield from _values(value)
    elif isinstance(value, types.CodeType):
        yield from _code(value)
    elif callable(value):
        yield from _callable(value, seen)
    else:
        yield type(value).__qualname__


def _code(code: types.CodeType) -> Iterator[str]:
    """Instructions, names and constants; not file names and line numbers, so that comments may change."""
    yield code.co_name
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)


def _class(cls: type, seen: set[int]) -> Iterator[Any]:
    """The methods of a class and of its bases, those of torch apart."""
    for base in cls.__mro__:
        yield f"{base.__module__}.{base.__qualname__}" if _is_elsewhere(base) else base.__name__
        if id(base) in seen or _is_elsewhere(base):
            continue
        seen.add(id(base))
        for name, item in sorted(vars(base).items()):
            for function in _functions(item):
                yield name
                yield from _function(function, seen)


def _functions(item: Any) -> list[types.FunctionType]:
    if isinstance(item, property):
        return [f for f in (item.fget, item.fset) if isinstance(f, types.FunctionType)]
    item = item.__func__ if isinstance(item, staticmethod | classmethod) else item
    item = inspect.unwrap(item) if isinstance(item, types.FunctionType) else item
    return [item] if isinstance(item, types.FunctionType) else []


def _module(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    yield from _class(type(module), seen)
    changed = {"training"} | _stored_by_methods(type(module))
    for name, item in sorted(vars(module).items()):
        if name not in changed and not name.startswith("_") and (isinstance(item, (*_PLAIN, tuple)) or callable(item)):
            yield name
            yield from _constant(item, seen)


def _stored_by_methods(cls: type) -> set[str]:
    """Attributes that something other than ``__init__`` sets, a counter in ``forward`` for example."""
    if cls not in _STORED:
        bases = [base for base in cls.__mro__ if not _is_elsewhere(base)]
        items = [item for base in bases for name, item in vars(base).items() if name != "__init__"]
        _STORED[cls] = {name for item in items for f in _functions(item) for name in _stored(f.__code__)}
    return _STORED[cls]


def _stored(code: types.CodeType) -> set[str]:
    """Names that code assigns to outside of its own variables."""
    found = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_ATTR", "STORE_DEREF", "STORE_GLOBAL", "DELETE_ATTR")
    }
    return found.union(*(_stored(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _names(code: types.CodeType) -> list[str]:
    inner = [name for c in code.co_consts if isinstance(c, types.CodeType) for name in _names(c)]
    return sorted({*code.co_names, *inner})


def _is_elsewhere(value: Any) -> bool:
    return _module_of(value).partition(".")[0] in _ELSEWHERE


def _module_of(value: Any) -> str:
    return str(getattr(value, "__module__", None) or type(value).__module__)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False
