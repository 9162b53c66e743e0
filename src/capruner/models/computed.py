"""Weights that ``forward`` computes from a parameter: are zeros of the parameter zeros of what is multiplied?

A gain or an equalised learning rate scales the parameter, and zeros stay zeros. Weight standardisation subtracts a mean, and none do: such a layer would be
reported as sparse, and be dense. To find out, half of a parameter is set to zero, the model (or one layer) runs once, and what reaches its products and
convolutions is looked at where PyTorch dispatches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from capruner.batches import BatchError
from capruner.models.macs import factors, plain_products
from capruner.models.modes import eval_mode, random_state_kept
from capruner.models.wrappers import own_names
from capruner.text import some

_aten = torch.ops.aten
_CONSTANTS = (_aten.lift_fresh, _aten.lift_fresh_copy)
_FEW = 64
"""In a part of a weight that is smaller than this, zeros may be absent by chance."""

_SEEN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Watch(TorchDispatchMode):
    """Follows what is computed from parameters alone, without data, up to the products that it enters.

    Args:
        parameters: ``{name: tensor}``; with zeros in each, ``lost`` tells which of them lost theirs on the way.
        constants: other parameters and buffers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], constants: list[Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self.computed: set[str] = set()
        self.lost: set[str] = set()
        # The tensors are kept, so that nobody else gets their ids.
        self.known: dict[int, tuple[Tensor, frozenset[str]]] = {id(t): (t, frozenset()) for t in constants}
        self.known |= {id(t): (t, frozenset([name])) for name, t in parameters.items() if t.dim() > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [self.known.get(id(t)) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources: frozenset[str] | None = None
        if func.overloadpacket in _CONSTANTS or None not in inputs:
            sources = frozenset().union(*(found[1] for found in inputs if found is not None))
        products = factors(func.overloadpacket, args)
        for factor in products:
            self._look(factor)
        if products and sources is not None:
            sources = frozenset()  # an activation of constants, no weight any more
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.known.pop(id(t), None)
                if sources is not None:
                    self.known[id(t)] = t, sources
        return out

    def _look(self, factor: Tensor) -> None:
        _, names = self.known.get(id(factor), (None, frozenset[str]()))
        others = [n for n in names if factor.untyped_storage()._cdata != self.parameters[n].untyped_storage()._cdata]
        self.computed.update(others)
        zeros = int(((factor == 0) | factor.isnan()).sum()) if others else 0
        for name in others:
            there = int((self.parameters[name] == 0).sum())
            whole = factor.numel() == self.parameters[name].numel()
            if zeros < there if whole else factor.numel() >= _FEW and 4 * zeros < factor.numel():
                self.lost.add(name)


def _half(weight: Tensor) -> Tensor:
    """A copy with zeros in half of the places, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(weight.numel(), generator=generator)[: weight.numel() // 2].to(weight.device)
    return weight.detach().flatten().index_fill(0, chosen, 0).view(weight.shape)


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Eval mode; buffers and random numbers are as before afterwards."""
    with random_state_kept(), eval_mode(model), torch.no_grad(), plain_products():
        yield


def lost_zeros(model: nn.Module, parameters: Mapping[str, nn.Parameter], call: Callable[[Any], Any]) -> list[str]:
    """Names of the parameters whose zeros are not zeros of what the model multiplies with.

    Args:
        call: gets a function like the model, and calls it. Where it raises there is no answer, and the list is empty: whoever runs the model next gets
            the same error, with the words for it.
    """
    zeroed = {name: _half(p) for name, p in parameters.items() if p.dim() > 1}
    pruned = {id(parameters[name]) for name in zeroed}
    constants = [p for p in model.parameters() if id(p) not in pruned] + list(model.buffers())
    watch = _Watch(zeroed, constants)
    replaced = own_names(model, zeroed)

    def functional(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, replaced, args, kwargs)

    with _no_trace(model), watch:
        try:
            call(functional)
        except Exception:  # whatever a model may raise
            return []
    return [name for name in parameters if name in watch.lost]


class FirstLook:
    """``model``, whose first call is watched. Where a weight is computed, the model runs once more, with zeros in it.

    Raises:
        BatchError: on the first call: zeros of a parameter would not be zeros of what is multiplied.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.parameters, self.looked = model, parameters, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.looked:
            return self.model(*args, **kwargs)
        self.looked = True
        copied_args, copied_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        constants = [*self.model.parameters(), *self.model.buffers()]
        watch = _Watch(self.parameters, constants)
        with watch:
            outputs = self.model(*args, **kwargs)
        computed = {name: self.parameters[name] for name in watch.computed}
        lost = lost_zeros(self.model, computed, lambda model: model(*copied_args, **copied_kwargs)) if computed else []
        if lost:
            raise BatchError(
                f"forward computes other weights from {some(lost)} (standardisation, for example), in "
                f"which zeros of the parameter are not zeros; leave them dense with exclude={lost!r}"
            )
        return outputs


def loses_zeros(layer: nn.Module) -> bool:
    """Whether ``layer``, a Linear or convolution, computes another weight from its own, seen on random numbers of its shapes.

    False for layers of torch itself, and where such a layer does not run on one tensor: the first forward pass of the model tells then.
    """
    if type(layer).__module__.startswith("torch.nn.modules.") and "forward" not in vars(layer):
        return False
    if layer not in _SEEN:
        _SEEN[layer] = _loses_zeros(layer)
    return _SEEN[layer]


def _loses_zeros(layer: nn.Module) -> bool:
    shape = _input_shape(layer)
    if shape is None or any(nn.parameter.is_lazy(p) for p in layer.parameters()):
        return False
    tensors = _numbers(layer, "weight")
    watch = _Watch({"weight": tensors["weight"]}, [t for name, t in tensors.items() if name != "weight"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with _no_trace(layer), watch:
        try:
            torch.func.functional_call(_Forward(layer), {f"layer.{name}": t for name, t in tensors.items()}, (x,))
        except Exception:  # it may want other arguments, or refuse this shape
            return False
    return bool(watch.lost)


def parametrization_loses_zeros(parametrization: nn.Module, original: str) -> bool:
    """Whether zeros of one of its parameters are not zeros of the weight that a parametrization computes, seen on random numbers of its shapes."""
    tensors = _numbers(parametrization, original)
    with _no_trace(parametrization):
        try:
            weight = torch.func.functional_call(parametrization, tensors, ())
        except Exception:  # it may refuse such numbers
            return False
    zeros = int(((weight == 0) | weight.isnan()).sum())
    return weight.numel() == tensors[original].numel() and zeros < int((tensors[original] == 0).sum())


def _numbers(module: nn.Module, half: str) -> dict[str, Tensor]:
    """Random parameters and buffers for ``module``, with zeros in half of one of them; on the CPU, wherever its own are."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(t.shape, generator=generator)
        if t.is_floating_point()
        else torch.zeros(t.shape, dtype=t.dtype)
        for name, t in (*module.named_parameters(), *module.named_buffers())
    }
    return tensors | {half: _half(tensors[half])}


class _Forward(nn.Module):
    """A layer's ``forward`` without its hooks, which belong to its user."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer.forward(x)


def _input_shape(layer: nn.Module) -> tuple[int, ...] | None:
    if isinstance(layer, nn.Linear):
        return 3, layer.in_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return 1, layer.in_channels, *(d * (k - 1) + 2 for d, k in zip(layer.dilation, layer.kernel_size))
    return None
