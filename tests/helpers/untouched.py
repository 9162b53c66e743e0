"""Everything about a model that a calibration could leave a trace on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def snapshot(model: nn.Module) -> list[Any]:
    """Modes, flags, gradients (None or which tensor, and its values), values, and the identity of parameters and buffers."""
    return [
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        [p.detach().clone() for p in model.parameters()],
        [b.clone() for b in model.buffers()],
        [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    ]


def same(before: Any, after: Any) -> bool:
    """Bitwise."""
    if isinstance(before, Tensor):
        return before.dtype == after.dtype and before.equal(after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after
