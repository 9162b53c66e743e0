"""Multiply-adds of one forward pass, by parameter: what sparsity can save at most.

Counted where PyTorch dispatches its kernels, so that layers which are written as functions, or call a weight twice, count for what they do. Products of
activations with each other (attention) are counted apart: no sparsity of weights saves them. Norms, activations and additions are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from capruner.models.modes import eval_mode
from capruner.models.wrappers import first_names, unwrap

_aten = torch.ops.aten
# Where the first factor stands.
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1, _aten.mv: 0, _aten.addmv: 1, _aten.linear: 0}


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one sample.

    Attributes:
        input_size: size of the sample, for example ``(channels, height, width)``.
        weights: ``{parameter name: multiply-adds with that parameter}``.
        activations: multiply-adds of activations with each other.
    """

    input_size: tuple[int, ...]
    weights: dict[str, int]
    activations: int

    @property
    def dense(self) -> int:
        """All multiply-adds of the dense model."""
        return sum(self.weights.values()) + self.activations

    def per_weight(self, model: nn.Module) -> dict[str, float]:
        """``{parameter name: multiply-adds with each of its weights}``, for the ``costs`` of :func:`capruner.prune`."""
        return {
            name: self.weights[name] / p.numel() for name, p in first_names(model).items() if self.weights.get(name)
        }

    def left(self, sparsity: Mapping[str, float]) -> int:
        """Those that remain when products with zeros are skipped; ``sparsity`` by parameter name, absent means dense."""
        kept = sum(count * (1 - sparsity.get(name, 0.0)) for name, count in self.weights.items())
        return round(kept) + self.activations


class Counter(TorchDispatchMode):
    """Multiply-adds while it is entered: ``weights`` by parameter name, and ``activations`` with each other."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        # Several parameters can share a storage: those of an LSTM on a GPU do.
        self.places: dict[int, list[tuple[int, int, str]]] = {}
        for name, p in parameters.items():
            start = int(p.storage_offset())
            self.places.setdefault(_storage(p), []).append((start, start + p.numel(), name))
        self.weights: dict[str, int] = {}
        self.activations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        first, *others = factors(operation, args) or [None]
        if operation is _aten.convolution:
            weight, transposed = others[0], args[6]
            places = first if transposed else out
            self._count([weight], weight.numel() * (places.numel() // places.shape[1]))
        elif first is not None:
            self._count([first, *others], out.numel() * first.shape[-1])
        return out

    def _count(self, multiplied: Sequence[Tensor], products: int) -> None:
        for factor in multiplied:
            for start, stop, name in self.places.get(_storage(factor), ()):
                if start <= factor.storage_offset() < stop:
                    self.weights[name] = self.weights.get(name, 0) + products
                    return
        self.activations += products


def factors(operation: Any, args: Sequence[Any]) -> list[Any]:
    """The two tensors that an operation of torch multiplies, if it is a product or convolution."""
    if operation is _aten.convolution:
        return list(args[:2])
    return list(args[_PRODUCTS[operation] :][:2]) if operation in _PRODUCTS else []


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)  # an identity that tensors without data, on the meta device, have too


@contextmanager
def plain_products() -> Iterator[None]:
    """Attention and recurrent layers as products that a dispatch mode sees, and not as one fused kernel each."""
    flags = [
        (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
        (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
        (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    ]
    before = [get() for get, _ in flags]
    try:
        for _, put in flags:
            put(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for (_, put), value in zip(flags, before):
            put(value)


@torch.no_grad()
def multiply_adds(model: nn.Module, input_size: Sequence[int]) -> MultiplyAdds:
    """Multiply-adds of ``model`` on one sample of ``input_size``, by a forward pass in eval mode on the model's device (``meta`` will do).

    Raises:
        RuntimeError: the model does not take such an input.
    """
    model = unwrap(model)
    some = next(model.parameters())
    sample = torch.zeros(1, *input_size, device=some.device, dtype=some.dtype)
    counter = Counter(first_names(model))
    with eval_mode(model), plain_products(), counter:
        model(sample)
    return MultiplyAdds(tuple(input_size), counter.weights, counter.activations)
