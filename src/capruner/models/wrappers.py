"""Wrappers around a model, or around parts of it: parameter names are those of the plain model.

``torch.compile`` puts ``_orig_mod.`` into the names, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel`` put ``module.``, activation
checkpointing ``_checkpoint_wrapped_module.``. Here all of them are looked through, so that masks and results fit the model with and without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import AveragedModel

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_PREFIXES = ("_orig_mod", "_checkpoint_wrapped_module")
_SHARDED = ("_fsdp_wrapped_module", "_flat_param")

Value = TypeVar("Value")


def _inner(module: nn.Module) -> str | None:
    """The attribute under which a wrapper holds what it wraps, else None; raise ``ValueError`` for one that shards the weights."""
    if isinstance(module, _PARALLEL):
        return "module"
    sharded = any(key in module._modules or key in module._parameters for key in _SHARDED)
    if sharded or any(type(p).__name__ == "DTensor" for p in module._parameters.values()):
        raise ValueError(
            f"the weights of {type(module).__name__} are sharded over processes (FSDP or another DTensor layout), and no process holds a whole "
            "one; use the plain model, before it is sharded"
        )
    return next((key for key in _PREFIXES if key in module._modules), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers around it; wrappers around parts of it stay where they are."""
    while (key := _inner(model)) is not None:
        model = model.get_submodule(key)
    return model


def walk(model: nn.Module, own: str = "", plain: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """``(prefix in the model, prefix without wrappers, module)`` of every module that is not a wrapper, shared ones at each of their places."""
    key = _inner(model)
    if key is not None:
        yield from walk(model.get_submodule(key), f"{own}{key}.", plain)
        return
    yield own, plain, model
    for name, child in model._modules.items():
        if child is not None:
            yield from walk(child, f"{own}{name}.", f"{plain}{name}.")


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every name of every parameter; a tied parameter has several."""
    return {
        plain + name: p for _, plain, module in walk(model) for name, p in module._parameters.items() if p is not None
    }


def first_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters in the model's order, each under its first name."""
    seen: set[int] = set()
    return {n: p for n, p in all_parameters(model).items() if not (id(p) in seen or seen.add(id(p)))}  # type: ignore[func-returns-value]


def own_names(model: nn.Module, tensors: Mapping[str, Value]) -> dict[str, Value]:
    """``tensors`` by parameter name, as ``torch.func.functional_call`` wants them: with the names that wrapped parts have in the model."""
    own = {plain + name: prefix + name for prefix, plain, module in walk(model) for name in module._parameters}
    return {own[name]: tensor for name, tensor in tensors.items()}


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter ``name`` now, and its attribute there; raise ``AttributeError`` if there is none."""
    path, _, attribute = name.rpartition(".")
    module = unwrap(model)
    for part in filter(None, path.split(".")):
        module = unwrap(module.get_submodule(part))
    return module, attribute


def find(names: Mapping[str, Value], name: str) -> str:
    """``name`` as it stands in ``names``, without what wrappers put into it; itself where it is not there."""
    plain = ".".join(part for part in name.split(".") if part not in _PREFIXES)
    while plain not in names and plain.startswith("module."):
        plain = plain.removeprefix("module.")
    return plain if plain in names else name


def by_first_name(model: nn.Module, values: Mapping[str, Value], what: str) -> dict[str, Value]:
    """``values`` under the first name of each parameter; unknown names stay. Raise ``ValueError`` for different values of one parameter."""
    names = all_parameters(model)
    first = {id(p): name for name, p in first_names(model).items()}
    found: dict[str, Value] = {}
    for name, value in values.items():
        known = find(names, name)
        key = first[id(names[known])] if known in names else name
        if key in found and not _same(found[key], value):
            raise ValueError(
                f"{what} holds two different values for {key}, which is tied: {name} is another name of it"
            )
        found[key] = value
    return found


def _same(a: object, b: object) -> bool:
    import torch

    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
